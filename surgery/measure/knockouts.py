"""What is left of the sink without one part of the ME Layer (Appendix B)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.measure.feed_forward import FeedForward
from surgery.measure.traces import PromptTrace
from surgery.method import evidence
from surgery.method.locate import agree
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import decoder_layers
from surgery.models.observe import Progress, first_tensor, hidden, hooked, layer_norms

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
# The sink's own norm needs no later tokens; these are there for another token to take over.
KNOCKOUT_TOKENS = 64


@dataclass(frozen=True)
class Knockout:
    """What is left without one part of the ME Layer (Appendix B).

    Attributes:
        part: "ffn", which then gives zeros, or "norm", which then gives its input.
        norms: the sink's output norms, medians over the prompts, [layers].
        remaining: their share of the intact model's, [layers].
        emergence: the layer located in the model without that part; None where there is none.
    """

    part: str
    norms: Array
    remaining: Array
    emergence: int | None


def knock_out(
    model: Any,
    anatomy: Anatomy,
    part: FeedForward | None,
    layer: int,
    traces: Sequence[PromptTrace],
    notes: list[str],
    progress: Progress,
) -> tuple[Knockout, ...]:
    """The model without the ME Layer's FFN, and without the norm before it.

    Args:
        model: as it is.
        anatomy: of its checkpoint.
        part: the FFN of the ME Layer.
        layer: the ME Layer.
        traces: of the intact model.
        notes: of what could not be measured; more are put there.
        progress: called with 1 after each prompt.

    Returns:
        The knock-outs that are possible: a norm that attention reads too stays.
    """
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
        remaining = np.median(evidence.remaining(left, intact), axis=0)
        found.append(Knockout(name, np.median(left, axis=0), remaining, agree(norms).layer))
        logger.debug("layer %d without its %s", layer, name)
    return tuple(found)


def _silence(_module: Any, _args: tuple, _kwargs: dict, result: Any) -> Any:
    zeros = torch.zeros_like(hidden(result))
    return zeros if isinstance(result, torch.Tensor) else (zeros, *result[1:])


def _pass_through(_module: Any, args: tuple, kwargs: dict, _result: Any) -> Any:
    return first_tensor(args, kwargs)
