"""Edits applied to a loaded model in memory, and undone exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint
from surgery.fold import Edit


def parameter_of(model: Any, anatomy: Anatomy, edit: Edit) -> torch.Tensor:
    """The loaded parameter that holds an edit's tensor."""
    found = anatomy.at(edit.layer)
    if edit.tensor == found.gain:
        return model.get_parameter(f"{found.norm}.weight")
    if edit.tensor == found.bias:
        return model.get_parameter(f"{found.norm}.bias")
    reader = found.readers[found.weights.index(edit.tensor)]
    return model.get_parameter(f"{reader}.weight")


def set_parameter(parameter: torch.Tensor, values: NDArray) -> None:
    """Store numpy values (any stored float format) in a parameter, on its device."""
    wide = np.asarray(values, dtype=np.float64 if values.dtype == np.float64 else np.float32)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(wide)))


@contextmanager
def edited(
    model: Any, anatomy: Anatomy, checkpoint: Checkpoint, edits: Sequence[Edit]
) -> Iterator[None]:
    """The model with the edits' rounded weights for the time of the block; exact afterwards."""
    saved = [
        (parameter, parameter.detach().clone())
        for parameter in (parameter_of(model, anatomy, edit) for edit in edits)
    ]
    try:
        for edit, (parameter, _) in zip(edits, saved, strict=True):
            stored = checkpoint.read(edit.tensor)
            set_parameter(parameter, edit.apply(stored, checkpoint.tensors[edit.tensor].dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, original in saved:
                parameter.copy_(original)
