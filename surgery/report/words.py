"""What the evidence says, in words; every function but the helpers is one section of the page.

Each takes the evidence and the emergence, and returns nothing where there is nothing to say: then
the section and its figure are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.errors import NoEmergence
from surgery.measure.attention import HEATMAP_TOKENS
from surgery.measure.evidence import Evidence
from surgery.method.evidence import pairwise
from surgery.method.locate import IGNORED_LAST_LAYERS, Emergence
from surgery.report.numbers import short


def _place(found: Evidence, name: str, layer: int, *, lowest: bool = False) -> str:
    """A figure at the ME Layer and how it ranks among the layers before the last ones.

    The last layers have an event of their own in many models (Appendix A).
    """
    values = np.array([getattr(row, name) for row in found.rows])
    here = values[layer]
    if np.isnan(here):
        return "was not measured"
    counted = values[: max(layer + 1, len(values) - IGNORED_LAST_LAYERS)]
    where = "of all layers" if len(counted) == len(values) else "before the last two layers"
    order = np.argsort(counted if lowest else -counted, kind="stable")
    rank = int(np.flatnonzero(order == layer)[0]) + 1
    word = "lowest" if lowest else "highest"
    if rank == 1:
        return f"is {short(here)}, the {word} {where}"
    best = int(order[0])
    return f"is {short(here)} (rank {rank} {where}; {word}: {short(values[best])}, layer {best})"


def _pairs(found: Evidence, row: int) -> Any:
    """Cosines between the prompts' sinks in a row of states, one per pair."""
    return pairwise(found.cosines[row])


# --------------------------------------------------------------------------------------------
# The sections
# --------------------------------------------------------------------------------------------


def emergence(_found: Evidence, emerged: Emergence) -> str:
    """Where the norm jumps."""
    if emerged.layer is None:
        try:
            emerged.require()
        except NoEmergence as error:
            return str(error)[0].upper() + str(error)[1:]
    row = emerged.rows[emerged.layer or 0]
    return (
        f"Layer {row.layer} takes the sink from a norm of {short(row.sink_input)} to "
        f"{short(row.sink_output)}, {short(emerged.magnification)} times; the other tokens' "
        f"median is {short(row.others)}. The next best lasting layer magnifies "
        f"{short(emerged.runner_up)} times."
    )


def parts(found: Evidence, emerged: Emergence) -> str:
    """Norms after the pre-FFN norm, the FFN and the layer."""
    layer = emerged.layer
    words = (
        "The sink against the other tokens after the norm in front of the FFN (WeightNorm), after "
        "the FFN, and after the layer."
    )
    if layer is None:
        return words
    place = _place(found, "weight_norm_sink", layer)
    return f"{words} At layer {layer} the WeightNorm of the sink {place}."


def alignment(found: Evidence, emerged: Emergence) -> str:
    """ΔFrac and ΔKL; nothing where no norm has a gain."""
    layer = emerged.layer
    if all(np.isnan(row.delta_fraction) for row in found.rows):
        return ""
    words = (
        f"ΔFrac: how much more of the sink's energy than of the others' lies in the "
        f"{found.share:.0%} of dimensions with the largest gains. ΔKL: how much further the "
        "sink's distribution of energy is from that of the squared gains. The paper finds a "
        "positive ΔFrac and a negative ΔKL at the ME Layer."
    )
    if layer is None:
        return words
    return (
        f"{words} Here, at layer {layer}, ΔFrac {_place(found, 'delta_fraction', layer)}, and ΔKL "
        f"{_place(found, 'delta_kl', layer, lowest=True)}."
    )


def ffn(found: Evidence, emerged: Emergence) -> str:
    """Projection concentration and amplification."""
    layer = emerged.layer
    words = (
        "Projection concentration (1: all energy in one dimension) of the sink less the other "
        "tokens' mean, and the FFN's amplification of the sink. The paper finds all three at "
        "their maximum at the ME Layer."
    )
    if layer is None:
        return words
    known = [
        f"{role} {_place(found, role, layer)}"
        for role in ("gate", "up", "down")
        if not np.isnan(getattr(found.rows[layer], role))
    ]
    if known:
        words += f" Here, at layer {layer}: {'; '.join(known)}."
    return f"{words} The amplification {_place(found, 'amplification', layer)}."


def stability(_found: Evidence, emerged: Emergence) -> str:
    """The same layer in every prompt."""
    votes = emerged.votes
    lengths = [vote.tokens for vote in votes]
    words = (
        f"One curve per prompt, {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens."
    )
    if emerged.layer is None:
        return words
    factors = [vote.magnification for vote in votes if vote.layer == emerged.layer]
    return (
        f"{words} {len(factors)} of {len(lengths)} name layer {emerged.layer}, magnifying the "
        f"sink {short(min(factors))} to {short(max(factors))} times."
    )


def direction(found: Evidence, emerged: Emergence) -> str:
    """The same direction in every prompt."""
    layer = emerged.layer
    words = (
        "Above: the sink's state in the first prompt, by dimension and layer. Below: its cosine "
        "with the first prompt's, for every prompt."
    )
    if layer is None or len(found.traces) < 2:
        return words
    state = np.square(found.traces[0].states[layer + 1].astype(np.float64))
    three = np.sort(state)[-3:].sum() / state.sum()
    before = float(np.mean(_pairs(found, layer)))
    here = float(np.mean(_pairs(found, layer + 1)))
    last = max(layer + 1, len(found.rows) - IGNORED_LAST_LAYERS)
    least = min(float(_pairs(found, row).min()) for row in range(layer + 1, last + 1))
    return (
        f"{words} Mean cosine between the prompts: {before:.5f} before layer {layer}, {here:.5f} "
        f"after it; no pair falls below {least:.5f} from there to layer {last - 1}. Three "
        f"dimensions hold {three:.1%} of the sink's energy after layer {layer}."
    )


def knockouts(found: Evidence, emerged: Emergence) -> str:
    """What remains without the FFN, or the norm before it."""
    layer = emerged.layer
    if layer is None or not found.knockouts:
        return ""
    names = {
        "ffn": f"Without the FFN's output at layer {layer}",
        "norm": "With the norm before that FFN bypassed (its input passed through)",
    }
    words = []
    for knockout in found.knockouts:
        left = knockout.emergence
        where = "no ME Layer is left" if left is None else f"the ME Layer is {left}"
        words.append(
            f"{names[knockout.part]}, the sink leaves the layer with "
            f"{short(float(knockout.remaining[layer]))} times its intact norm, and {where}."
        )
    row = found.rows[layer]
    if any(k.part == "norm" and k.remaining[layer] > 1 for k in found.knockouts):
        words.append(
            "In the paper the activation survives without the norm, much reduced. Here it grows: "
            f"the norm scales the sink down, to {short(row.weight_norm_sink)}, before the FFN "
            "reads it."
        )
    return " ".join(words)


def attention(found: Evidence, emerged: Emergence) -> str:
    """Attention on the sink; nothing where the model gives no weights."""
    layer = emerged.layer
    if found.attention is None:
        return ""
    words = "Share of attention on the sink by layer and head, mean over the query tokens after it."
    if layer is None or layer + 1 >= len(found.rows):
        return words
    here, after = found.rows[layer].attention, found.rows[layer + 1].attention
    return (
        f"{words} Mean over the heads: {here:.1%} at the ME Layer, {after:.1%} at layer "
        f"{layer + 1}, the first that reads the massive activation."
    )


def heatmaps(found: Evidence, _emerged: Emergence) -> str:
    """One prompt's attention before and under the mask."""
    if found.attention is None or not found.attention.heatmaps:
        return ""
    return (
        f"The first {HEATMAP_TOKENS} tokens of prompt {found.attention.prompt + 1}: the ME "
        "Layer, the layer after it, and that layer under the mask."
    )


def mask(found: Evidence, _emerged: Emergence) -> str:
    """What the mask does to the sink."""
    effect = found.mask
    if effect is None:
        return ""
    words = [
        f"S, {len(effect.dimensions)} dimensions of layer {effect.layer}, holds "
        f"{effect.energy:.1%} of the energy of the sink's attention input. The mask turns that "
        f"input (cosine {effect.cosine:.4f})."
    ]
    if effect.key is not None and effect.value is not None:
        words.append(
            f"The sink's key changes by {effect.key:.1%} of its norm, its value by "
            f"{effect.value:.1%}."
        )
    if effect.to_sink is not None and effect.entropy is not None:
        words.append(
            f"Attention on the sink at layer {effect.layer} goes from {effect.to_sink[0]:.1%} to "
            f"{effect.to_sink[1]:.1%}, the entropy of attention from {effect.entropy[0]:.3f} to "
            f"{effect.entropy[1]:.3f} nats."
        )
    return " ".join(words)
