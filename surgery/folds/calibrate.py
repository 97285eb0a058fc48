"""The sink direction of each target layer, measured on calibration text.

All target layers are calibrated on one journey: when the streams reach a target layer, its sink
direction is computed from the attention input at hand and the layer's weights are edited on the
spot, so every later layer sees the model edited so far.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import NoEmergence
from surgery.files.checkpoint import Checkpoint
from surgery.folds.base import Calibration, Leak
from surgery.folds.editing import EditedWeights
from surgery.folds.edits import RankOne, SinkDirection
from surgery.folds.rank_one import rank_one_edits
from surgery.method.algebra import detector
from surgery.method.locate import STANDS_OUT
from surgery.method.mask import Mask
from surgery.models.distributions import compare_runs
from surgery.models.ground import Ground
from surgery.models.journey import Stream
from surgery.models.masking import step_masked

if TYPE_CHECKING:
    from surgery.patient.patient import Patient

logger = logging.getLogger(__name__)

# Share of Σ's mean eigenvalue added to its diagonal: enough to keep the solution stable when
# there are fewer calibration tokens than dimensions, too little to blur the detector.
RIDGE = 1e-3
# A token is a secondary sink where its norm is at least this share of the sink's own: the rule by
# which an emergence counts as lasting. Beside a layer-0 emergence a multiple of the median would
# catch hundreds of ordinary tokens.
SECONDARY = 0.5
# Tokens whose products are summed at a time.
_ROWS = 256
# Positions before this one are early; what is measured is told for both.
EARLY = 256
# Fewer secondary sinks than this say too little of their direction.
_FEWEST = 4

Array64 = NDArray[np.float64]


Progress = Callable[[int], None]
# Gives directions and leaks of a mask, with a null on secondary sinks or without; calls its second
# argument with 1 after each target layer.
Directed = Callable[[bool, Progress], Calibration]


def _unseen(_done: int) -> None:
    """Nobody watches."""


def calibrate(patient: Patient, mask: Mask, directed: Directed | None = None) -> Calibration:
    """The sink direction of every target layer, in order, on the patient's calibration text.

    Where the text holds secondary sinks, detectors with a null on them are made, too, and of the
    two those are taken whose fold is nearer to the paper's mask on a window kept back.

    Args:
        patient: whose sink is meant.
        mask: what is to be folded.
        directed: measures directions in place of a journey of its own.

    Raises:
        NoEmergence: when the first token does not stand out at the first target layer.
    """
    text, kept_back = patient.calibration_text()
    ground, checkpoint = patient.ground, patient.plain

    def measure(nulled: bool, progress: Progress) -> Calibration:
        return Calibration(
            *sink_directions(ground, checkpoint, mask, text, nulled=nulled, progress=progress)
        )

    directed = directed or measure
    with patient.reporter.bar("Calibrating the sink direction", len(mask.layers)) as advance:
        plain = directed(False, advance)
    found = max(leak.secondary_tokens for leak in plain.leaks.values())
    if found < _FEWEST or not kept_back:
        return plain
    logger.info("%d secondary sinks in the calibration text", found)
    with patient.reporter.bar("Comparing with a null on secondary sinks", 3) as advance:
        nulled = directed(True, _unseen)
        advance(1)
        figures = []
        for one in (plain, nulled):
            figures.append(distance(ground, checkpoint, mask, one.directions, kept_back))
            advance(1)
    chosen = nulled if figures[1] < figures[0] else plain
    leaks = {
        layer: replace(leak, plain=figures[0], null=figures[1])
        for layer, leak in chosen.leaks.items()
    }
    return Calibration(chosen.directions, leaks)


def distance(
    ground: Ground,
    checkpoint: Checkpoint,
    mask: Mask,
    directions: Mapping[int, SinkDirection],
    sequences: Sequence[Sequence[int]],
) -> float:
    """KL(reference ‖ folded) of sink directions on some text, nats per token."""
    reference = towards(ground, sequences, mask.layers[0])
    folded = reference.fork()
    for index in range(mask.layers[0], ground.anatomy.depth):
        with ground.layer(index) as layer:
            step_masked(ground, mask, reference, index, layer)
            edits: tuple[RankOne, ...] = ()
            if index in directions:
                edits = tuple(rank_one_edits(ground.anatomy, mask, index, directions[index]))
            with EditedWeights(ground.model, checkpoint, edits).active():
                folded.step(index, layer)
    pair = ("reference", "folded")
    streams = {"reference": reference, "folded": folded}
    found = compare_runs(streams, [pair])
    kls = [
        one.divergence(pair)[batch.real]
        for one, batch in zip(found, reference.batches, strict=True)
    ]
    return float(torch.cat(kls).mean())


@dataclass(frozen=True)
class Tokens:
    """The attention input of one layer, token by token, float64.

    Attributes:
        first: of the sequences' first tokens, [sequences, D].
        others: of all others that are no padding, [tokens, D].
        secondary: which of the others are secondary sinks, bool [tokens].
        positions: of the others in their sequences, [tokens].
    """

    first: Array64
    others: Array64
    secondary: NDArray[np.bool_]
    positions: NDArray[np.int64]


def sink_directions(
    ground: Ground,
    checkpoint: Checkpoint,
    mask: Mask,
    sequences: Sequence[Sequence[int]],
    *,
    start: Stream | None = None,
    nulled: bool = False,
    ridge: float = RIDGE,
    progress: Progress = _unseen,
) -> tuple[dict[int, SinkDirection], dict[int, Leak]]:
    """Directions for the `sink` fold and their leak on the calibration text, by target layer.

    Args:
        ground: the model; its weights are restored.
        checkpoint: of it, in floating point.
        mask: S of each target layer.
        sequences: token ids, each beginning like a prompt.
        start: what `towards` gave for these sequences, when it is known.
        nulled: whether the detectors have a null on secondary sinks, where there are any.
        ridge: as `method.algebra.detector` takes it.
        progress: called with 1 after each target layer.

    Raises:
        NoEmergence: when the first token does not stand out at the first target layer, because a
            detector for an ordinary token would answer to all others too.
    """
    stream = towards(ground, sequences, mask.layers[0]) if start is None else start.fork()
    require_massive(stream)
    directions: dict[int, SinkDirection] = {}
    leaks: dict[int, Leak] = {}
    for index in range(mask.layers[0], mask.layers[-1] + 1):
        with ground.layer(index) as layer:
            edits: tuple[RankOne, ...] = ()
            if index in mask.layers:
                tokens = tokens_at(stream, index, layer)
                directions[index], leaks[index] = direction(
                    tokens, mask.dimensions[index], ridge, nulled=nulled
                )
                progress(1)
                edits = tuple(rank_one_edits(ground.anatomy, mask, index, directions[index]))
            if index < mask.layers[-1]:
                weights = EditedWeights(ground.model, checkpoint, edits)
                with weights.active() if edits else nullcontext():
                    stream.step(index, layer)
    return directions, leaks


def towards(
    ground: Ground,
    sequences: Sequence[Sequence[int]],
    layer: int,
    progress: Callable[[], None] = lambda: None,
) -> Stream:
    """The streams of some sequences at the input of a layer; progress: called after every layer."""
    ground.prepare(sequences)
    stream = Stream.board(ground, sequences)
    for index in range(layer):
        with ground.layer(index) as module:
            stream.step(index, module)
        progress()
    return stream


def require_massive(stream: Stream) -> None:
    """Raise NoEmergence where the first tokens are not massive in the residual stream."""
    found: list[bool] = []
    for batch, states in zip(stream.batches, stream.states, strict=True):
        norms = states.float().norm(dim=-1)
        others = norms[batch.real]
        found += (norms[:, 0] >= STANDS_OUT * others.median()).tolist()
    share = sum(found) / len(found)
    if share < 0.5:
        raise NoEmergence(
            "the first token is not massive at the input of the first target layer (it stands out "
            f"in {share:.0%} of the calibration sequences), so --fold sink has no direction "
            "to detect it by; check --layer, or use --fold norm."
        )


def secondary_sinks(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Tokens that are nearly as massive as the sink, bool [B, T]; states: [B, T, D].

    They are massive, too: where the sink has faded, as in some models' last layers, half of its
    norm is nothing that stands out.
    """
    norms = states.float().norm(dim=-1)
    found = (norms >= SECONDARY * norms[:, :1]) & (norms >= STANDS_OUT * norms[real].median())
    found &= real
    found[:, 0] = False
    return found


def tokens_at(stream: Stream, index: int, layer: torch.nn.Module) -> Tokens:
    """A layer's attention input on all sequences of a stream, by kind of token."""
    inputs = stream.attention_inputs(index, layer)
    parts = []
    for batch, states, x in zip(stream.batches, stream.states, inputs, strict=True):
        others = batch.real.clone()
        others[:, 0] = False
        positions = torch.arange(x.shape[1], device=x.device).expand_as(others)[others]
        wide = x.detach().double()
        parts.append(
            Tokens(
                wide[:, 0].cpu().numpy(),
                wide[others].cpu().numpy(),
                secondary_sinks(states, batch.real)[others].cpu().numpy(),
                positions.cpu().numpy(),
            )
        )
    return Tokens(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("first", "others", "secondary", "positions")
        )
    )


def direction(
    tokens: Tokens, dimensions: Sequence[int], ridge: float = RIDGE, *, nulled: bool = False
) -> tuple[SinkDirection, Leak]:
    """The sink direction of one layer, and its leak on the tokens that it is made from.

    Secondary sinks count as ordinary tokens, unless the detector has a null on them.
    """
    center = tokens.first.mean(0)
    nulled &= bool(tokens.secondary.sum() >= _FEWEST)
    ordinary = tokens.others[~tokens.secondary] if nulled else tokens.others
    null = tokens.others[tokens.secondary].mean(0) if nulled else None
    second_moment = _products(ordinary) / max(1, len(ordinary))
    v = detector(center, second_moment, ridge, null).astype(np.float32)
    found = SinkDirection(center[list(dimensions)].astype(np.float32), v)
    return found, Answers.of(tokens, v).leak


@dataclass(frozen=True)
class Answers:
    """What a detector answers, v·x, token by token.

    Attributes:
        first: to first tokens.
        ordinary: to ordinary ones.
        late: which of the ordinary ones stand at position `EARLY` or later.
        secondary: to secondary sinks.
    """

    first: Array64
    ordinary: Array64
    late: NDArray[np.bool_]
    secondary: Array64

    @classmethod
    def of(cls, tokens: Tokens, v: NDArray[np.floating]) -> Answers:
        """A detector's answers to some tokens."""
        wide = v.astype(np.float64)
        answers, ordinary = tokens.others @ wide, ~tokens.secondary
        return cls(
            tokens.first @ wide,
            answers[ordinary],
            tokens.positions[ordinary] >= EARLY,
            answers[tokens.secondary],
        )

    @classmethod
    def together(cls, parts: Sequence[Answers]) -> Answers:
        """Answers to several texts as one."""
        names = ("first", "ordinary", "late", "secondary")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def leak(self) -> Leak:
        """The leak that they show."""
        return Leak(
            ordinary_rms=_rms(self.ordinary),
            ordinary_largest=_largest(self.ordinary),
            sink_smallest=float(self.first.min()),
            tokens=int(self.ordinary.size),
            late_rms=_rms(self.ordinary[self.late]) if self.late.any() else None,
            secondary_rms=_rms(self.secondary),
            secondary_largest=_largest(self.secondary),
            secondary_tokens=int(self.secondary.size),
        )


def _products(x: Array64) -> Array64:
    """xᵀx, the same to the last bit in every process and on any number of threads.

    In torch, whose memory is aligned, and a few tokens at a time: a library may split a long sum
    among its threads.
    """
    found = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for rows in torch.from_numpy(x).split(_ROWS):
        aligned = rows.clone()
        found += aligned.T @ aligned
    products: Array64 = found.numpy()
    return products


def _rms(answers: Array64) -> float:
    return float(np.sqrt(np.mean(np.square(answers)))) if answers.size else 0.0


def _largest(answers: Array64) -> float:
    return float(np.abs(answers).max()) if answers.size else 0.0
