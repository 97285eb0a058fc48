"""WeMask as a context manager: `with wemask(model, mask): …` around training, scoring, generating.

The mask is carried by the call itself, as an extra keyword from the decoder through its layers to
attention, so there is no state that padding, packing, caches, activation checkpointing or another
rank could make stale. For the few families whose layers hand no keywords on, it is kept for the
time of the decoder's call, and activation checkpointing is refused. Works on a causal language
model of transformers as it is, inside PEFT, and inside DistributedDataParallel, FSDP and FSDP2.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from surgery.errors import BadSettings, Unsupported
from surgery.method.mask import TOKENS, Mask, attention_targets, largest, mask_size
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import Decoder, decoder_of
from surgery.models.families import family_of
from surgery.models.ground import Ground
from surgery.models.journey import Stream
from surgery.models.observe import attention_input, hooked

logger = logging.getLogger(__name__)

KEYWORD = "wemask_positions"

# Called before each edit with the layer, the attention input [B, T, D] as attention would have
# read it, and where the first real tokens are, bool [B, T] or None.
Watch = Callable[[int, torch.Tensor, "torch.Tensor | None"], None]


@contextmanager
def wemask(
    model: Any,
    mask: Mask,
    tokens: str = "first",
    *,
    anatomy: Anatomy | None = None,
    watch: Watch | None = None,
) -> Iterator[None]:
    """Mask the attention input of the target layers for the time of the block (eq. 5).

    Enter the block before a trainer is constructed and leave it after the last evaluation, so that
    reference log-probabilities and first evaluations are masked too. vLLM runs no hooks; fold
    before generating with it. Gradients flow as if x had been multiplied by 1 - γ in S.

    Args:
        model: a causal language model of transformers, also wrapped.
        mask: S of each target layer, and γ.
        tokens: "first" masks the first real token of each sequence, once, at prefill, under left
            or right padding, packing, or a cache: the paper's method. "every" masks every token:
            what the `norm` and `qkv` folds do.
        anatomy: where attention lies, for families that the table does not know
            (`surgery.analyze` finds it by tracing).
        watch: sees each attention input before it is edited.

    Raises:
        BadSettings: for a mask that does not fit the model.
        Unsupported: for a model that is already compiled, one whose attention cannot be found,
            and, in the first forward pass, one whose layers do not hand the mask on.
    """
    if tokens not in TOKENS:
        raise BadSettings(f"tokens must be one of {', '.join(TOKENS)}; not {tokens!r}.")
    refuse_compiled(model)
    network = unwrapped(model)
    found = decoder_of(network, anatomy)
    _check(mask, network, found)
    reached: set[int] = set()
    held: list[torch.Tensor] = []
    takes_keywords = _takes_keywords(found.module)

    def begin(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        held[:] = [first_real_token(args, kwargs)]
        return args, {**kwargs, KEYWORD: held[0]} if takes_keywords else kwargs

    def confirm(_module: Any, _args: Any, _output: Any) -> None:
        held.clear()
        if not reached.issuperset(mask.layers):
            raise Unsupported(
                f"{network.config.model_type} does not pass the mask on to the attention of layer "
                f"{min(set(mask.layers) - reached)}, so it cannot be masked by hooks."
            )

    begin.wemask = True  # type: ignore[attr-defined]
    handles = [found.module.register_forward_pre_hook(begin, with_kwargs=True)]
    for layer, module in found.attention.items():
        edit = _edit(mask, layer, tokens, reached, held, watch)
        handles.append(module.register_forward_pre_hook(edit, with_kwargs=True))
    handles.append(found.module.register_forward_hook(confirm))
    logger.info("masking %s in layers %s", tokens, ", ".join(map(str, mask.layers)))
    with hooked(handles):
        yield


def step_masked(
    ground: Ground,
    mask: Mask,
    stream: Stream,
    index: int,
    layer: torch.nn.Module,
    tokens: str = "first",
) -> None:
    """Run a stream through a layer under the mask, if that layer is one of its targets.

    Args:
        ground: the model.
        mask: S of each target layer, and γ.
        stream: at the input of the layer.
        index: of the layer.
        layer: with its parameters.
        tokens: "first" or "every", as `wemask` takes it.
    """
    if index not in mask.layers:
        stream.step(index, layer)
        return
    held: list[torch.Tensor] = []
    firsts = [batch.first for batch in stream.batches]

    def hold(number: int) -> None:
        first = firsts[number]
        held[:] = [torch.ones_like(first) if tokens == "every" else first]

    attention = ground.model.get_submodule(ground.anatomy.at(index).attention)
    edit = _edit(mask, index, "first", set(), held, None)
    with hooked([attention.register_forward_pre_hook(edit, with_kwargs=True)]):
        stream.step(index, layer, each=hold)


def masked(
    model: Any, anatomy: Anatomy, mask: Mask, tokens: str = "first"
) -> AbstractContextManager[None]:
    """`wemask` with the anatomy of a checkpoint: the reference that every fold is held against.

    Args:
        model: the loaded checkpoint.
        anatomy: where its attention lies.
        mask: S of each target layer, and γ.
        tokens: "first" or "every", as `wemask` takes it; "all" is an older word for "every".
    """
    return wemask(model, mask, "every" if tokens == "all" else tokens, anatomy=anatomy)


def _takes_keywords(module: Any) -> bool:
    """Whether a module's forward takes any keyword."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(
        parameter.kind is parameter.VAR_KEYWORD and parameter.name != "deprecated_arguments"
        for parameter in parameters
    )


def first_real_token(args: tuple, kwargs: dict) -> torch.Tensor:
    """Where each sequence's first real token is among the tokens of this call, bool [B, T].

    By a 2-D attention mask, which spans past and present under a cache: the first 1 of a row, and
    within the row every position 0 (packed sequences). Else by positions, where 0 begins a
    sequence (packing; generation that drops an all-ones mask). Else index 0 while the cache is
    empty.
    """
    states = kwargs.get("input_ids", args[0] if args else None)
    if states is None:
        states = kwargs["inputs_embeds"]
    batch, length = states.shape[:2]
    begins = _position_zero(kwargs.get("position_ids"), batch, length)
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        real = attention_mask.to(states.device).bool()
        first = (real & (real.long().cumsum(-1) == 1))[:, -length:]
        return first if begins is None else first | (begins.to(first.device) & real[:, -length:])
    if begins is not None:
        return begins.to(states.device)
    first = torch.zeros(batch, length, dtype=torch.bool, device=states.device)
    cache = kwargs.get("past_key_values")
    first[:, 0] = cache is None or cache.get_seq_length() == 0
    return first


def _position_zero(positions: Any, batch: int, length: int) -> torch.Tensor | None:
    if not isinstance(positions, torch.Tensor):
        return None
    if positions.dim() == 3:  # one plane for each of time, height and width
        positions = positions[0]
    return (positions[..., -length:] == 0).expand(batch, length)


def weight_mask(
    model: Any, emergence_layer: int, rate: float = 0.1, scope: str = "all", strength: float = 1.0
) -> Mask:
    """The paper's mask of a loaded model: the largest norm gains of each target layer (eq. 4).

    Call it before the model is sharded.

    Args:
        model: a causal language model of transformers, also wrapped.
        emergence_layer: the ME Layer m, from 0, as `surgery.analyze` finds it.
        rate: share of the hidden size that is masked.
        scope: "first" masks layer m + 1, "all" every later layer (what the paper trains under).
        strength: γ in x[S] *= 1 - γ.

    Raises:
        BadSettings: where nothing can be masked.
        Unsupported: for a family that the table does not know, or whose norms have no gain.
    """
    network = unwrapped(model)
    config = network.config.get_text_config()
    decoder, family = decoder_of(network), family_of(config.to_dict())
    if family is None or not family.has_gain:
        raise Unsupported(f"{config.model_type} has no norm before attention to rank by.")
    attends = [layer in decoder.attention for layer in range(len(decoder.layers))]
    size = mask_size(rate, config.hidden_size)
    chosen = {}
    for layer in attention_targets(emergence_layer, attends, scope):
        weight: Any = decoder.layers[layer].get_submodule(family.norm).weight
        gain = weight.detach().double().cpu().numpy()
        chosen[layer] = largest(gain - family.null_gain, size)
    return Mask(config.hidden_size, "weight", strength, chosen)


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT, DistributedDataParallel or FSDP."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_fsdp_wrapped_module" in model._modules:
            model = model._fsdp_wrapped_module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def refuse_compiled(model: Any) -> None:
    """Raise Unsupported for a compiled model: its code does not look for new hooks."""
    for module in model.modules():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None):
            raise Unsupported(
                "This model is already compiled, so torch.compile would pass over the mask; "
                "give wemask the model first and compile it inside the block."
            )


def _check(mask: Mask, network: Any, decoder: Decoder) -> None:
    """Raise BadSettings for a mask that does not fit the model, or a model that has one already."""
    lacking = set(mask.layers) - set(decoder.attention)
    if lacking:
        raise BadSettings(f"The mask names layer {min(lacking)}, which has no attention to mask.")
    config = network.config.get_text_config()
    width = getattr(config, "hidden_size", mask.hidden_size)
    largest_index = max((max(chosen, default=0) for chosen in mask.dimensions.values()), default=0)
    if width != mask.hidden_size or largest_index >= width:
        raise BadSettings(
            f"The mask is for a hidden size of {mask.hidden_size}; the model has {width}."
        )
    if any(getattr(hook, "wemask", False) for hook in decoder.module._forward_pre_hooks.values()):
        raise BadSettings("This model is under wemask already; leave that block first.")


def _edit(
    mask: Mask,
    layer: int,
    tokens: str,
    reached: set[int],
    held: list[torch.Tensor],
    watch: Watch | None,
) -> Callable[[Any, tuple, dict], tuple[tuple, dict]]:
    chosen = list(mask.dimensions.get(layer, ()))
    factors: dict[tuple[Any, torch.dtype], torch.Tensor] = {}

    def hook(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        positions = kwargs.pop(KEYWORD, None)
        if positions is None and held:
            positions = held[0]
        elif positions is None and chosen and torch.is_grad_enabled():
            raise Unsupported(
                f"Layer {layer} runs again outside the decoder's call and hands no mask on, so "
                "this model cannot train under wemask with activation checkpointing."
            )
        if not chosen or (positions is None and tokens == "first"):
            return args, kwargs
        reached.add(layer)
        states = attention_input(args, kwargs)
        if watch is not None:
            watch(layer, states, positions)
        factor = factors.get((states.device, states.dtype))
        if factor is None:
            with torch.inference_mode(False):  # or training could not use it afterwards
                factor = torch.ones(states.shape[-1], device=states.device, dtype=states.dtype)
                factor[chosen] = 1.0 - mask.strength
            factors[(states.device, states.dtype)] = factor
        # A product, not an assignment: it has a gradient, and 0 · x is what the folds compute.
        edited = states * factor
        if tokens == "first":
            edited = torch.where(positions.unsqueeze(-1), edited, states)
        if args:
            return (edited, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited}

    return hook
