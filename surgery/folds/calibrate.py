"""The sink direction of each target layer, measured on calibration text.

All target layers are calibrated in one forward pass: when the batch reaches a target layer's
attention, its sink direction is computed from the attention input at hand and the layer's weights
are edited on the spot, so every later layer sees the model edited so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import NoEmergence
from surgery.files.checkpoint import Checkpoint
from surgery.folds.base import Calibration, Leak
from surgery.folds.editing import set_parameter
from surgery.folds.edits import SinkDirection
from surgery.folds.rank_one import rank_one_edits
from surgery.method.algebra import detector
from surgery.method.locate import STANDS_OUT
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import backbone, decoder_layers
from surgery.models.observe import device_of, hooked, pad, reading, reading_attention, residual

if TYPE_CHECKING:
    from surgery.patient.patient import Patient

# Share of Σ's mean eigenvalue added to its diagonal: enough to keep the solution stable when
# there are fewer calibration tokens than dimensions, too little to blur the detector.
RIDGE = 1e-3


def calibrate(patient: Patient, mask: Mask) -> Calibration:
    """The sink direction of every target layer, in order, on the patient's calibration text."""
    sequences = patient.calibration()
    with patient.reporter.bar("Calibrating the sink direction", len(mask.layers)) as advance:
        return Calibration(
            *sink_directions(
                patient.model, patient.anatomy, patient.plain, mask, sequences, progress=advance
            )
        )


class _Done(Exception):
    """Ends the forward pass once the last target layer is calibrated."""


@dataclass
class _Pass:
    """What the forward pass finds: which tokens are sinks, then a direction per layer."""

    real: torch.Tensor
    massive: torch.Tensor | None
    directions: dict[int, SinkDirection]
    leaks: dict[int, Leak]


def sink_directions(
    model: Any,
    anatomy: Anatomy,
    checkpoint: Checkpoint,
    mask: Mask,
    sequences: Sequence[Sequence[int]],
    *,
    ridge: float = RIDGE,
    progress: Callable[[int], None] = lambda _done: None,
) -> tuple[dict[int, SinkDirection], dict[int, Leak]]:
    """Directions for the `sink` fold and their leak on the calibration text, by target layer.

    sequences: token ids, each beginning like a prompt. The model's weights are restored. Raises
    NoEmergence when the first token does not stand out at the first target layer, because a
    detector for an ordinary token would answer to all others too.
    """
    ids, real = pad(sequences)
    device = device_of(model)
    state = _Pass(real.bool(), None, {}, {})
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def classify(states: torch.Tensor) -> None:
        state.massive = massive_tokens(residual(states), state.real)

    def at_layer(layer: int, inputs: torch.Tensor) -> None:
        _calibrate(state, mask, layer, inputs, ridge)
        for edit in rank_one_edits(anatomy, mask, layer, state.directions[layer]):
            parameter = model.get_parameter(edit.parameter)
            saved.append((parameter, parameter.detach().clone()))
            dtype = checkpoint.tensors[edit.tensor].dtype
            set_parameter(parameter, edit.apply(checkpoint.read(edit.tensor), dtype))
        progress(1)
        if layer == mask.layers[-1]:
            raise _Done

    handles = [
        reading(decoder_layers(model, anatomy)[mask.layers[0]], classify),
        *reading_attention(model, anatomy, mask.layers, at_layer),
    ]
    try:
        with hooked(handles), torch.inference_mode():
            backbone(model, anatomy)(
                input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False
            )
    except _Done:
        pass
    finally:
        with torch.no_grad():
            for parameter, original in saved:
                parameter.copy_(original)
    return state.directions, state.leaks


def massive_tokens(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Tokens of the sink class, bool [B, T]: massive in the residual stream [B, T, D].

    A delimiter that has become a second sink belongs here, not among the ordinary tokens. Raises
    NoEmergence where the first tokens are not massive themselves.
    """
    massive = stands_out(states, real.cpu())
    standing_out = massive[:, 0].double().mean().item()
    if standing_out < 0.5:
        raise NoEmergence(
            "the first token is not massive at the input of the first target layer (it stands out "
            f"in {standing_out:.0%} of the calibration sequences), so --fold sink has no direction "
            "to detect it by; check --layer, or use --fold norm."
        )
    massive[:, 0] = True
    return massive


def stands_out(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Tokens whose norm is far above the median, bool [B, T]; states: [B, T, D]."""
    norms = states.detach().float().norm(dim=-1).cpu()
    return (norms >= STANDS_OUT * norms[real].median()) & real


def _calibrate(state: _Pass, mask: Mask, layer: int, inputs: torch.Tensor, ridge: float) -> None:
    assert state.massive is not None
    x = inputs.detach().double().cpu()
    first = x[:, 0]
    ordinary = x[state.real & ~state.massive]
    center = first.mean(0)
    second_moment = (ordinary.T @ ordinary / max(1, len(ordinary))).numpy()
    v = detector(center.numpy(), second_moment, ridge).astype(np.float32)
    chosen = list(mask.dimensions[layer])
    state.directions[layer] = SinkDirection(center.numpy()[chosen].astype(np.float32), v)
    state.leaks[layer] = leak(ordinary.numpy() @ v, first.numpy() @ v)


def leak(ordinary: NDArray[np.floating], first: NDArray[np.floating]) -> Leak:
    """The leak of a detector from its answers v·x."""
    return Leak(
        ordinary_rms=float(np.sqrt(np.mean(np.square(ordinary)))) if ordinary.size else 0.0,
        ordinary_largest=float(np.abs(ordinary).max()) if ordinary.size else 0.0,
        sink_smallest=float(first.min()),
        tokens=int(ordinary.size),
    )


class LeakWatcher:
    """Collects the detectors' answers v·x while an edited model runs on text."""

    def __init__(self, model: Any, anatomy: Anatomy, sinks: Mapping[int, SinkDirection]) -> None:
        self._model, self._anatomy, self._sinks = model, anatomy, sinks
        self._ordinary: dict[int, list[NDArray[np.float64]]] = {layer: [] for layer in sinks}
        self._first: dict[int, list[NDArray[np.float64]]] = {layer: [] for layer in sinks}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the forward passes of this block, given with a 2-D attention mask."""
        if not self._sinks:
            yield
            return
        state: dict[str, torch.Tensor] = {}

        def begin(_module: Any, _args: tuple, kwargs: dict) -> None:
            state["real"] = kwargs["attention_mask"].bool().cpu()

        def classify(states: torch.Tensor) -> None:
            state["massive"] = stands_out(residual(states), state["real"])

        def answer(layer: int, inputs: torch.Tensor) -> None:
            x = inputs.detach().double().cpu()
            answers = x @ torch.from_numpy(self._sinks[layer].detector).double()
            ordinary = state["real"] & ~state["massive"]
            ordinary[:, 0] = False
            self._ordinary[layer].append(answers[ordinary].numpy())
            self._first[layer].append(answers[:, 0].numpy())

        first = decoder_layers(self._model, self._anatomy)[min(self._sinks)]
        handles = [
            self._model.register_forward_pre_hook(begin, with_kwargs=True),
            reading(first, classify),
            *reading_attention(self._model, self._anatomy, list(self._sinks), answer),
        ]
        with hooked(handles):
            yield

    def leaks(self) -> dict[int, Leak]:
        """The leak of each detector on everything that was watched."""
        return {
            layer: leak(np.concatenate(self._ordinary[layer]), np.concatenate(self._first[layer]))
            for layer in self._sinks
        }
