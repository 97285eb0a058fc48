"""Gated attention, the baseline of the paper's Appendix G (Qiu et al., 2025, arXiv 2505.06708).

A sigmoid gate on the output of attention, before its output projection, elementwise and computed
from the attention input: Y' = Y ⊙ σ(x Wᵀ + b). The gate depends on the token, so no edit of plain
weights equals it: a gated model needs this module to run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from surgery.errors import Unsupported
from surgery.models.discovery import decoder_of
from surgery.models.masking import unwrapped
from surgery.models.observe import hooked, reading

logger = logging.getLogger(__name__)

GATE = "attention_gate"
# A gate that starts almost open leaves the pretrained model as it is: σ(4) = 0.982. Trained from
# scratch, as by its authors, it needs no bias.
OPEN = 4.0


def add_gates(model: Any) -> list[str]:
    """Give each attention module of a loaded model a gate.

    Returns:
        The gates' module paths.

    Raises:
        Unsupported: where attention has no `o_proj`.
    """
    paths = []
    names = {module: name for name, module in model.named_modules()}
    for attention in decoder_of(unwrapped(model)).attention.values():
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
    logger.info("%d attention modules have a gate", len(paths))
    return paths


@contextmanager
def gated(model: Any) -> Iterator[None]:
    """Run the gates of `add_gates` for the time of the block, also inside PEFT and FSDP."""
    handles = []
    for attention in decoder_of(unwrapped(model)).attention.values():
        # What the gate reads lives from the call of attention to its output projection, within
        # one forward pass and again within its recomputation.
        inputs: list[torch.Tensor] = []
        projection: Any = attention.o_proj
        handles.append(reading(attention, inputs.append))
        handles.append(projection.register_forward_pre_hook(_gate(attention, inputs)))
    with hooked(handles):
        yield


def _gate(attention: torch.nn.Module, inputs: list[torch.Tensor]) -> Callable[[Any, tuple], tuple]:
    def hook(_module: Any, args: tuple) -> tuple:
        open_to = torch.sigmoid(getattr(attention, GATE)(inputs.pop()))
        inputs.clear()
        return (args[0] * open_to, *args[1:])

    return hook
