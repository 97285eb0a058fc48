"""What is left of the sink without one part of the ME Layer (Appendix B)."""

from __future__ import annotations

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

Array = NDArray[np.float64]
# The sink's own norm needs no later tokens; these are there for another token to take over.
KNOCKOUT_TOKENS = 64


@dataclass(frozen=True)
class Knockout:
    """What is left without one part of the ME Layer (Appendix B).

    norms: the sink's output norms, medians over the prompts, [layers]. remaining: their share of
    the intact model's, [layers]. emergence: the layer located in the model without that part.
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
        found.append(
            Knockout(
                part=name,
                norms=np.median(left, axis=0),
                remaining=np.median(evidence.remaining(left, intact), axis=0),
                emergence=agree(norms).layer,
            )
        )
    return tuple(found)


def _silence(_module: Any, _args: tuple, _kwargs: dict, result: Any) -> Any:
    zeros = torch.zeros_like(hidden(result))
    return zeros if isinstance(result, torch.Tensor) else (zeros, *result[1:])


def _pass_through(_module: Any, args: tuple, kwargs: dict, _result: Any) -> Any:
    return first_tensor(args, kwargs)
