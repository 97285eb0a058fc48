"""The FFN of every decoder layer and the norms around it, found in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.models.anatomy import Anatomy
from surgery.models.discovery import decoder_layers, feed_forward_names, is_norm
from surgery.models.observe import first_tensor, hidden, hooked, run

# Tokens of the one prompt that the parts are found with.
TOKENS = 64
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


def feed_forwards(
    model: Any, anatomy: Anatomy, tokens: Sequence[int]
) -> tuple[FeedForward | None, ...]:
    """The FFN of every decoder layer and the norms around it, found in one forward pass.

    The FFN is the child of the layer that holds matrices and is neither norm nor attention; its
    norm is the one whose output tensor it is called with. None where there is no one such child.
    """
    layers = decoder_layers(model, anatomy)
    names = feed_forward_names(model, anatomy)
    outputs: dict[int, list[tuple[str, torch.Tensor]]] = {index: [] for index in range(len(layers))}
    inputs: dict[int, list[tuple[str, torch.Tensor]]] = {index: [] for index in range(len(layers))}
    read: dict[int, torch.Tensor] = {}
    written: dict[int, torch.Tensor] = {}

    def norm_hook(index: int, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            inputs[index].append((name, first_tensor(args, kwargs)))
            outputs[index].append((name, hidden(result)))

        return hook

    def ffn_hook(index: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            read[index] = first_tensor(args, kwargs)
            written[index] = hidden(result)

        return hook

    handles = []
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if is_norm(child):
                handles.append(
                    child.register_forward_hook(norm_hook(index, name), with_kwargs=True)
                )
        if names[index] is not None:
            module = layer.get_submodule(str(names[index]))
            handles.append(module.register_forward_hook(ffn_hook(index), with_kwargs=True))
    with hooked(handles):
        run(model, anatomy, tokens[:TOKENS])
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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same tensor, or a view of all of it."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


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
