"""Gated attention, the baseline of the paper's Appendix G (Qiu et al., 2025, arXiv 2505.06708).

A sigmoid gate on the output of attention, before its output projection, elementwise and computed
from the attention input: Y' = Y ⊙ σ(x Wᵀ + b). The gate depends on the token, so no edit of plain
weights equals it: a gated model needs this module to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from surgery.errors import Unsupported
from surgery.models.masking import attention_modules

GATE = "attention_gate"
# A gate that starts almost open leaves the pretrained model as it is: σ(4) = 0.982. Trained from
# scratch, as by its authors, it needs no bias.
OPEN = 4.0


def add_gates(model: Any) -> list[str]:
    """Give each attention module of a loaded model a gate; returns their module paths.

    Raises Unsupported where attention has no `o_proj`.
    """
    paths = []
    names = {module: name for name, module in model.named_modules()}
    for attention in attention_modules(model).values():
        projection = getattr(attention, "o_proj", None)
        if not isinstance(projection, torch.nn.Linear):
            raise Unsupported(
                f"{model.config.model_type} cannot be gated: its attention has no o_proj."
            )
        width = model.config.get_text_config().hidden_size
        gate = torch.nn.Linear(
            width,
            projection.in_features,
            device=projection.weight.device,
            dtype=projection.weight.dtype,
        )
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, OPEN)
        setattr(attention, GATE, gate)
        paths.append(f"{names[attention]}.{GATE}")
    return paths


@contextmanager
def gated(model: Any) -> Iterator[None]:
    """Run the gates of `add_gates` for the time of the block, also inside PEFT and FSDP."""
    handles = []
    for attention in attention_modules(model).values():
        # What the gate reads lives from the call of attention to its output projection, within
        # one forward pass and again within its recomputation.
        inputs: list[torch.Tensor] = []

        def read(
            _module: Any, args: tuple, kwargs: dict, inputs: list[torch.Tensor] = inputs
        ) -> None:
            inputs[:] = [args[0] if args else kwargs["hidden_states"]]

        def gate(
            _module: Any,
            args: tuple,
            attention: Any = attention,
            inputs: list[torch.Tensor] = inputs,
        ) -> tuple:
            states = inputs.pop()
            return (args[0] * torch.sigmoid(getattr(attention, GATE)(states)), *args[1:])

        handles.append(attention.register_forward_pre_hook(read, with_kwargs=True))
        handles.append(attention.o_proj.register_forward_pre_hook(gate))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
