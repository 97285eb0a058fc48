"""The paper's mask as hooks on a loaded model: the reference for every fold.

The mask is carried by the call itself, as an extra keyword from the decoder through its layers to
attention, so there is no state that padding, caches or recomputation could make stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from surgery.anatomy import Anatomy
from surgery.errors import Unsupported
from surgery.mask import Mask
from surgery.observe import backbone, hooked

KEYWORD = "wemask_positions"


@contextmanager
def masked(model: Any, anatomy: Anatomy, mask: Mask, tokens: str = "first") -> Iterator[None]:
    """Mask the attention input of the target layers for the time of the block (eq. 5).

    tokens: "first" masks the first real token of each sequence, once, at prefill, under any
    padding, packing or cache: the paper's method. "all" masks every token: what the `norm` and
    `qkv` folds do. Raises Unsupported when a layer does not hand the mask on to attention.
    """
    reached: set[int] = set()
    handles = [
        backbone(model, anatomy).register_forward_pre_hook(
            _positions if tokens == "first" else _no_positions, with_kwargs=True
        )
    ]
    for found in anatomy.inputs:
        if found is None:
            continue
        attention = model.get_submodule(found.attention)
        edit = _edit(mask, found.layer, tokens, reached)
        handles.append(attention.register_forward_pre_hook(edit, with_kwargs=True))
    ran: list[bool] = []
    handles.append(backbone(model, anatomy).register_forward_hook(lambda *_: ran.append(True)))
    with hooked(handles):
        yield
    if ran and not reached.issuperset(mask.layers):
        raise Unsupported(
            f"{anatomy.model_type} does not pass the mask on to the attention of layer "
            f"{min(set(mask.layers) - reached)}, so there is no reference to compare with."
        )


def _no_positions(_module: Any, _args: tuple, _kwargs: dict) -> None:
    return None


def _positions(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, KEYWORD: first_real_token(args, kwargs)}


def first_real_token(args: tuple, kwargs: dict) -> torch.Tensor:
    """Where each sequence's first real token is among the tokens of this call, bool [B, T].

    In this order: a 2-D attention mask, which spans past and present under a cache; positions,
    where 0 begins a sequence (packing; generation that drops an all-ones mask); index 0 while the
    cache is empty.
    """
    states = kwargs.get("input_ids", args[0] if args else None)
    if states is None:
        states = kwargs["inputs_embeds"]
    batch, length = states.shape[:2]
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        real = attention_mask.to(states.device).bool()
        return (real & (real.long().cumsum(-1) == 1))[:, -length:]
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor):
        return (positions[..., -length:] == 0).to(states.device).expand(batch, length)
    first = torch.zeros(batch, length, dtype=torch.bool, device=states.device)
    cache = kwargs.get("past_key_values")
    first[:, 0] = cache is None or cache.get_seq_length() == 0
    return first


def _edit(
    mask: Mask, layer: int, tokens: str, reached: set[int]
) -> Callable[[Any, tuple, dict], tuple[tuple, dict]]:
    chosen = list(mask.dimensions.get(layer, ()))
    factors: dict[tuple[Any, torch.dtype], torch.Tensor] = {}

    def hook(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        positions = kwargs.pop(KEYWORD, None)
        if not chosen or (positions is None and tokens == "first"):
            return args, kwargs
        reached.add(layer)
        states = args[0] if args else kwargs["hidden_states"]
        factor = factors.get((states.device, states.dtype))
        if factor is None:
            factor = torch.ones(states.shape[-1], device=states.device, dtype=states.dtype)
            factor[chosen] = 1.0 - mask.strength
            factors[(states.device, states.dtype)] = factor
        edited = states * factor
        if positions is not None:
            edited = torch.where(positions.unsqueeze(-1), edited, states)
        if args:
            return (edited, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited}

    return hook
