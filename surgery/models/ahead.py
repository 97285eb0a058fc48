"""Reading the next decoder layer onto an accelerator while the last one still runs there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

Values = Mapping[str, torch.Tensor]


class Ahead:
    """One layer at most is read ahead, so that two are in memory.

    On CUDA it is copied on a stream of its own; on the default one the copy would wait for what the
    last layer still computes. Nothing is read here while the caller reads, as `take` and `drop`
    wait for what was begun: the files need not be read by two threads at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._pool = ThreadPoolExecutor(1, "surgery-ahead")
        self._index: int | None = None
        self._begun: Future[Values] | None = None

    def begin(self, index: int, read: Callable[[], Values]) -> None:
        """Have a layer read; what was begun before must have been taken or dropped.

        Args:
            index: of the layer.
            read: its parameters, on the device.
        """
        self._index, self._begun = index, self._pool.submit(self._read, read)

    def take(self, index: int) -> Values | None:
        """A layer's parameters, after waiting for them; None where another or none was begun.

        Raises:
            Exception: what reading it raised.
        """
        if index != self._index:
            self.drop()
            return None
        begun, self._index, self._begun = self._begun, None, None
        assert begun is not None
        values = begun.result()
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            for tensor in values.values():
                tensor.record_stream(here)  # its memory is free once this stream is done with it
        return values

    def drop(self) -> None:
        """Wait for what was begun, and forget it, also how it failed: nobody wants it."""
        begun, self._index, self._begun = self._begun, None, None
        if begun is not None:
            begun.exception()

    def _read(self, read: Callable[[], Values]) -> Values:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return read()
