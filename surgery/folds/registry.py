"""The folds by name: a new fold is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import BadSettings
from surgery.folds.base import Calibration, Fold
from surgery.folds.edits import Edit, SinkDirection
from surgery.folds.norm import Norm
from surgery.folds.qkv import Qkv
from surgery.folds.sink import Sink
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy

FOLDS: dict[str, Fold] = {fold.name: fold for fold in (Norm(), Qkv(), Sink())}


def fold_named(name: str) -> Fold:
    """The fold of a name; BadSettings for a name that none has."""
    if name not in FOLDS:
        raise BadSettings(f"--fold must be one of {', '.join(FOLDS)}; not {name!r}.")
    return FOLDS[name]


def legal_folds(anatomy: Anatomy) -> tuple[str, ...]:
    """The names of the folds that are truthful in a model."""
    return tuple(name for name, fold in FOLDS.items() if not fold.refusal(anatomy))


def make_edits(
    anatomy: Anatomy, mask: Mask, fold: str, sinks: Mapping[int, SinkDirection] | None = None
) -> tuple[Edit, ...]:
    """The edits that fold a mask into a model; empty at strength 0, which changes no byte.

    Args:
        anatomy: where the attention input of each layer lies.
        mask: S of each target layer, and γ.
        fold: "norm", "qkv" or "sink".
        sinks: the sink direction of each target layer, for "sink".

    Raises:
        Unsupported: where the fold would reach more than attention.
        BadSettings: for "sink" without the sink direction of a target layer.
    """
    return fold_named(fold).edits(anatomy, mask, Calibration(sinks or {}))
