"""All that the paper measures to explain an ME Layer, on the prompts it was located with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.measure.attention import (
    AttentionEvidence,
    attention_evidence,
    mean_of,
    observe_attention,
)
from surgery.measure.feed_forward import FeedForward, describe_parts, feed_forwards
from surgery.measure.knockouts import Knockout, knock_out
from surgery.measure.mask_effect import MaskEvidence, mask_effect
from surgery.measure.traces import PROJECTIONS, PromptTrace, trace_prompts
from surgery.method import evidence
from surgery.method.locate import Emergence, others_median
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.observe import Progress
from surgery.patient.texts import Prompt

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerEvidence:
    """One line of the table by layer: medians over the prompts, NaN where nothing was measured.

    Attributes:
        layer: its index.
        sink: L2 norm of the layer's output at the sink.
        others: the same at the median other token.
        magnification: `sink` against the layer before.
        ffn_sink: L2 norm of the FFN's output at the sink.
        ffn_others: at the median other token.
        weight_norm_sink: L2 norm of the output of the norm before the FFN, at the sink.
        weight_norm_others: at the median other token.
        delta_fraction: eq. 1, sink minus others.
        delta_kl: eq. 2, sink minus others, nats.
        gate: eq. 3, sink minus others.
        up: likewise.
        down: likewise.
        amplification: of the FFN for the sink.
        cosine: of the sink's states, mean over the pairs of inputs.
        attention: share on the sink, mean over the heads.
        without_ffn: share of the sink's norm that is left without the ME Layer's FFN.
        without_norm: without the norm before it.
    """

    layer: int
    sink: float
    others: float
    magnification: float
    ffn_sink: float
    ffn_others: float
    weight_norm_sink: float
    weight_norm_others: float
    delta_fraction: float
    delta_kl: float
    gate: float
    up: float
    down: float
    amplification: float
    cosine: float
    attention: float
    without_ffn: float
    without_norm: float


@dataclass(frozen=True)
class Evidence:
    """All that was gathered.

    Attributes:
        feed_forwards: the FFN of each layer.
        traces: by prompt.
        cosines: between the inputs' sink states, [layers + 1, inputs, inputs].
        knockouts: of the parts of the ME Layer.
        attention: on the sink; None where it cannot be observed.
        mask: what the mask does; None where there is no ME Layer, or nothing can be observed.
        rows: the table by layer.
        share: K / D of eq. 1.
        notes: what could not be measured on this model, and why.
    """

    feed_forwards: tuple[FeedForward | None, ...]
    traces: tuple[PromptTrace, ...]
    cosines: Array
    knockouts: tuple[Knockout, ...]
    attention: AttentionEvidence | None
    mask: MaskEvidence | None
    rows: tuple[LayerEvidence, ...]
    share: float
    notes: tuple[str, ...]


def gather(
    model: Any,
    anatomy: Anatomy,
    emergence: Emergence,
    prompts: Sequence[Prompt],
    mask: Mask | None = None,
    *,
    share: float = evidence.TOP_SHARE,
    progress: Progress = lambda _done: None,
) -> Evidence:
    """Everything the paper measures, on the prompts the ME Layer was located with.

    Args:
        model: as it is; it need not be in memory whole.
        anatomy: of its checkpoint.
        emergence: its votes say where each prompt's sink is.
        prompts: that it was located with.
        mask: of the first target layer; without one (no ME Layer) knock-outs and the mask's effect
            are left out.
        share: K / D of eq. 1.
        progress: called with the prompts done, `steps` in all.
    """
    sinks = [vote.position for vote in emergence.votes]
    parts = feed_forwards(model, anatomy, prompts[0].tokens)
    notes = describe_parts(parts)
    traces = trace_prompts(model, anatomy, parts, prompts, sinks, share, progress)
    states = np.stack([trace.states.astype(np.float64) for trace in traces], axis=1)
    similar = np.stack([evidence.cosines(layer) for layer in states])
    if len({prompt.tokens[: sink + 1] for prompt, sink in zip(prompts, sinks, strict=True)}) == 1:
        notes.append(
            "All prompts begin with the same tokens up to the sink, so its states are equal by "
            "construction; the cosine between inputs says nothing about this model."
        )
    layer = emergence.layer
    knocked: tuple[Knockout, ...] = ()
    if layer is not None:
        knocked = knock_out(model, anatomy, parts[layer], layer, traces, notes, progress)
    observed = observe_attention(model, anatomy, traces, mask, notes, progress)
    target = min(mask.layers) if mask is not None else None
    attended = attention_evidence(observed, anatomy.depth, layer, target, notes)
    logger.info("evidence of %d layers on %d prompts", anatomy.depth, len(prompts))
    return Evidence(
        feed_forwards=parts,
        traces=traces,
        cosines=similar,
        knockouts=knocked,
        attention=attended,
        mask=mask_effect(observed, mask),
        rows=_rows(traces, similar, knocked, attended),
        share=share,
        notes=tuple(notes),
    )


def steps(emergence: Emergence, prompts: Sequence[Prompt]) -> int:
    """How much progress `gather` reports at the most."""
    return len(prompts) * (2 if emergence.layer is None else 5)


def by_layer(traces: Sequence[PromptTrace], reduce: Callable[[PromptTrace], Array]) -> Array:
    """Median over the prompts of what `reduce` finds by layer, [layers]."""
    found: Array = np.median([reduce(trace) for trace in traces], axis=0)
    return found


def _rows(
    traces: Sequence[PromptTrace],
    similar: Array,
    knockouts: Sequence[Knockout],
    attended: AttentionEvidence | None,
) -> tuple[LayerEvidence, ...]:
    """The table by layer."""
    depth = len(traces[0].ffn_output)
    blank = np.full(depth, np.nan)

    def sink(name: str) -> Array:
        return by_layer(traces, lambda trace: getattr(trace, name)[:, trace.sink])

    def others(name: str) -> Array:
        return by_layer(traces, lambda trace: others_median(getattr(trace, name), trace.sink))

    def delta(name: str) -> Array:
        return by_layer(
            traces, lambda trace: evidence.sink_minus_others(getattr(trace, name), trace.sink)
        )

    left = {knockout.part: knockout.remaining for knockout in knockouts}
    columns = {
        "sink": sink("output")[1:],
        "others": others("output")[1:],
        "magnification": by_layer(
            traces, lambda trace: evidence.magnification(trace.output, trace.sink)
        ),
        "ffn_sink": sink("ffn_output"),
        "ffn_others": others("ffn_output"),
        "weight_norm_sink": sink("weight_norm"),
        "weight_norm_others": others("weight_norm"),
        "delta_fraction": delta("fraction"),
        "delta_kl": delta("divergence"),
        **{role: delta(role) for role in PROJECTIONS},
        "amplification": sink("amplification"),
        "cosine": np.array([evidence.pairwise(matrix).mean() for matrix in similar[1:]])
        if similar.shape[1] > 1
        else blank,
        "attention": mean_of(list(attended.to_sink.T)) if attended is not None else blank,
        "without_ffn": left.get("ffn", blank),
        "without_norm": left.get("norm", blank),
    }
    return tuple(
        LayerEvidence(layer=layer, **{name: float(v[layer]) for name, v in columns.items()})
        for layer in range(depth)
    )
