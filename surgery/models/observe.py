"""Looking into a model while it runs: hooks that are taken away again, and what they see.

A hook here shows somebody the states that a module is called with (`reading`) or gives
(`writing`); what a caller keeps of them is the caller's. `layer_norms` and `sink_magnitudes` are
what locating the Massive Emergence Layer and selecting by activation need.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.models.anatomy import Anatomy
from surgery.models.discovery import backbone, decoder_layers

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
See = Callable[[torch.Tensor], None]


def hidden(output: Any) -> torch.Tensor:
    """The hidden states in a decoder layer's output, which is a tensor or a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def residual(states: torch.Tensor) -> torch.Tensor:
    """The residual stream [B, T, D] that attention reads.

    Gemma 3n carries several, [streams, B, T, D], of which the first is the one.
    """
    return states[0] if states.dim() == 4 else states


def attention_input(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a decoder layer or an attention module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def first_tensor(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The first tensor that a module is called with, whatever the module calls it."""
    return next(part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor))


def to_numpy(values: torch.Tensor) -> NDArray:
    """A tensor's values as numpy takes them: in float32, or in float64 where they are that."""
    wide = torch.promote_types(values.dtype, torch.float32)  # numpy has no bfloat16
    return values.detach().to("cpu", wide).numpy()


def device_of(model: Any) -> torch.device:
    """The device of a model that lies on one."""
    return next(model.parameters()).device


# --------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reading(module: torch.nn.Module, see: See) -> Any:
    """A hook that shows the hidden states which a layer or an attention module is called with."""
    return module.register_forward_pre_hook(
        lambda _module, args, kwargs: see(attention_input(args, kwargs)), with_kwargs=True
    )


def writing(module: torch.nn.Module, see: See) -> Any:
    """A hook that shows the hidden states which a module gives."""
    return module.register_forward_hook(lambda _module, _args, result: see(hidden(result)))


def reading_attention(
    model: Any,
    anatomy: Anatomy,
    layers: Sequence[int],
    see: Callable[[int, torch.Tensor], None],
) -> list[Any]:
    """Hooks that show the attention input, [B, T, D], of some layers, with the layer's index."""

    def at(layer: int) -> Any:
        attention = model.get_submodule(anatomy.at(layer).attention)
        return reading(attention, lambda states: see(layer, states))

    return [at(layer) for layer in layers]


@contextmanager
def standing_in(
    modules: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Other functions in place of modules' `forward` for the time of the block."""
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


# --------------------------------------------------------------------------------------------
# Forward passes
# --------------------------------------------------------------------------------------------


def run(model: Any, anatomy: Anatomy, tokens: Sequence[int], **options: Any) -> Any:
    """What the backbone gives for one sequence; hooks see the same as in the whole model.

    Without the head: its logits, [tokens, vocabulary], would often be the largest tensor of all.
    """
    ids = torch.tensor([list(tokens)], device=device_of(model))
    with torch.inference_mode():
        return backbone(model, anatomy)(input_ids=ids, **{"use_cache": False, **options})


def layer_norms(
    model: Any,
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    progress: Progress = lambda _done: None,
) -> list[NDArray[np.float64]]:
    """L2 norms of the residual stream, prompt by prompt, token by token.

    Prompts run one at a time, so no padding is involved. Squares are summed in float32: that of a
    massive activation overflows float16, and eight bits of bfloat16 are too few for a sum.

    Args:
        model: in evaluation mode.
        anatomy: of its checkpoint.
        prompts: token ids.
        progress: called with 1 after each prompt.

    Returns:
        Per prompt, [layers + 1, tokens]: the input to layer 0, then each layer's output.
    """
    layers = decoder_layers(model, anatomy)
    rows: list[torch.Tensor] = []

    def keep(states: torch.Tensor) -> None:
        rows.append(residual(states).detach()[0].float().norm(dim=-1).cpu())

    found = []
    with hooked([reading(layers[0], keep), *(writing(layer, keep) for layer in layers)]):
        for prompt in prompts:
            rows.clear()
            run(model, anatomy, prompt)
            found.append(torch.stack(rows).double().numpy())
            logger.debug("norms of %d layers on %d tokens", len(layers), len(prompt))
            progress(1)
    return found


def sink_magnitudes(
    model: Any, anatomy: Anatomy, layers: Sequence[int], sequences: Sequence[Sequence[int]]
) -> dict[int, NDArray[np.float64]]:
    """What `--select activation` ranks: the mean |x| of the first token's attention input.

    Summed in float64, where rounding is far below the distance of any two dimensions: which of
    them ranks first does not depend on the order of the sequences.

    Args:
        model: in evaluation mode.
        anatomy: of its checkpoint.
        layers: those to look at.
        sequences: token ids, each beginning like a prompt.

    Returns:
        By layer, [D].
    """
    sums: dict[int, torch.Tensor] = {}

    def add(layer: int, states: torch.Tensor) -> None:
        first = states[:, 0].detach().double().abs().sum(0).cpu()
        sums[layer] = sums.get(layer, torch.zeros_like(first)) + first

    with hooked(reading_attention(model, anatomy, layers, add)):
        for sequence in sequences:
            run(model, anatomy, sequence)
    logger.debug("attention input of the first token in %d sequences", len(sequences))
    return {layer: (total / len(sequences)).numpy() for layer, total in sums.items()}


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and their attention mask, [sequences, longest]."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence))
        mask[row, : len(sequence)] = 1
    return ids, mask
