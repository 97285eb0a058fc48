"""The `qkv` fold: the input columns S of every linear that reads the attention input are zero."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.folds.base import Calibration, Fold, readers
from surgery.folds.edits import Columns, Edit
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy


class Qkv(Fold):
    """Columns scaled in S: the same function as `norm`, where the norm feeds others too."""

    name = "qkv"
    tokens = "every"
    exact = True
    linear = True
    words = (
        "**The `qkv` fold** sets the input columns of the attention's linears to zero in these "
        "dimensions. It reaches **every token**, in every position. The paper masks the sink token "
        "alone, so this is a stronger edit than the paper's."
    )

    def layer_edits(
        self, anatomy: Anatomy, mask: Mask, layer: int, calibration: Calibration
    ) -> Iterator[Edit]:
        chosen, axis = mask.dimensions[layer], anatomy.input_axis
        for tensor, parameter in readers(anatomy, layer):
            yield Columns(tensor, layer, chosen, mask.strength, axis, parameter=parameter)
