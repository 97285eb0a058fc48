"""The `norm` fold: the gain of the pre-attention norm is zero in S."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.folds.base import Calibration, Fold
from surgery.folds.edits import Bias, Edit, Gain
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy


class Norm(Fold):
    """Gain (and bias, if any) scaled in S: masks every token, legal where attention alone reads."""

    name = "norm"
    tokens = "every"
    exact = True
    linear = False
    words = (
        "**The `norm` fold** sets the gain of the pre-attention norm to zero in these dimensions. "
        "It reaches **every token**, in every position. The paper masks the sink token alone, so "
        "this is a stronger edit than the paper's."
    )

    def refusal(self, anatomy: Anatomy) -> str:
        if not anatomy.norm_refusal:
            return ""
        return (
            f"--fold norm is not possible for {anatomy.model_type}: {anatomy.norm_refusal}; "
            "use --fold qkv (the same function, in the attention's own weights) or --fold sink."
        )

    def layer_edits(
        self, anatomy: Anatomy, mask: Mask, layer: int, calibration: Calibration
    ) -> Iterator[Edit]:
        found, chosen = anatomy.at(layer), mask.dimensions[layer]
        yield Gain(
            found.gain,
            layer,
            chosen,
            mask.strength,
            anatomy.null_gain,
            parameter=f"{found.norm}.weight",
        )
        if found.bias:
            yield Bias(found.bias, layer, chosen, mask.strength, parameter=f"{found.norm}.bias")
