"""The parameters of a model, read one by one from the bytes of its checkpoint."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.models.names import StoredNames

logger = logging.getLogger(__name__)

# Embedding rows closer than this are read in one piece.
_ROW_GAP = 64 * 1024
# Elements of a tensor that are read at a time. On the Hub each piece is a request.
_PIECE = 2_000_000
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# transformers 5 keeps a layer's experts in one tensor; checkpoints keep them one by one, in which
# the part that gates comes first.
_EXPERT = re.compile(r".*\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
_PARTS = ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


class StoredParameters:
    """A model's parameters by its own names, in one dtype and on one device.

    Attributes:
        bytes_read: of weight files, so far.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._names = StoredNames(checkpoint, model)
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint holds what a parameter is made from."""
        return name in self._names

    def values(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The values of a parameter.

        Raises:
            Unsupported: where they are computed from stored tensors in a way not known here.
            BadCheckpoint: where the checkpoint lacks them.
        """
        sources = self._names.sources(name)
        values = self._tensor(sources[0]) if len(sources) == 1 else self._experts(name, sources)
        if tuple(values.shape) != shape:
            raise Unsupported(
                f"{name} has shape {list(shape)} in the model and {list(values.shape)} in the "
                "checkpoint, so it cannot be streamed."
            )
        return values

    def rows(self, name: str, rows: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Some rows of a matrix; neighbours are read together.

        Args:
            name: of the parameter.
            rows: in ascending order.
            shape: of the whole matrix in the model.

        Raises:
            BadCheckpoint: where the matrix is stored in another shape or has no such row: the
                bytes behind it are another tensor's.
        """
        name = self._names.of(name)
        entry = self._checkpoint.tensors[name]
        if entry.shape != shape:
            raise BadCheckpoint(
                f"{name} is stored with the shape {list(entry.shape)}, but config.json describes "
                f"{list(shape)}."
            )
        count = shape[0]
        outside = [row for row in rows if not 0 <= row < count]
        if outside:
            raise BadCheckpoint(
                f"The token id {outside[-1]} has no row in {name}, which has {count}: tokenizer "
                "and weights do not belong together."
            )
        width = entry.size // count
        runs: list[list[int]] = []
        for row in rows:
            if runs and (row - runs[-1][-1]) * width <= _ROW_GAP:
                runs[-1].append(row)
            else:
                runs.append([row])
        spans = [(run[0], run[-1] + 1) for run in runs]
        pieces = self._read(name, [(begin * width, end * width) for begin, end in spans])
        return torch.cat(
            [
                piece.reshape(-1, *entry.shape[1:])[[row - run[0] for row in run]]
                for run, piece in zip(runs, pieces, strict=True)
            ]
        )

    def _tensor(self, name: str) -> torch.Tensor:
        entry = self._checkpoint.tensors[name]
        found = torch.empty(math.prod(entry.shape), dtype=self._dtype, device=self._device)
        # Piece by piece, so that the stored bytes never stand beside the whole tensor.
        width = entry.size // max(1, len(found))
        for begin in range(0, len(found), _PIECE):
            end = min(begin + _PIECE, len(found))
            found[begin:end] = self._read(name, [(begin * width, end * width)])[0]
        return found.reshape(entry.shape)

    def _read(self, name: str, spans: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Byte spans of a stored tensor, each as a flat tensor."""
        entry = self._checkpoint.tensors[name]
        if any(not 0 <= begin <= end <= entry.size for begin, end in spans):
            raise BadCheckpoint(f"{name} holds {entry.size} bytes, fewer than its shape says.")
        if entry.dtype not in _TORCH:
            raise Unsupported(f"{name} is stored as {entry.dtype}, which cannot be streamed.")
        self.bytes_read += sum(end - begin for begin, end in spans)
        raws = self._checkpoint.ranges.read_many(
            [(entry.file, entry.begin + begin, entry.begin + end) for begin, end in spans]
        )
        return [
            torch.frombuffer(bytearray(raw), dtype=_TORCH[entry.dtype]).to(
                self._device, self._dtype
            )
            for raw in raws
        ]

    def _experts(self, name: str, sources: list[str]) -> torch.Tensor:
        """Fused experts [experts, out, in] from the experts' own tensors in the checkpoint."""
        parts: dict[int, dict[str, str]] = {}
        for source in sources:
            match = _EXPERT.fullmatch(source)
            if match is None or match["part"] not in _PARTS:
                raise Unsupported(f"{name} is computed from {source}, so it cannot be streamed.")
            parts.setdefault(int(match["number"]), {})[match["part"]] = source
        logger.debug("%s is made from %d experts", name, len(parts))
        return torch.stack(
            [
                torch.cat([self._tensor(own[part]) for part in _PARTS if part in own])
                for _, own in sorted(parts.items())
            ]
        )
