"""WeMask as a context manager: `with wemask(model, mask): …` around training, scoring, generating.

The mask is carried by the call itself, as an extra keyword from the decoder through its layers to
attention, so there is no state that padding, packing, caches, activation checkpointing or another
rank could make stale. For the few families whose layers hand no keywords on, it is kept for the
time of the decoder's call, and activation checkpointing is refused. Works on a causal language
model of transformers as it is, inside PEFT, and inside DistributedDataParallel, FSDP and FSDP2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import BadSettings, Unsupported
from surgery.method.mask import TOKENS, Mask, attention_targets, largest, mask_size
from surgery.models.families import family_of

if TYPE_CHECKING:
    from surgery.models.anatomy import Anatomy

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

    tokens: "first" masks the first real token of each sequence, once, at prefill, under left or
    right padding, packing, or a cache: the paper's method. "every" masks every token: what the
    `norm` and `qkv` folds do. anatomy: where attention lies, for families the table does not know
    (`surgery.analyze` finds it by tracing). watch: sees each attention input before it is edited.

    Enter the block before a trainer is constructed and leave it after the last evaluation, so that
    reference log-probabilities and first evaluations are masked too. vLLM runs no hooks; fold
    before generating with it. Gradients flow as if x had been multiplied by 1 - γ in S.

    Raises BadSettings for a mask that does not fit the model, and Unsupported for a model that is
    already compiled, one whose attention cannot be found, and, in the first forward pass, one
    whose layers do not hand the mask on.
    """
    if tokens not in TOKENS:
        raise BadSettings(f"tokens must be one of {', '.join(TOKENS)}; not {tokens!r}.")
    refuse_compiled(model)
    network = unwrapped(model)
    decoder, attention = _modules(network, anatomy)
    _check(mask, network, attention)
    if any(getattr(hook, "wemask", False) for hook in decoder._forward_pre_hooks.values()):
        raise BadSettings("This model is under wemask already; leave that block first.")
    reached: set[int] = set()
    held: list[torch.Tensor] = []
    takes_keywords = _takes_keywords(decoder)

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
    handles = [decoder.register_forward_pre_hook(begin, with_kwargs=True)]
    for layer, module in attention.items():
        edit = _edit(mask, layer, tokens, reached, held, watch)
        handles.append(module.register_forward_pre_hook(edit, with_kwargs=True))
    handles.append(decoder.register_forward_hook(confirm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

    emergence_layer: the ME Layer m, from 0, as `surgery.analyze` finds it. scope: "first" masks
    layer m + 1, "all" every later layer (what the paper trains under). Call it before the model is
    sharded. Raises BadSettings where nothing can be masked, Unsupported for an unknown family.
    """
    network = unwrapped(model)
    config = network.config.get_text_config()
    family = family_of(config.to_dict())
    _, layers = _decoder_layers(network)
    if family is None or not family.has_gain:
        raise Unsupported(f"{config.model_type} has no norm before attention to rank by.")
    attends = [_attention_of(layer, family) is not None for layer in layers]
    size = mask_size(rate, config.hidden_size)
    chosen = {}
    for layer in attention_targets(emergence_layer, attends, scope):
        gain = layers[layer].get_submodule(family.norm).weight.detach().double().cpu().numpy()
        chosen[layer] = largest(gain - family.null_gain, size)
    return Mask(config.hidden_size, "weight", strength, chosen)


def attention_modules(model: Any) -> dict[int, Any]:
    """The attention modules of a model, also wrapped, by layer; see `wemask`."""
    return _modules(unwrapped(model), None)[1]


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT, DistributedDataParallel or FSDP."""
    from torch.nn.parallel import DistributedDataParallel

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


def _modules(network: Any, anatomy: Anatomy | None) -> tuple[Any, dict[int, Any]]:
    """The module that owns the decoder layers, and attention by layer."""
    if anatomy is not None:
        decoder = network.get_submodule(anatomy.layers_path.rpartition(".")[0])
        return decoder, {
            found.layer: network.get_submodule(found.attention)
            for found in anatomy.inputs
            if found is not None
        }
    decoder, layers = _decoder_layers(network)
    family = family_of(network.config.get_text_config().to_dict())
    assert family is not None
    found = {layer: _attention_of(module, family) for layer, module in enumerate(layers)}
    return decoder, {layer: module for layer, module in found.items() if module is not None}


def _decoder_layers(network: Any) -> tuple[Any, Any]:
    config = network.config.get_text_config()
    family = family_of(config.to_dict())
    if family is None or family.refusal:
        reason = family.refusal if family is not None else "the table of families lacks it"
        raise Unsupported(f"{config.model_type} cannot be masked: {reason}.")
    last = family.layers.rpartition(".")[2]
    places = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.rpartition(".")[2] == last
        and len(module) == config.num_hidden_layers
        and any(_attention_of(layer, family) is not None for layer in module)
    ]
    if len(places) != 1:
        raise Unsupported(
            f"{config.model_type} has its decoder layers at {len(places)} places, not one; give "
            "wemask the anatomy that surgery.analyze finds."
        )
    name, layers = places[0]
    return network.get_submodule(name.rpartition(".")[0]), layers


def _attention_of(layer: Any, family: Any) -> Any:
    for mixer in family.all_mixers:
        try:
            return layer.get_submodule(mixer.attention)
        except AttributeError:
            continue
    return None


def _check(mask: Mask, network: Any, attention: dict[int, Any]) -> None:
    lacking = set(mask.layers) - set(attention)
    if lacking:
        raise BadSettings(f"The mask names layer {min(lacking)}, which has no attention to mask.")
    config = network.config.get_text_config()
    width = getattr(config, "hidden_size", mask.hidden_size)
    largest_index = max((max(chosen, default=0) for chosen in mask.dimensions.values()), default=0)
    if width != mask.hidden_size or largest_index >= width:
        raise BadSettings(
            f"The mask is for a hidden size of {mask.hidden_size}; the model has {width}."
        )


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
        states = args[0] if args else kwargs["hidden_states"]
        if watch is not None:
            watch(layer, states, positions)
        factor = factors.get((states.device, states.dtype))
        if factor is None:
            with torch.inference_mode(False):  # or training could not use it afterwards
                factor = torch.ones(states.shape[-1], device=states.device, dtype=states.dtype)
                factor[chosen] = 1.0 - mask.strength
            factors[(states.device, states.dtype)] = factor
        edited = states * factor
        if tokens == "first":
            edited = torch.where(positions.unsqueeze(-1), edited, states)
        if args:
            return (edited, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited}

    return hook
