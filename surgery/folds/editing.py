"""Edits applied to a loaded model in memory, and undone exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.files.checkpoint import Checkpoint
from surgery.folds.edits import Edit


def set_parameter(parameter: torch.Tensor, values: NDArray) -> None:
    """Store numpy values (any stored float format) in a parameter, on its device."""
    wide = np.asarray(values, dtype=np.float64 if values.dtype == np.float64 else np.float32)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(wide)))


class EditedWeights:
    """Edited, rounded weights beside a loaded model, exchanged with its own by reference."""

    def __init__(self, model: Any, checkpoint: Checkpoint, edits: Sequence[Edit]) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for edit in edits:
            parameter = model.get_parameter(edit.parameter)
            values = torch.empty_like(parameter)
            dtype = checkpoint.tensors[edit.tensor].dtype
            set_parameter(values, edit.apply(checkpoint.read(edit.tensor), dtype))
            self._pairs.append((parameter, values))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model with the edited weights for the time of the block; its own afterwards."""
        originals = [parameter.data for parameter, _ in self._pairs]
        try:
            for parameter, values in self._pairs:
                parameter.data = values
            yield
        finally:
            for (parameter, _), original in zip(self._pairs, originals, strict=True):
                parameter.data = original


def edited(
    model: Any, checkpoint: Checkpoint, edits: Sequence[Edit]
) -> AbstractContextManager[None]:
    """The model with the edits' rounded weights for the time of the block; exact afterwards."""
    return EditedWeights(model, checkpoint, edits).active()
