"""What each prompt shows layer by layer: norms, gains, projections, the sink's states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    attention_input,
    first_tensor,
    hidden,
    hooked,
    residual,
    run,
    to_numpy,
)
from surgery.patient.texts import Prompt

Array = NDArray[np.float64]
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class PromptTrace:
    """What one prompt shows. Arrays are [layers, tokens], NaN where a layer has no such part.

    output: L2 norms, [layers + 1, tokens], the first row the input to layer 0. weight_norm,
    fraction, divergence: of the output of the norm before the FFN (§3.1). amplification: of the
    FFN. gate, up, down: projection concentration. states: the sink's hidden states,
    [layers + 1, D], float32.
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
    """Fills the arrays of one prompt at a time from hooks on every layer."""

    def __init__(
        self, model: Any, anatomy: Anatomy, parts: Sequence[FeedForward | None], share: float
    ) -> None:
        self._depth = anatomy.depth
        self._share = share
        self.handles: list[Any] = []
        self.states: list[NDArray[np.float32]] = []
        layers = decoder_layers(model, anatomy)
        self.handles.append(layers[0].register_forward_pre_hook(self._first, with_kwargs=True))
        for index, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            self.handles.append(layer.register_forward_hook(self._output))
            if part is None:
                continue
            ffn = layer.get_submodule(part.module)
            self.handles.append(ffn.register_forward_hook(self._ffn(index), with_kwargs=True))
            if part.norm is not None:
                norm = layer.get_submodule(part.norm)
                gain = effective_gain(norm, anatomy.null_gain)
                known = to_numpy(gain) if gain is not None else None
                self.handles.append(norm.register_forward_hook(self._norm(index, known)))
            for role, (path, half) in part.projections.items():
                linear = layer.get_submodule(path)
                self.handles.append(
                    linear.register_forward_hook(self._projection(index, role, half))
                )

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

    def _first(self, _module: Any, args: tuple, kwargs: dict) -> None:
        self._keep(attention_input(args, kwargs))

    def _output(self, _module: Any, _args: Any, result: Any) -> None:
        self._keep(hidden(result))

    def _ffn(self, index: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple, kwargs: dict, result: Any) -> None:
            before, after = _flat(first_tensor(args, kwargs)), _flat(hidden(result))
            self.arrays["ffn_output"][index] = evidence.token_norms(after)
            self.arrays["amplification"][index] = evidence.amplification(before, after)

        return hook

    def _norm(self, index: int, gain: NDArray | None) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: Any) -> None:
            states = _flat(hidden(result))
            self.arrays["weight_norm"][index] = evidence.token_norms(states)
            if gain is not None:
                fraction = evidence.top_gain_fraction(states, gain, self._share)
                self.arrays["fraction"][index] = fraction
                self.arrays["divergence"][index] = evidence.gain_divergence(states, gain)

        return hook

    def _projection(self, index: int, role: str, half: int | None) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: torch.Tensor) -> None:
            states = _flat(result)
            if half is not None:
                states = np.split(states, 2, axis=-1)[half]
            self.arrays[role][index] = evidence.concentration(states)

        return hook


def trace_prompts(
    model: Any,
    anatomy: Anatomy,
    parts: Sequence[FeedForward | None],
    prompts: Sequence[Prompt],
    sinks: Sequence[int],
    share: float,
    progress: Progress,
) -> tuple[PromptTrace, ...]:
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
            progress(1)
    return tuple(found)
