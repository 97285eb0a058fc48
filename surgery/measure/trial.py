"""Base, the paper's references and folded weights side by side through the layers of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.files.checkpoint import Checkpoint
from surgery.folds.calibrate import Answers, tokens_at, towards
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

    @property
    def first(self) -> int:
        """The first layer that differs from the base's."""
        return min([*self.mask.layers, *(edit.layer for edit in self.edits)])

    def same_reference(self, other: Edited) -> bool:
        """Whether another edit has the same reference."""
        return self.mask == other.mask and self.tokens == other.tokens


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
    travelled = travel(ground, [edited], sequences, progress=progress)
    streams = travelled.variants(0)
    found: list[Sequenced | None] = [None] * len(sequences)
    for batch, measured in zip(streams["base"].batches, compare_runs(streams, PAIRS), strict=True):
        for row, (place, length) in enumerate(zip(batch.places, batch.lengths, strict=True)):
            found[place] = Sequenced(
                tuple(sequences[place]),
                {name: measured.loss(name)[row, : length - 1].cpu().numpy() for name in VARIANTS},
                {pair: measured.divergence(pair)[row, :length].cpu().numpy() for pair in PAIRS},
            )
    return Trial(tuple(one for one in found if one is not None), travelled.answers[0])


@dataclass(frozen=True)
class Travelled:
    """Streams that have passed the last layer.

    Attributes:
        base: of the model as it is.
        references: of each edit; one object for edits of the same mask.
        folded: of each edit.
        answers: of each edit's detectors, by layer.
    """

    base: Stream
    references: Sequence[Stream]
    folded: Sequence[Stream]
    answers: Sequence[Mapping[int, Answers]]

    def variants(self, number: int) -> dict[str, Stream]:
        """The streams of one edit by the names in `VARIANTS`."""
        return {
            "base": self.base,
            "reference": self.references[number],
            "folded": self.folded[number],
        }


def travel(
    ground: Ground,
    edits: Sequence[Edited],
    sequences: Sequence[Sequence[int]],
    *,
    start: Stream | None = None,
    wanted: Container[str] = VARIANTS,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> Travelled:
    """Base, references and folds side by side to the end; each layer is entered once.

    Args:
        ground: the model.
        edits: what is done to it, each in streams of its own from the first edited layer on.
        sequences: token ids.
        start: the streams at the input of the first edited layer, where they are known.
        wanted: the variants that are taken to the end; the others stay behind.
        progress: called after every layer with the tokens that passed it.
    """
    first = min(edit.first for edit in edits)
    tokens = sum(len(sequence) for sequence in sequences)
    if start is None:
        base = towards(ground, sequences, first, lambda: progress(tokens))
    else:
        ground.prepare(sequences)  # for the head, after other texts
        base = start.fork()
    references = _references(base, edits)
    folded = [base.fork() for _ in edits]
    answers: list[dict[int, Answers]] = [{} for _ in edits]
    for index in range(first, ground.anatomy.depth):
        with ground.layer(index) as layer:
            if "base" in wanted:
                base.step(index, layer)
            for edit, stream in _once(edits, references) if "reference" in wanted else ():
                step_masked(ground, edit.mask, stream, index, layer, edit.tokens)
            if "folded" in wanted:
                for edit, stream, found in zip(edits, folded, answers, strict=True):
                    _step_edited(ground, edit, stream, index, layer, found)
        progress(tokens)
    return Travelled(base, references, folded, answers)


def _references(base: Stream, edits: Sequence[Edited]) -> list[Stream]:
    """A stream for each edit, the same one for those of the same mask."""
    found: list[Stream] = []
    for number, edit in enumerate(edits):
        twins = (place for place in range(number) if edits[place].same_reference(edit))
        twin = next(twins, None)
        found.append(base.fork() if twin is None else found[twin])
    return found


def _once(edits: Sequence[Edited], streams: Sequence[Stream]) -> list[tuple[Edited, Stream]]:
    """Each stream once, with an edit that it belongs to."""
    by_stream = {id(stream): (edit, stream) for edit, stream in zip(edits, streams, strict=True)}
    return list(by_stream.values())


def _step_edited(
    ground: Ground,
    edited: Edited,
    stream: Stream,
    index: int,
    layer: torch.nn.Module,
    answers: dict[int, Answers],
) -> None:
    """Run a stream through a layer with its edited weights."""
    if index in edited.directions:
        v = edited.directions[index].detector
        answers[index] = Answers.of(tokens_at(stream, index, layer), v)
    here = [edit for edit in edited.edits if edit.layer == index]
    weights = EditedWeights(ground.model, edited.checkpoint, here)
    with weights.active() if here else nullcontext():
        stream.step(index, layer)
