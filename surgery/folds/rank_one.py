"""The rank-one edits of a target layer, from its sink direction."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.folds.base import readers
from surgery.folds.edits import RankOne, SinkDirection
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy


def rank_one_edits(
    anatomy: Anatomy, mask: Mask, layer: int, direction: SinkDirection
) -> Iterator[RankOne]:
    """One edit for each linear that reads the layer's attention input."""
    chosen, axis = mask.dimensions[layer], anatomy.input_axis
    for tensor, parameter in readers(anatomy, layer):
        yield RankOne(
            tensor, layer, chosen, mask.strength, axis, sink=direction, parameter=parameter
        )
