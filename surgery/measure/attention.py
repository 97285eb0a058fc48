"""Attention on the sink, before and under the mask (§6)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import SurgeryError, first_line
from surgery.measure.logits import Context
from surgery.measure.traces import PromptTrace
from surgery.method import evidence
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.masking import wemask
from surgery.models.observe import Progress, attention_input, hooked, run, to_numpy

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
# Attention weights grow with the square of the length; the pattern shows on short prompts.
ATTENTION_TOKENS = 64
HEATMAP_TOKENS = 32
# What remote code may raise that offers no eager attention, or doesn't pass a mask on.
_UNABLE = (SurgeryError, ValueError, ImportError, AttributeError)


@dataclass
class Attention:
    """What one prompt's attention did.

    Attributes:
        weights: attention probabilities by layer, [heads, queries, keys].
        inputs: the target layer's attention input at the sink, [D]; None without a target.
        cache: keys and values by layer; None without a target.
    """

    weights: dict[int, Array]
    inputs: Array | None = None
    cache: Any = None


@dataclass(frozen=True)
class Attended:
    """Attention on one prompt, as the model is and under the mask.

    Attributes:
        prompt: its number.
        sink: position of the sink.
        tokens: that were looked at.
        before: attention of the model as it is.
        after: under the mask; None without a mask, and where it does not reach the sink.
    """

    prompt: int
    sink: int
    tokens: int
    before: Attention
    after: Attention | None


@dataclass(frozen=True)
class AttentionEvidence:
    """Attention on the sink, before and under the mask (§6).

    Attributes:
        to_sink: share by layer and head, means over the prompts, [layers, heads].
        to_sink_masked: the same under the mask; None where there is none.
        heatmaps: title to attention weights, mean over the heads, [tokens, tokens].
        prompt: number of the prompt that the heatmaps are of.
    """

    to_sink: Array
    to_sink_masked: Array | None
    heatmaps: Mapping[str, Array]
    prompt: int


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention that gives its weights, for the time of the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    model: Any,
    anatomy: Anatomy,
    tokens: Sequence[int],
    sink: int = 0,
    target: int | None = None,
) -> Attention:
    """Attention weights of every layer that gives some, on one prompt.

    Args:
        model: attending eagerly.
        anatomy: of its checkpoint.
        tokens: ids of the prompt.
        sink: position of the sink.
        target: the layer whose attention input is kept, and the cache with it.
    """
    found = Attention({})

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            if layer == target:
                found.inputs = _double(attention_input(args, kwargs)[0, sink])
            weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                found.weights[layer] = _double(weights[0])

        return hook

    handles = [
        model.get_submodule(known.attention).register_forward_hook(
            keep(known.layer), with_kwargs=True
        )
        for known in anatomy.inputs
        if known is not None
    ]
    with hooked(handles):
        result = run(model, anatomy, tokens, use_cache=target is not None)
    found.cache = getattr(result, "past_key_values", None)
    return found


def _double(values: torch.Tensor) -> Array:
    """Values in float64, in which the means of what follows are taken."""
    return to_numpy(values).astype(np.float64)


def observe_attention(
    model: Any,
    anatomy: Anatomy,
    traces: Sequence[PromptTrace],
    mask: Mask | None,
    notes: list[str],
    progress: Progress,
) -> list[Attended]:
    """Attention on every prompt that tokens follow the sink in.

    Args:
        model: as it is.
        anatomy: of its checkpoint.
        traces: say where each prompt's sink is.
        mask: of the first target layer.
        notes: of what could not be measured; more are put there.
        progress: called with 1 after each forward pass.

    Returns:
        What was observed; nothing where the model cannot attend eagerly.
    """
    usable = [
        (index, trace.prompt.tokens[:ATTENTION_TOKENS], trace.sink)
        for index, trace in enumerate(traces)
        if trace.sink < min(ATTENTION_TOKENS, len(trace.prompt.tokens)) - 1
    ]
    if mask is not None and any(sink for _, _, sink in usable):
        notes.append(
            "The paper's mask reaches the first token; prompts whose sink stands elsewhere are "
            "left out of the mask's effect."
        )
    target = min(mask.layers) if mask is not None else None
    found: list[Attended] = []
    try:
        with eager_attention(model):
            for index, tokens, sink in usable:
                before = attend(model, anatomy, tokens, sink, target)
                after: Attention | None = None
                progress(1)
                if mask is not None and sink == 0:
                    with wemask(model, mask, anatomy=anatomy):
                        after = attend(model, anatomy, tokens, sink, target)
                    progress(1)
                found.append(Attended(index, sink, len(tokens), before, after))
    except _UNABLE as error:
        notes.append(f"Attention could not be observed: {first_line(error)}")
        return []
    logger.debug("attention on %d prompts", len(found))
    return found


def attention_evidence(
    observed: Sequence[Attended],
    depth: int,
    layer: int | None,
    target: int | None,
    notes: list[str],
) -> AttentionEvidence | None:
    """Attention on the sink by layer and head; None where the model gives no weights.

    Args:
        observed: by prompt.
        depth: layers of the model.
        layer: the ME Layer.
        target: the first masked layer.
        notes: of what could not be measured; one more is put there.
    """
    if not observed:
        return None
    if not any(one.before.weights for one in observed):
        notes.append(
            "This model's attention gives no weights, so attention on the sink is unknown."
        )
        return None
    masked = [_to_sink(one.after, 0, depth) for one in observed if one.after is not None]
    # The first prompt that fills a heatmap, else the longest.
    shown = next(
        (one for one in observed if one.tokens >= HEATMAP_TOKENS),
        max(observed, key=lambda one: one.tokens),
    )
    return AttentionEvidence(
        to_sink=mean_of([_to_sink(one.before, one.sink, depth) for one in observed]),
        to_sink_masked=mean_of(masked) if masked else None,
        heatmaps=_heatmaps(shown, layer, target),
        prompt=shown.prompt,
    )


def _to_sink(attention: Attention, sink: int, depth: int) -> Array:
    """Attention on the sink, [layers, heads]; NaN where there is no such layer or head."""
    heads = max(weights.shape[0] for weights in attention.weights.values())
    found = np.full((depth, heads), np.nan)
    for layer, weights in attention.weights.items():
        found[layer, : weights.shape[0]] = evidence.attention_to_sink(weights, sink)
    return found


def mean_of(values: Sequence[Any]) -> Any:
    """Mean over the prompts, of what is a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a place without any number stays NaN
        return np.nanmean(np.stack(values), axis=0)


def _heatmaps(shown: Attended, layer: int | None, target: int | None) -> dict[str, Array]:
    before = shown.before.weights
    chosen: dict[str, Array] = {}
    if layer is not None and layer in before:
        chosen[f"ME Layer {layer}"] = before[layer]
    if target is not None and target in before:
        chosen[f"layer {target}"] = before[target]
        if shown.after is not None:
            chosen[f"layer {target}, masked"] = shown.after.weights[target]
    return {
        title: weights.mean(0)[:HEATMAP_TOKENS, :HEATMAP_TOKENS]
        for title, weights in chosen.items()
    }


def sink_attention(
    model: Any, anatomy: Anatomy, sequences: Sequence[Sequence[int]], context: Context
) -> tuple[float | None, ...] | None:
    """Mean attention probability that later tokens give the first one, by layer (§6, Fig. 7).

    Args:
        model: as it is.
        anatomy: of its checkpoint.
        sequences: token ids, short ones.
        context: within which the model runs.

    Returns:
        Per layer, over heads, query tokens and sequences; None for a layer without attention
        weights, and None altogether where the model cannot attend eagerly.
    """
    shares: dict[int, list[float]] = {}
    try:
        with eager_attention(model), context():
            for sequence in sequences:
                for layer, weights in attend(model, anatomy, sequence).weights.items():
                    share = float(evidence.attention_to_sink(weights, 0).mean())
                    shares.setdefault(layer, []).append(share)
    except _UNABLE:
        return None
    if not shares:
        return None
    means = {layer: sum(found) / len(found) for layer, found in shares.items()}
    return tuple(means.get(layer) for layer in range(anatomy.depth))
