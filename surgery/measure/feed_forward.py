"""The FFN of every decoder layer and the norms around it, found in one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from surgery.models.anatomy import Anatomy
from surgery.models.discovery import decoder_layers, feed_forward_names, is_norm
from surgery.models.observe import first_tensor, hidden, hooked, run

logger = logging.getLogger(__name__)

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

    Attributes:
        module: the FFN.
        norm: the norm whose output the FFN reads; None where it reads the residual stream.
        shared: whether attention reads that norm too.
        post_norm: the norm that reads the FFN's output, if any.
        projections: "gate", "up" and "down" as far as they exist: a path, and which half of its
            output.
    """

    module: str
    norm: str | None
    shared: bool
    post_norm: str | None
    projections: Mapping[str, tuple[str, int | None]]


class _Seen:
    """What the norms and the FFN of one layer were called with and gave, in one forward pass.

    Attributes:
        handles: the hooks.
        ffn: what the FFN read and wrote; None until it has run.
        norms: by name, what each norm read and wrote.
    """

    def __init__(self, layer: torch.nn.Module, ffn: str | None) -> None:
        self.ffn: tuple[torch.Tensor, torch.Tensor] | None = None
        self.norms: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        watched = [(name, child) for name, child in layer.named_children() if is_norm(child)]
        self.handles = [
            child.register_forward_hook(partial(self._norm, name), with_kwargs=True)
            for name, child in watched
        ]
        if ffn is not None:
            module = layer.get_submodule(ffn)
            self.handles.append(module.register_forward_hook(self._ffn, with_kwargs=True))

    def _norm(self, name: str, _module: Any, args: tuple, kwargs: dict, result: Any) -> None:
        self.norms.append((name, first_tensor(args, kwargs), hidden(result)))

    def _ffn(self, _module: Any, args: tuple, kwargs: dict, result: Any) -> None:
        self.ffn = first_tensor(args, kwargs), hidden(result)


def feed_forwards(
    model: Any, anatomy: Anatomy, tokens: Sequence[int]
) -> tuple[FeedForward | None, ...]:
    """The FFN of every decoder layer and the norms around it, found in one forward pass.

    The norm before the FFN is the one whose output tensor the FFN is called with, the norm after it
    the one that is called with the FFN's.

    Args:
        model: as it is.
        anatomy: of its checkpoint.
        tokens: ids of a prompt.

    Returns:
        Per layer; None where there is no single FFN.
    """
    layers, names = decoder_layers(model, anatomy), feed_forward_names(model, anatomy)
    seen = [_Seen(layer, name) for layer, name in zip(layers, names, strict=True)]
    with hooked([handle for one in seen for handle in one.handles]):
        run(model, anatomy, tokens[:TOKENS])
    found: list[FeedForward | None] = []
    for layer, name, one, known in zip(layers, names, seen, anatomy.inputs, strict=True):
        if name is None or one.ffn is None:
            found.append(None)
            continue
        read, written = one.ffn
        norm = next((n for n, _, gave in one.norms if _same(gave, read)), None)
        post = next((n for n, took, _ in one.norms if _same(took, written)), None)
        shared = known is not None and norm is not None and known.norm.endswith(f".{norm}")
        parts = _projections(layer.get_submodule(name), name)
        found.append(FeedForward(name, norm, shared, post, parts))
    logger.debug("the FFN of %d of %d layers", sum(one is not None for one in found), len(found))
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
