"""What the mask does to the sink at the first target layer (§4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.measure.attention import Attended, Attention
from surgery.method import evidence
from surgery.method.mask import Mask
from surgery.models.observe import to_numpy

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Pairs = Sequence[tuple[Attention, Attention]]


@dataclass(frozen=True)
class MaskEvidence:
    """What the mask does to the sink at the first target layer (§4), means over the prompts.

    Attributes:
        layer: the first target layer.
        dimensions: S there.
        energy: share of its attention input's energy in S.
        cosine: of that input before and after.
        key: relative change of the sink's key; None where attention keeps none.
        value: relative change of the sink's value, likewise.
        to_sink: attention of later tokens on the sink at that layer, before and after.
        entropy: of these tokens' attention, nats, before and after.
        inputs: |attention input| of the sink in the first prompt, [D].
    """

    layer: int
    dimensions: tuple[int, ...]
    energy: float
    cosine: float
    key: float | None
    value: float | None
    to_sink: tuple[float, float] | None
    entropy: tuple[float, float] | None
    inputs: Array


def mask_effect(observed: Sequence[Attended], mask: Mask | None) -> MaskEvidence | None:
    """What the mask does, on the prompts whose sink it reaches; None where there is no such."""
    pairs = [(one.before, one.after) for one in observed if one.after is not None]
    inputs = [before.inputs for before, _ in pairs if before.inputs is not None]
    if mask is None or not inputs:
        return None
    layer = min(mask.layers)
    chosen = mask.dimensions[layer]
    factor = np.ones(mask.hidden_size)
    factor[list(chosen)] = 1.0 - mask.strength
    logger.debug("the mask's effect in layer %d on %d prompts", layer, len(pairs))
    return MaskEvidence(
        layer=layer,
        dimensions=tuple(chosen),
        energy=float(np.mean([evidence.masked_share(x, chosen) for x in inputs])),
        cosine=float(np.mean([evidence.cosine(x, x * factor) for x in inputs])),
        key=_change(pairs, layer, "keys"),
        value=_change(pairs, layer, "values"),
        to_sink=_both(pairs, layer, evidence.attention_to_sink),
        entropy=_both(pairs, layer, evidence.attention_entropy),
        inputs=np.abs(inputs[0]),
    )


def _change(pairs: Pairs, layer: int, which: str) -> float | None:
    """Relative change of the sink's "keys" or "values" at a layer."""
    entries = [[_sink_entry(one.cache, layer, which) for one in pair] for pair in pairs]
    changes = [
        evidence.relative_change(before, after)
        for before, after in entries
        if before is not None and after is not None
    ]
    return float(np.mean(changes)) if changes else None


def _sink_entry(cache: Any, layer: int, which: str) -> Array | None:
    """The sink's key or value in a cache, all heads in one vector; None where there is none."""
    layers = getattr(cache, "layers", None) or ()
    entry = getattr(layers[layer], which, None) if layer < len(layers) else None
    if not isinstance(entry, torch.Tensor) or entry.dim() != 4 or not entry.shape[2]:
        return None
    return to_numpy(entry[0, :, 0]).astype(np.float64).reshape(-1)


def _both(
    pairs: Pairs, layer: int, measure: Callable[[Array, int], Array]
) -> tuple[float, float] | None:
    """A measure of attention at a layer before and after; None where a run gave no weights."""
    if any(layer not in run.weights for pair in pairs for run in pair):
        return None
    means = [[float(measure(run.weights[layer], 0).mean()) for run in pair] for pair in pairs]
    before, after = np.mean(means, axis=0)
    return float(before), float(after)
