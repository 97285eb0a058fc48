"""All that the paper measures to explain an ME Layer, on the prompts it was located with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.measure.attention import AttentionEvidence, MaskEvidence, mean_of, observe_attention
from surgery.measure.feed_forward import FeedForward, describe_parts, feed_forwards
from surgery.measure.knockouts import Knockout, knock_out
from surgery.measure.traces import PROJECTIONS, PromptTrace, trace_prompts
from surgery.method import evidence
from surgery.method.locate import Emergence, others_median
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.observe import (
    Progress,
)
from surgery.patient.texts import Prompt

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerEvidence:
    """One line of the table by layer: medians over the prompts, NaN where nothing was measured.

    sink, others: L2 norms of the layer's output (others: median token). magnification: against
    the layer before. ffn_*, weight_norm_*: likewise of the FFN's output and of the output of the
    norm before it. delta_fraction, delta_kl: eq. 1 and 2. gate, up, down: eq. 3, sink minus
    others. amplification: of the FFN for the sink. cosine: mean over the pairs of inputs.
    attention: share on the sink, mean over the heads. without_ffn, without_norm: share of the
    sink's norm that is left.
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
    """All that was gathered. notes: what could not be measured on this model, and why.

    cosines: between the inputs' sink states, [layers + 1, inputs, inputs]. share: K / D of eq. 1.
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

    emergence: its votes say where each prompt's sink is. mask: of the first target layer; without
    one (no ME Layer) knock-outs and the mask's effect are left out. progress: called with the
    prompts done, `steps` in all.
    """
    notes: list[str] = []
    sinks = [vote.position for vote in emergence.votes]
    parts = feed_forwards(model, anatomy, prompts[0].tokens)
    notes += describe_parts(parts)
    traces = trace_prompts(model, anatomy, parts, prompts, sinks, share, progress)
    states = np.stack([trace.states.astype(np.float64) for trace in traces], axis=1)
    similar = np.stack([evidence.cosines(layer) for layer in states])
    if len({prompt.tokens[: sink + 1] for prompt, sink in zip(prompts, sinks, strict=True)}) == 1:
        notes.append(
            "All prompts begin with the same tokens up to the sink, so its states are equal by "
            "construction; the cosine between inputs says nothing about this model."
        )
    knocked: tuple[Knockout, ...] = ()
    if emergence.layer is not None:
        knocked = knock_out(
            model, anatomy, parts[emergence.layer], emergence.layer, traces, notes, progress
        )
    attended, effect = observe_attention(model, anatomy, emergence, traces, mask, notes, progress)
    return Evidence(
        feed_forwards=parts,
        traces=traces,
        cosines=similar,
        knockouts=knocked,
        attention=attended,
        mask=effect,
        rows=rows_by_layer(traces, similar, knocked, attended),
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


def rows_by_layer(
    traces: Sequence[PromptTrace],
    similar: Array,
    knockouts: Sequence[Knockout],
    attended: AttentionEvidence | None,
) -> tuple[LayerEvidence, ...]:
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
