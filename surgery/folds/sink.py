"""The `sink` fold: a rank-one edit of the linears that read the attention input.

W ← W − γ (W (m ⊙ c)) vᵀ gives W (c − γ m ⊙ c) on the sink token, whose attention input is c, and
W x on tokens to which the detector v does not answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.folds.base import Calibration, Fold, readers
from surgery.folds.edits import Edit
from surgery.folds.rank_one import rank_one_edits
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy

if TYPE_CHECKING:
    from surgery.patient.patient import Patient


class Sink(Fold):
    """The paper's mask in plain weights: the massive token alone, up to a measured leak."""

    name = "sink"
    tokens = "first"
    exact = False
    linear = True
    low_rank = True
    calibrates = True
    words = (
        "**The `sink` fold** adds a rank-one term, W ← W − γ (W (m ⊙ c)) vᵀ, to the attention's "
        "linears. It reaches the **massive (sink) token, and tokens that look like it**: that is "
        "the paper's mask in plain weights, up to a small leak."
    )

    def calibrate(self, patient: Patient, mask: Mask) -> Calibration:
        from surgery.folds.calibrate import calibrate  # imports torch

        return calibrate(patient, mask)

    def touched(self, anatomy: Anatomy, mask: Mask) -> list[str]:
        return [name for layer in mask.layers for _, name in readers(anatomy, layer)]

    def layer_edits(
        self, anatomy: Anatomy, mask: Mask, layer: int, calibration: Calibration
    ) -> Iterator[Edit]:
        yield from rank_one_edits(anatomy, mask, layer, calibration.directions[layer])
