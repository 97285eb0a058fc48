"""What is measured beside a base: edited checkpoints, each with its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.method.mask import Mask
from surgery.patient.patient import Patient

BASE, REFERENCE, EDITED = "base", "reference", "edited"


@dataclass(frozen=True)
class Edited:
    """An edited checkpoint beside its base.

    Attributes:
        name: that tells it from the others.
        patient: the checkpoint; its model is in memory while it is measured, and no longer.
        reference: the name of the reference that belongs to it: base under the paper's hooks.
        mask: of these hooks; None where there is no reference.
        steps: whether its layers, and base's, can be entered one after another: they are known, and
            in floating point.
    """

    name: str
    patient: Patient
    reference: str | None = None
    mask: Mask | None = None
    steps: bool = False


def references_of(edited: Sequence[Edited]) -> dict[str, Mask]:
    """The references of several checkpoints by name, each once."""
    return {
        one.reference: one.mask
        for one in edited
        if one.reference is not None and one.mask is not None
    }
