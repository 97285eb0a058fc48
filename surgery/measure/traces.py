"""What each prompt shows layer by layer: norms, gains, projections, the sink's states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.measure.feed_forward import FeedForward
from surgery.method import evidence
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import decoder_layers
from surgery.models.observe import (
    Progress,
    first_tensor,
    hidden,
    hooked,
    reading,
    residual,
    run,
    to_numpy,
    writing,
)
from surgery.patient.texts import Prompt

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class PromptTrace:
    """What one prompt shows; arrays are [layers, tokens], NaN where a layer has no such part.

    Attributes:
        prompt: what was shown.
        sink: position of the sink.
        output: L2 norms of the residual stream, [layers + 1, tokens], the first row the input to
            layer 0.
        ffn_output: L2 norms of the FFN's output.
        weight_norm: L2 norms of the output of the norm before the FFN (§3.1), as `fraction` and
            `divergence` are of that output.
        fraction: its energy in the dimensions of largest gain (eq. 1).
        divergence: its KL from the gains (eq. 2), nats.
        amplification: of the FFN.
        gate: projection concentration (eq. 3).
        up: likewise.
        down: likewise.
        states: the sink's hidden states, [layers + 1, D], float32.
    """

    prompt: Prompt
    sink: int
    output: Array
    ffn_output: Array
    weight_norm: Array
    fraction: Array
    divergence: Array
    amplification: Array
    gate: Array
    up: Array
    down: Array
    states: NDArray[np.float32]


def _flat(states: torch.Tensor) -> NDArray:
    """States of the one sequence in the batch, [tokens, width]."""
    return to_numpy(residual(states)).reshape(-1, states.shape[-1])


def effective_gain(norm: torch.nn.Module, null_gain: float) -> torch.Tensor | None:
    """What a norm multiplies by, [D], float32 or wider; None where it has no gain."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) - null_gain


class _Recorder:
    """Fills the arrays of one prompt at a time from hooks on every layer.

    Attributes:
        handles: the hooks.
        norms: of the residual stream, by layer.
        states: of the sink, by layer.
        arrays: the other arrays of `PromptTrace`, by name.
    """

    def __init__(
        self, model: Any, anatomy: Anatomy, parts: Sequence[FeedForward | None], share: float
    ) -> None:
        self._depth, self._share = anatomy.depth, share
        self.handles: list[Any] = []
        self.states: list[NDArray[np.float32]] = []
        layers = decoder_layers(model, anatomy)
        self.handles.append(reading(layers[0], self._keep))
        for index, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            self.handles.append(writing(layer, self._keep))
            if part is None:
                continue
            ffn = layer.get_submodule(part.module)
            hook = partial(self._ffn, index)
            self.handles.append(ffn.register_forward_hook(hook, with_kwargs=True))
            if part.norm is not None:
                norm = layer.get_submodule(part.norm)
                gain = effective_gain(norm, anatomy.null_gain)
                known = to_numpy(gain) if gain is not None else None
                self.handles.append(writing(norm, partial(self._norm, index, known)))
            for role, (path, half) in part.projections.items():
                linear = layer.get_submodule(path)
                self.handles.append(writing(linear, partial(self._projection, index, role, half)))

    def begin(self, tokens: int, sink: int) -> None:
        """Forget the last prompt."""
        self._sink = sink
        self.states.clear()
        self.norms: list[Array] = []
        self.arrays = {
            name: np.full((self._depth, tokens), np.nan)
            for name in (
                *("ffn_output", "weight_norm", "fraction", "divergence", "amplification"),
                *PROJECTIONS,
            )
        }

    def _keep(self, states: torch.Tensor) -> None:
        flat = _flat(states)
        self.norms.append(evidence.token_norms(flat).astype(np.float64))
        self.states.append(flat[self._sink].astype(np.float32))

    def _ffn(self, index: int, _module: Any, args: tuple, kwargs: dict, result: Any) -> None:
        before, after = _flat(first_tensor(args, kwargs)), _flat(hidden(result))
        self.arrays["ffn_output"][index] = evidence.token_norms(after)
        self.arrays["amplification"][index] = evidence.amplification(before, after)

    def _norm(self, index: int, gain: NDArray | None, output: torch.Tensor) -> None:
        states = _flat(output)
        self.arrays["weight_norm"][index] = evidence.token_norms(states)
        if gain is not None:
            fraction = evidence.top_gain_fraction(states, gain, self._share)
            self.arrays["fraction"][index] = fraction
            self.arrays["divergence"][index] = evidence.gain_divergence(states, gain)

    def _projection(self, index: int, role: str, half: int | None, output: torch.Tensor) -> None:
        states = _flat(output)
        if half is not None:
            states = np.split(states, 2, axis=-1)[half]
        self.arrays[role][index] = evidence.concentration(states)


def trace_prompts(
    model: Any,
    anatomy: Anatomy,
    parts: Sequence[FeedForward | None],
    prompts: Sequence[Prompt],
    sinks: Sequence[int],
    share: float,
    progress: Progress,
) -> tuple[PromptTrace, ...]:
    """What each prompt shows layer by layer, one forward pass each.

    Args:
        model: as it is.
        anatomy: of its checkpoint.
        parts: the FFN of each layer.
        prompts: what is shown.
        sinks: position of the sink in each.
        share: K / D of eq. 1.
        progress: called with 1 after each prompt.
    """
    recorder = _Recorder(model, anatomy, parts, share)
    found = []
    with hooked(recorder.handles):
        for prompt, sink in zip(prompts, sinks, strict=True):
            recorder.begin(len(prompt.tokens), sink)
            run(model, anatomy, prompt.tokens)
            found.append(
                PromptTrace(
                    prompt=prompt,
                    sink=sink,
                    output=np.stack(recorder.norms),
                    states=np.stack(recorder.states),
                    **recorder.arrays,
                )
            )
            logger.debug("a prompt of %d tokens, its sink at %d", len(prompt.tokens), sink)
            progress(1)
    return tuple(found)
