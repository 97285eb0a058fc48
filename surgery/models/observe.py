"""Running a model on texts and keeping what the rest needs: norms by layer and token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.models.anatomy import Anatomy

Progress = Callable[[int], None]


def hidden(output: Any) -> torch.Tensor:
    """The hidden states in a decoder layer's output, which is a tensor or a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def residual(states: torch.Tensor) -> torch.Tensor:
    """The residual stream [B, T, D] that attention reads.

    Gemma 3n carries several, [streams, B, T, D], of which the first is the one.
    """
    return states[0] if states.dim() == 4 else states


def backbone(model: Any, anatomy: Anatomy) -> torch.nn.Module:
    """The module that owns the decoder layers: everything but the language-model head."""
    return model.get_submodule(anatomy.layers_path.rpartition(".")[0])


def decoder_layers(model: Any, anatomy: Anatomy) -> list[torch.nn.Module]:
    """The decoder layers, in order."""
    return list(model.get_submodule(anatomy.layers_path))


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_norms(
    model: Any,
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    progress: Progress = lambda _done: None,
) -> list[NDArray[np.float64]]:
    """Per prompt, L2 norms [layers + 1, tokens]: the input to layer 0, then each layer's output.

    Prompts run one at a time, so no padding is involved. Norms are summed in float32.
    """
    layers = decoder_layers(model, anatomy)
    rows: list[torch.Tensor] = []

    def first_input(_module: Any, args: tuple, kwargs: dict) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        rows.append(residual(states).detach()[0].float().norm(dim=-1).cpu())

    def output(_module: Any, _args: Any, result: Any) -> None:
        rows.append(residual(hidden(result)).detach()[0].float().norm(dim=-1).cpu())

    handles = [layers[0].register_forward_pre_hook(first_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(output) for layer in layers]
    found = []
    with hooked(handles), torch.inference_mode():
        device = next(model.parameters()).device
        for prompt in prompts:
            rows.clear()
            tokens = torch.tensor([list(prompt)], device=device)
            backbone(model, anatomy)(input_ids=tokens, use_cache=False)
            found.append(torch.stack(rows).double().numpy())
            progress(1)
    return found


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and their attention mask, [sequences, longest]."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence))
        mask[row, : len(sequence)] = 1
    return ids, mask


def attention_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states an attention module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def sink_magnitudes(
    model: Any, anatomy: Anatomy, layers: Sequence[int], sequences: Sequence[Sequence[int]]
) -> dict[int, NDArray[np.float64]]:
    """Mean |x| of the first token's attention input by layer, [D]: what `activation` ranks."""
    sums: dict[int, torch.Tensor] = {}

    def record(layer: int) -> Callable[[Any, tuple, dict], None]:
        def hook(_module: Any, args: tuple, kwargs: dict) -> None:
            first = attention_input(args, kwargs)[:, 0].detach().double().abs().sum(0).cpu()
            sums[layer] = sums.get(layer, torch.zeros_like(first)) + first

        return hook

    handles = [
        model.get_submodule(anatomy.at(layer).attention).register_forward_pre_hook(
            record(layer), with_kwargs=True
        )
        for layer in layers
    ]
    with hooked(handles), torch.inference_mode():
        device = next(model.parameters()).device
        for sequence in sequences:
            tokens = torch.tensor([list(sequence)], device=device)
            backbone(model, anatomy)(input_ids=tokens, use_cache=False)
    return {layer: (total / len(sequences)).numpy() for layer, total in sums.items()}
