"""Base, the paper's reference and folded weights side by side through the layers of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from surgery.files.checkpoint import Checkpoint
from surgery.folds.calibrate import Answers, tokens_at
from surgery.folds.editing import EditedWeights
from surgery.folds.edits import Edit, SinkDirection
from surgery.method.mask import Mask
from surgery.models.distributions import compare_runs
from surgery.models.ground import Ground
from surgery.models.journey import Stream
from surgery.models.masking import step_masked

logger = logging.getLogger(__name__)

VARIANTS = ("base", "reference", "folded")
PAIRS = (("reference", "base"), ("base", "reference"), ("reference", "folded"), ("base", "folded"))
Array64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sequenced:
    """What was measured on one sequence.

    Attributes:
        ids: its token ids.
        losses: of each variant, nats by predicted token, [tokens - 1].
        divergences: KL(p ‖ q) of each of `PAIRS`, nats by position, [tokens].
    """

    ids: tuple[int, ...]
    losses: Mapping[str, Array64]
    divergences: Mapping[tuple[str, str], Array64]


@dataclass(frozen=True)
class Trial:
    """What was measured on some sequences, in their order, and how the detectors answered."""

    sequences: tuple[Sequenced, ...] = ()
    answers: Mapping[int, Answers] = field(default_factory=dict)

    def __add__(self, other: Trial) -> Trial:
        parts = [found for found in (self, other) if found.answers]
        both = {
            layer: Answers.together([found.answers[layer] for found in parts])
            for layer in other.answers
        }
        return Trial((*self.sequences, *other.sequences), both)


@dataclass(frozen=True)
class Edited:
    """A mask and what was made of it, on a model in floating point.

    Attributes:
        checkpoint: whose tensors are edited.
        mask: of the reference.
        edits: of the fold.
        directions: whose leak is watched, by layer.
        tokens: which tokens the reference masks, "first" (the paper's) or "every".
    """

    checkpoint: Checkpoint
    mask: Mask
    edits: Sequence[Edit]
    directions: Mapping[int, SinkDirection] = field(default_factory=dict)
    tokens: str = "first"


def run_trial(
    ground: Ground,
    edited: Edited,
    sequences: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> Trial:
    """Measure base, reference and fold on some text; each layer is entered once.

    Args:
        ground: the model.
        edited: what is done to it.
        sequences: token ids.
        progress: called after every layer with the tokens that passed it.
    """
    streams, answers = travel(ground, edited, sequences, progress=progress)
    found: list[Sequenced | None] = [None] * len(sequences)
    for batch, measured in zip(streams["base"].batches, compare_runs(streams, PAIRS), strict=True):
        for row, (place, length) in enumerate(zip(batch.places, batch.lengths, strict=True)):
            found[place] = Sequenced(
                tuple(sequences[place]),
                {name: measured.loss(name)[row, : length - 1].cpu().numpy() for name in VARIANTS},
                {pair: measured.divergence(pair)[row, :length].cpu().numpy() for pair in PAIRS},
            )
    return Trial(tuple(one for one in found if one is not None), answers)


def travel(
    ground: Ground,
    edited: Edited,
    sequences: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> tuple[dict[str, Stream], dict[int, Answers]]:
    """The streams of base, reference and fold after the last layer, and the detectors' answers."""
    mask, edits = edited.mask, edited.edits
    first = min([*mask.layers, *(edit.layer for edit in edits)])
    tokens = sum(len(sequence) for sequence in sequences)
    answers: dict[int, Answers] = {}
    ground.prepare(sequences)
    base = Stream.board(ground, sequences)
    streams = {"base": base}
    for index in range(ground.anatomy.depth):
        if index == first:
            streams |= {"reference": base.fork(), "folded": base.fork()}
        with ground.layer(index) as layer:
            base.step(index, layer)
            if index >= first:
                step_masked(ground, mask, streams["reference"], index, layer, edited.tokens)
                folded = streams["folded"]
                if index in edited.directions:
                    v = edited.directions[index].detector
                    answers[index] = Answers.of(tokens_at(folded, index, layer), v)
                here = [edit for edit in edits if edit.layer == index]
                weights = EditedWeights(ground.model, edited.checkpoint, here)
                with weights.active() if here else nullcontext():
                    folded.step(index, layer)
        progress(tokens)
    return streams, answers
