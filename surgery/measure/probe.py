"""Running a model with hooks to gather the evidence for its Massive Emergence Layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.method import evidence
from surgery.method.locate import Emergence, agree, others_median
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.observe import (
    Progress,
    attention_input,
    backbone,
    decoder_layers,
    hidden,
    hooked,
    layer_norms,
    residual,
    to_numpy,
)
from surgery.models.reference import masked
from surgery.patient.texts import Prompt

Array = NDArray[np.float64]

# Attention weights grow with the square of the length; the pattern shows on short prompts.
ATTENTION_TOKENS = 64
HEATMAP_TOKENS = 32
# The sink's own norm needs no later tokens; these are there for another token to take over.
KNOCKOUT_TOKENS = 64
PROJECTIONS = ("gate", "up", "down")
# Children of an FFN by what they do; the second number is the half of a fused output.
_LAYOUTS: tuple[dict[str, tuple[str, int | None]], ...] = (
    {"gate": ("gate_proj", None), "up": ("up_proj", None), "down": ("down_proj", None)},
    {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", None)},
    {"gate": ("w1", None), "up": ("w3", None), "down": ("w2", None)},
    {"up": ("up_proj", None), "down": ("down_proj", None)},
    {"up": ("fc1", None), "down": ("fc2", None)},
    {"up": ("c_fc", None), "down": ("c_proj", None)},
    {"up": ("dense_h_to_4h", None), "down": ("dense_4h_to_h", None)},
)


@dataclass(frozen=True)
class FeedForward:
    """The FFN of one decoder layer, by paths inside that layer.

    norm: the norm whose output the FFN reads, None where it reads the residual stream. shared:
    attention reads that norm too. post_norm: the norm that reads the FFN's output, if any.
    projections: "gate", "up" and "down" as far as they exist: a path, and which half of its
    output.
    """

    module: str
    norm: str | None
    shared: bool
    post_norm: str | None
    projections: Mapping[str, tuple[str, int | None]]


@dataclass(frozen=True)
class PromptTrace:
    """What one prompt shows. Arrays are [layers, tokens], NaN where a layer has no such part.

    output: L2 norms, [layers + 1, tokens], the first row the input to layer 0. weight_norm,
    fraction, divergence: of the output of the norm before the FFN (§3.1). amplification: of the
    FFN. gate, up, down: projection concentration. states: the sink's hidden states,
    [layers + 1, D], float32.
    """

    prompt: Prompt
    sink: int
    output: Array
    ffn_output: Array
    weight_norm: Array
    fraction: Array
    divergence: Array
    amplification: Array
    gate: Array
    up: Array
    down: Array
    states: NDArray[np.float32]


@dataclass(frozen=True)
class Knockout:
    """What is left without one part of the ME Layer (Appendix B).

    norms: the sink's output norms, medians over the prompts, [layers]. remaining: their share of
    the intact model's, [layers]. emergence: the layer located in the model without that part.
    """

    part: str
    norms: Array
    remaining: Array
    emergence: int | None


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
    traces = _traces(model, anatomy, parts, prompts, sinks, share, progress)
    states = np.stack([trace.states.astype(np.float64) for trace in traces], axis=1)
    similar = np.stack([evidence.cosines(layer) for layer in states])
    if len({prompt.tokens[: sink + 1] for prompt, sink in zip(prompts, sinks, strict=True)}) == 1:
        notes.append(
            "All prompts begin with the same tokens up to the sink, so its states are equal by "
            "construction; the cosine between inputs says nothing about this model."
        )
    knocked: tuple[Knockout, ...] = ()
    if emergence.layer is not None:
        knocked = _knockouts(
            model, anatomy, parts[emergence.layer], emergence.layer, traces, notes, progress
        )
    attended, effect = _attention(model, anatomy, emergence, traces, mask, notes, progress)
    return Evidence(
        feed_forwards=parts,
        traces=traces,
        cosines=similar,
        knockouts=knocked,
        attention=attended,
        mask=effect,
        rows=_rows(traces, similar, knocked, attended),
        share=share,
        notes=tuple(notes),
    )


def steps(emergence: Emergence, prompts: Sequence[Prompt]) -> int:
    """How much progress `gather` reports at the most."""
    return len(prompts) * (2 if emergence.layer is None else 5)


# --------------------------------------------------------------------------------------------
# The parts of a decoder layer
# --------------------------------------------------------------------------------------------


def feed_forwards(
    model: Any, anatomy: Anatomy, tokens: Sequence[int]
) -> tuple[FeedForward | None, ...]:
    """The FFN of every decoder layer and the norms around it, found in one forward pass.

    The FFN is the child of the layer that holds matrices and is neither norm nor attention; its
    norm is the one whose output tensor it is called with. None where there is no one such child.
    """
    layers = decoder_layers(model, anatomy)
    names = [
        _ffn_name(layer, _attention_child(anatomy, index)) for index, layer in enumerate(layers)
    ]
    outputs: dict[int, list[tuple[str, torch.Tensor]]] = {index: [] for index in range(len(layers))}
    inputs: dict[int, list[tuple[str, torch.Tensor]]] = {index: [] for index in range(len(layers))}
    read: dict[int, torch.Tensor] = {}
    written: dict[int, torch.Tensor] = {}

    def norm_hook(index: int, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            inputs[index].append((name, _first_tensor(args, kwargs)))
            outputs[index].append((name, hidden(result)))

        return hook

    def ffn_hook(index: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            read[index] = _first_tensor(args, kwargs)
            written[index] = hidden(result)

        return hook

    handles = []
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if _is_norm(child):
                handles.append(
                    child.register_forward_hook(norm_hook(index, name), with_kwargs=True)
                )
        if names[index] is not None:
            module = layer.get_submodule(str(names[index]))
            handles.append(module.register_forward_hook(ffn_hook(index), with_kwargs=True))
    with hooked(handles):
        _forward(model, anatomy, tokens[:ATTENTION_TOKENS])
    found: list[FeedForward | None] = []
    for index, layer in enumerate(layers):
        module_name = names[index]
        if module_name is None or index not in read:
            found.append(None)
            continue
        norm = next((n for n, out in outputs[index] if _same(out, read[index])), None)
        post = next((n for n, into in inputs[index] if _same(into, written[index])), None)
        known = anatomy.inputs[index]
        shared = known is not None and norm is not None and known.norm.endswith(f".{norm}")
        found.append(
            FeedForward(
                module_name,
                norm,
                shared,
                post,
                _projections(layer.get_submodule(module_name), module_name),
            )
        )
    return tuple(found)


def _attention_child(anatomy: Anatomy, index: int) -> str:
    known = anatomy.inputs[index]
    prefix = f"{anatomy.layers_path}.{index}."
    return known.attention[len(prefix) :].partition(".")[0] if known is not None else ""


def _ffn_name(layer: torch.nn.Module, attention: str) -> str | None:
    names = [
        name
        for name, child in layer.named_children()
        if name != attention
        and not _is_norm(child)
        and not any(word in name for word in ("attn", "attention", "mixer", "mamba"))
        and any(parameter.dim() >= 2 for parameter in child.parameters())
    ]
    return names[0] if len(names) == 1 else None


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same tensor, or a view of all of it."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _first_tensor(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    return next(part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor))


def _projections(module: torch.nn.Module, path: str) -> Mapping[str, tuple[str, int | None]]:
    children = {name for name, _ in module.named_children()}
    for layout in _LAYOUTS:
        if all(name in children for name, _ in layout.values()):
            return {role: (f"{path}.{name}", half) for role, (name, half) in layout.items()}
    return {}


def describe_parts(parts: Sequence[FeedForward | None]) -> list[str]:
    """What cannot be measured on these layers, in sentences."""
    everywhere = range(len(parts))

    def where(wanted: Callable[[FeedForward], bool]) -> str:
        return _layer_words([i for i in everywhere if (p := parts[i]) and wanted(p)], len(parts))

    notes = []
    if absent := _layer_words([i for i in everywhere if parts[i] is None], len(parts)):
        notes.append(f"No single FFN module was found in {absent}.")
    if found := where(lambda part: part.norm is None):
        notes.append(
            f"No norm stands directly before the FFN in {found}: there is no WeightNorm, ΔFrac or "
            "ΔKL, and no norm to knock out."
        )
    if found := where(lambda part: part.shared):
        notes.append(
            f"FFN and attention read the same norm in {found}, so that norm cannot be knocked out "
            "for the FFN alone."
        )
    if found := where(lambda part: part.post_norm is not None):
        notes.append(
            f"Another norm follows the FFN in {found}; the FFN's output and amplification are "
            "taken before it, so they do not show what that norm adds."
        )
    if found := where(lambda part: not part.projections):
        notes.append(
            f"The FFN in {found} has no single gate, up and down projection (a mixture of "
            "experts, for example), so there is no projection concentration."
        )
    if found := where(lambda part: bool(part.projections) and "gate" not in part.projections):
        notes.append(f"The FFN in {found} has no gate: two projections, not three.")
    return notes


def _layer_words(layers: Sequence[int], depth: int) -> str:
    if len(layers) == depth:
        return "every layer"
    if not layers:
        return ""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(str(layer) for layer in layers)}"


# --------------------------------------------------------------------------------------------
# Norms, gains, projections
# --------------------------------------------------------------------------------------------


def _forward(model: Any, anatomy: Anatomy, tokens: Sequence[int], **options: Any) -> Any:
    device = next(model.parameters()).device
    ids = torch.tensor([list(tokens)], device=device)
    with torch.inference_mode():
        return backbone(model, anatomy)(input_ids=ids, **{"use_cache": False, **options})


def _numpy(values: torch.Tensor) -> Array:
    found: Array = values.detach().float().cpu().numpy().astype(np.float64)
    return found


def _flat(states: torch.Tensor) -> NDArray:
    """States of the one sequence in the batch, [tokens, width]."""
    return to_numpy(residual(states)).reshape(-1, states.shape[-1])


def effective_gain(norm: torch.nn.Module, null_gain: float) -> torch.Tensor | None:
    """What a norm multiplies by, [D], float32 or wider; None where it has no gain."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) - null_gain


class _Recorder:
    """Fills the arrays of one prompt at a time from hooks on every layer."""

    def __init__(
        self, model: Any, anatomy: Anatomy, parts: Sequence[FeedForward | None], share: float
    ) -> None:
        self._depth = anatomy.depth
        self._share = share
        self.handles: list[Any] = []
        self.states: list[NDArray[np.float32]] = []
        layers = decoder_layers(model, anatomy)
        self.handles.append(layers[0].register_forward_pre_hook(self._first, with_kwargs=True))
        for index, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            self.handles.append(layer.register_forward_hook(self._output))
            if part is None:
                continue
            ffn = layer.get_submodule(part.module)
            self.handles.append(ffn.register_forward_hook(self._ffn(index), with_kwargs=True))
            if part.norm is not None:
                norm = layer.get_submodule(part.norm)
                gain = effective_gain(norm, anatomy.null_gain)
                known = to_numpy(gain) if gain is not None else None
                self.handles.append(norm.register_forward_hook(self._norm(index, known)))
            for role, (path, half) in part.projections.items():
                linear = layer.get_submodule(path)
                self.handles.append(
                    linear.register_forward_hook(self._projection(index, role, half))
                )

    def begin(self, tokens: int, sink: int) -> None:
        """Forget the last prompt."""
        self._sink = sink
        self.states.clear()
        self.norms: list[Array] = []
        self.arrays = {
            name: np.full((self._depth, tokens), np.nan)
            for name in (
                *("ffn_output", "weight_norm", "fraction", "divergence", "amplification"),
                *PROJECTIONS,
            )
        }

    def _keep(self, states: torch.Tensor) -> None:
        flat = _flat(states)
        self.norms.append(evidence.token_norms(flat).astype(np.float64))
        self.states.append(flat[self._sink].astype(np.float32))

    def _first(self, _module: Any, args: tuple, kwargs: dict) -> None:
        self._keep(attention_input(args, kwargs))

    def _output(self, _module: Any, _args: Any, result: Any) -> None:
        self._keep(hidden(result))

    def _ffn(self, index: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            before, after = _flat(_first_tensor(args, kwargs)), _flat(hidden(result))
            self.arrays["ffn_output"][index] = evidence.token_norms(after)
            self.arrays["amplification"][index] = evidence.amplification(before, after)

        return hook

    def _norm(self, index: int, gain: NDArray | None) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: Any) -> None:
            states = _flat(hidden(result))
            self.arrays["weight_norm"][index] = evidence.token_norms(states)
            if gain is not None:
                fraction = evidence.top_gain_fraction(states, gain, self._share)
                self.arrays["fraction"][index] = fraction
                self.arrays["divergence"][index] = evidence.gain_divergence(states, gain)

        return hook

    def _projection(self, index: int, role: str, half: int | None) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: torch.Tensor) -> None:
            states = _flat(result)
            if half is not None:
                states = np.split(states, 2, axis=-1)[half]
            self.arrays[role][index] = evidence.concentration(states)

        return hook


def _traces(
    model: Any,
    anatomy: Anatomy,
    parts: Sequence[FeedForward | None],
    prompts: Sequence[Prompt],
    sinks: Sequence[int],
    share: float,
    progress: Progress,
) -> tuple[PromptTrace, ...]:
    recorder = _Recorder(model, anatomy, parts, share)
    found = []
    with hooked(recorder.handles):
        for prompt, sink in zip(prompts, sinks, strict=True):
            recorder.begin(len(prompt.tokens), sink)
            _forward(model, anatomy, prompt.tokens)
            found.append(
                PromptTrace(
                    prompt=prompt,
                    sink=sink,
                    output=np.stack(recorder.norms),
                    states=np.stack(recorder.states),
                    **recorder.arrays,
                )
            )
            progress(1)
    return tuple(found)


# --------------------------------------------------------------------------------------------
# Knock-outs
# --------------------------------------------------------------------------------------------


def _knockouts(
    model: Any,
    anatomy: Anatomy,
    part: FeedForward | None,
    layer: int,
    traces: Sequence[PromptTrace],
    notes: list[str],
    progress: Progress,
) -> tuple[Knockout, ...]:
    usable = [trace for trace in traces if trace.sink < KNOCKOUT_TOKENS]
    if part is None or not usable:
        return ()
    module = decoder_layers(model, anatomy)[layer]
    intact = np.stack([trace.output[1:, trace.sink] for trace in usable])
    cut = [trace.prompt.tokens[:KNOCKOUT_TOKENS] for trace in usable]
    chosen: list[tuple[str, torch.nn.Module, Callable[..., Any]]] = [
        ("ffn", module.get_submodule(part.module), _silence)
    ]
    if part.norm is not None and not part.shared:
        chosen.append(("norm", module.get_submodule(part.norm), _pass_through))
    found = []
    for name, target, replacement in chosen:
        with hooked([target.register_forward_hook(replacement, with_kwargs=True)]):
            norms = layer_norms(model, anatomy, cut, progress)
        if not all(np.isfinite(rows).all() for rows in norms):
            notes.append(f"Without the ME Layer's {name} the model overflows in this dtype.")
            continue
        left = np.stack([rows[1:, trace.sink] for rows, trace in zip(norms, usable, strict=True)])
        found.append(
            Knockout(
                part=name,
                norms=np.median(left, axis=0),
                remaining=np.median(evidence.remaining(left, intact), axis=0),
                emergence=agree(norms).layer,
            )
        )
    return tuple(found)


def _silence(_module: Any, _args: tuple, _kwargs: dict, result: Any) -> Any:
    zeros = torch.zeros_like(hidden(result))
    return zeros if isinstance(result, torch.Tensor) else (zeros, *result[1:])


def _pass_through(_module: Any, args: tuple, kwargs: dict, _result: Any) -> Any:
    return _first_tensor(args, kwargs)


# --------------------------------------------------------------------------------------------
# Attention and the mask
# --------------------------------------------------------------------------------------------


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
                found.inputs = _numpy(attention_input(args, kwargs)[0, sink])
            weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                found.weights[layer] = _numpy(weights[0])

        return hook

    handles = [
        model.get_submodule(known.attention).register_forward_hook(
            keep(known.layer), with_kwargs=True
        )
        for known in anatomy.inputs
        if known is not None
    ]
    with hooked(handles):
        result = _forward(model, anatomy, tokens, use_cache=target is not None)
    found.cache = getattr(result, "past_key_values", None)
    return found


def _sink_entry(cache: Any, layer: int, which: str, sink: int) -> Array | None:
    """The sink's key or value in a cache, all heads in one vector; None where there is none."""
    layers = getattr(cache, "layers", None) or ()
    entry = getattr(layers[layer], which, None) if layer < len(layers) else None
    if not isinstance(entry, torch.Tensor) or entry.dim() != 4 or entry.shape[2] <= sink:
        return None
    return _numpy(entry[0, :, sink]).reshape(-1)


def _attention(
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
        _to_sink(run, sink, anatomy.depth) for run, (*_, sink) in zip(before, usable, strict=True)
    ]
    to_sink_masked = [_to_sink(run, 0, anatomy.depth) for run in after if run is not None]
    shown = next(
        (i for i, (_, tokens, _) in enumerate(usable) if len(tokens) >= HEATMAP_TOKENS),
        max(range(len(usable)), key=lambda i: len(usable[i][1])),
    )
    return (
        AttentionEvidence(
            to_sink=_mean(to_sink),
            to_sink_masked=_mean(to_sink_masked) if to_sink_masked else None,
            heatmaps=_heatmaps(before[shown], after[shown], emergence.layer, target),
            prompt=usable[shown][0],
        ),
        effect,
    )


def _to_sink(run: _Attention, sink: int, depth: int) -> Array:
    heads = max(weights.shape[0] for weights in run.weights.values())
    found = np.full((depth, heads), np.nan)
    for layer, weights in run.weights.items():
        found[layer, : weights.shape[0]] = evidence.attention_to_sink(weights, sink)
    return found


def _mean(values: Sequence[Any]) -> Any:
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


# --------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------


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
        "attention": _mean(list(attended.to_sink.T)) if attended is not None else blank,
        "without_ffn": left.get("ffn", blank),
        "without_norm": left.get("norm", blank),
    }
    return tuple(
        LayerEvidence(layer=layer, **{name: float(v[layer]) for name, v in columns.items()})
        for layer in range(depth)
    )
