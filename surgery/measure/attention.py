"""Attention on the sink, before and under the mask (§6)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.measure.traces import PromptTrace
from surgery.method import evidence
from surgery.method.locate import Emergence
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import backbone
from surgery.models.masking import masked
from surgery.models.observe import Progress, attention_input, hooked, run, to_numpy

Array = NDArray[np.float64]
# Attention weights grow with the square of the length; the pattern shows on short prompts.
ATTENTION_TOKENS = 64
HEATMAP_TOKENS = 32

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class AttentionEvidence:
    """Attention on the sink, before and under the mask (§6).

    to_sink, to_sink_masked: share by layer and head, means over the prompts, [layers, heads].
    heatmaps: title to attention weights, mean over the heads, [tokens, tokens].
    """

    to_sink: Array
    to_sink_masked: Array | None
    heatmaps: Mapping[str, Array]
    prompt: int


@dataclass(frozen=True)
class MaskEvidence:
    """What the mask does to the sink at the first target layer (§4), means over the prompts.

    energy: share of its attention input's energy in S. cosine: of that input before and after.
    key, value: relative change of what attention keeps of the sink. to_sink, entropy (nats):
    attention of later tokens at that layer, before and after. inputs: |attention input| of the
    sink in the first prompt, [D].
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


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention that gives its weights, for the time of the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass
class _Attention:
    """One prompt's attention weights by layer, [heads, queries, keys], and what a target reads.

    inputs: the target's attention input at the sink, [D]. cache: keys and values by layer.
    """

    weights: dict[int, Array]
    inputs: Array | None
    cache: Any


def _attend(
    model: Any, anatomy: Anatomy, tokens: Sequence[int], sink: int, target: int | None
) -> _Attention:
    found = _Attention({}, None, None)

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            if layer == target:
                found.inputs = to_numpy(attention_input(args, kwargs)[0, sink])
            weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                found.weights[layer] = to_numpy(weights[0])

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


def _sink_entry(cache: Any, layer: int, which: str, sink: int) -> Array | None:
    """The sink's key or value in a cache, all heads in one vector; None where there is none."""
    layers = getattr(cache, "layers", None) or ()
    entry = getattr(layers[layer], which, None) if layer < len(layers) else None
    if not isinstance(entry, torch.Tensor) or entry.dim() != 4 or entry.shape[2] <= sink:
        return None
    return to_numpy(entry[0, :, sink]).reshape(-1)


def observe_attention(
    model: Any,
    anatomy: Anatomy,
    emergence: Emergence,
    traces: Sequence[PromptTrace],
    mask: Mask | None,
    notes: list[str],
    progress: Progress,
) -> tuple[AttentionEvidence | None, MaskEvidence | None]:
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
    before: list[_Attention] = []
    after: list[_Attention | None] = []
    try:
        with eager_attention(model):
            for _, tokens, sink in usable:
                before.append(_attend(model, anatomy, tokens, sink, target))
                progress(1)
                if mask is None or sink != 0:
                    after.append(None)
                    continue
                with masked(model, anatomy, mask):
                    after.append(_attend(model, anatomy, tokens, sink, target))
                progress(1)
    except (SurgeryError, ValueError, ImportError, AttributeError) as error:
        # Remote code need not offer eager attention, nor pass the mask on.
        notes.append(f"Attention could not be observed: {str(error).splitlines()[0]}")
        return None, None
    if not before:
        return None, None
    effect = _mask_effect(before, after, [sink for *_, sink in usable], mask)
    if not any(run.weights for run in before):
        notes.append(
            "This model's attention gives no weights, so attention on the sink is unknown."
        )
        return None, effect
    to_sink = [
        to_sink_by_head(run, sink, anatomy.depth)
        for run, (*_, sink) in zip(before, usable, strict=True)
    ]
    to_sink_masked = [to_sink_by_head(run, 0, anatomy.depth) for run in after if run is not None]
    shown = next(
        (i for i, (_, tokens, _) in enumerate(usable) if len(tokens) >= HEATMAP_TOKENS),
        max(range(len(usable)), key=lambda i: len(usable[i][1])),
    )
    return (
        AttentionEvidence(
            to_sink=mean_of(to_sink),
            to_sink_masked=mean_of(to_sink_masked) if to_sink_masked else None,
            heatmaps=_heatmaps(before[shown], after[shown], emergence.layer, target),
            prompt=usable[shown][0],
        ),
        effect,
    )


def to_sink_by_head(run: _Attention, sink: int, depth: int) -> Array:
    heads = max(weights.shape[0] for weights in run.weights.values())
    found = np.full((depth, heads), np.nan)
    for layer, weights in run.weights.items():
        found[layer, : weights.shape[0]] = evidence.attention_to_sink(weights, sink)
    return found


def mean_of(values: Sequence[Any]) -> Any:
    """Mean over the prompts, of what is a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a place without any number stays NaN
        return np.nanmean(np.stack(values), axis=0)


def _heatmaps(
    before: _Attention, after: _Attention | None, layer: int | None, target: int | None
) -> dict[str, Array]:
    chosen = []
    if layer is not None and layer in before.weights:
        chosen.append((f"ME Layer {layer}", before.weights[layer]))
    if target is not None and target in before.weights:
        chosen.append((f"layer {target}", before.weights[target]))
        if after is not None:
            chosen.append((f"layer {target}, masked", after.weights[target]))
    return {title: weights.mean(0)[:HEATMAP_TOKENS, :HEATMAP_TOKENS] for title, weights in chosen}


def _mask_effect(
    before: Sequence[_Attention],
    after: Sequence[_Attention | None],
    sinks: Sequence[int],
    mask: Mask | None,
) -> MaskEvidence | None:
    pairs = [
        (plain, edited)
        for plain, edited, sink in zip(before, after, sinks, strict=True)
        if edited is not None and sink == 0
    ]
    if mask is None or not pairs or pairs[0][0].inputs is None:
        return None
    layer = min(mask.layers)
    chosen = mask.dimensions[layer]
    inputs = [plain.inputs for plain, _ in pairs if plain.inputs is not None]
    factor = np.ones(mask.hidden_size)
    factor[list(chosen)] = 1.0 - mask.strength

    def change(which: str) -> float | None:
        entries = [
            (
                _sink_entry(plain.cache, layer, which, 0),
                _sink_entry(edited.cache, layer, which, 0),
            )
            for plain, edited in pairs
        ]
        changes = [
            evidence.relative_change(one, other)
            for one, other in entries
            if one is not None and other is not None
        ]
        return float(np.mean(changes)) if changes else None

    def both(measure: Callable[[Array, int], Array]) -> tuple[float, float] | None:
        if any(layer not in run.weights for pair in pairs for run in pair):
            return None
        means = [[float(measure(run.weights[layer], 0).mean()) for run in pair] for pair in pairs]
        first, second = np.mean(means, axis=0)
        return float(first), float(second)

    return MaskEvidence(
        layer=layer,
        dimensions=tuple(chosen),
        energy=float(np.mean([evidence.masked_share(x, chosen) for x in inputs])),
        cosine=float(np.mean([evidence.cosine(x, x * factor) for x in inputs])),
        key=change("keys"),
        value=change("values"),
        to_sink=both(evidence.attention_to_sink),
        entropy=both(evidence.attention_entropy),
        inputs=np.abs(inputs[0]),
    )


def sink_attention(
    model: Any, anatomy: Anatomy, sequences: Sequence[Sequence[int]], context: Context
) -> tuple[float | None, ...] | None:
    """Mean attention probability that later tokens give the first one, by layer.

    Over heads, query tokens and sequences; None for a layer without attention weights, and None
    altogether where the model cannot attend eagerly. Source: §6 and Fig. 7 of the paper.
    """
    import torch

    from surgery.measure.attention import eager_attention
    from surgery.models.observe import hooked

    sums: dict[int, list[float]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: Any) -> None:
            weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                sums.setdefault(layer, []).append(float(weights[0, :, 1:, 0].double().mean()))

        return hook

    device = next(model.parameters()).device
    try:
        with eager_attention(model), context(), torch.inference_mode():
            handles = [
                model.get_submodule(known.attention).register_forward_hook(keep(known.layer))
                for known in anatomy.inputs
                if known is not None
            ]
            with hooked(handles):
                for sequence in sequences:
                    tokens = torch.tensor([list(sequence)], device=device)
                    backbone(model, anatomy)(input_ids=tokens, use_cache=False)
    except (SurgeryError, ValueError, ImportError, AttributeError):
        return None  # remote code need not offer eager attention
    if not sums:
        return None
    means = {layer: sum(found) / len(found) for layer, found in sums.items()}
    return tuple(means.get(layer) for layer in range(anatomy.depth))
