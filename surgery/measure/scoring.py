"""Settings scored side by side: each is an edit in memory, undone exactly afterwards.

What the settings have in common is computed once: the layers before the first target, and for
those that go together the base and the reference of each mask.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.folds.base import Calibration
from surgery.folds.calibrate import Progress, calibrate, sink_directions, towards
from surgery.folds.editing import EditedWeights
from surgery.folds.edits import SinkDirection
from surgery.measure.logits import perplexity
from surgery.measure.quality import measured
from surgery.measure.trial import VARIANTS, Edited, travel
from surgery.method.mask import Mask, attention_targets
from surgery.models.distributions import compare_runs
from surgery.models.journey import Stream
from surgery.patient.locating import choose_mask, magnitudes_at
from surgery.patient.patient import WIDTHS, Patient
from surgery.settings import Settings

if TYPE_CHECKING:
    from surgery.measure.task_scores import TaskRow
    from surgery.measure.tasks import TaskScorer

logger = logging.getLogger(__name__)

# Memory of the residual streams that go side by side, bytes.
STREAMS_BYTES = 2**30
_PAIRS = (("reference", "folded"), ("base", "folded"))


class Touched(SurgeryError):
    """The model did not come back from an edit as it was."""

    def __init__(self) -> None:
        super().__init__(
            "The model in memory is not what it was before the sweep, so the figures cannot be "
            "trusted; please report this."
        )


@dataclass(frozen=True)
class Figures:
    """What one setting did on the held-out text.

    Attributes:
        perplexity: of the edited model.
        against_base: perplexity relative to base, minus 1.
        kl_from_reference: from the paper's reference with the same mask, nats per position.
        kl_from_base: likewise.
        reference_perplexity: of that reference.
        base_perplexity: of the base.
        target_layers: that are masked.
        dimensions: in S, per layer.
        tokens: of the text.
        seconds: that scoring took.
        tasks: scores, each task by its first metric.
        task_error: mean over the tasks of 1 minus the score (of the score itself where lower is
            better); None without tasks.
        base_task_error: the same of the base.
    """

    perplexity: float
    against_base: float
    kl_from_reference: float
    kl_from_base: float
    reference_perplexity: float
    base_perplexity: float
    target_layers: tuple[int, ...]
    dimensions: int
    tokens: int
    seconds: float
    tasks: tuple[TaskFigure, ...] = ()
    task_error: float | None = None
    base_task_error: float | None = None


@dataclass(frozen=True)
class TaskFigure:
    """A task's score with the edit, and its difference from base with the 95 % interval.

    Attributes:
        task: its name.
        metric: which the score is of.
        documents: that were run.
        score: with the edit.
        base: without.
        difference: mean over the documents.
        low: lower bound of its interval.
        high: upper bound.
        verdict: what the interval shows.
    """

    task: str
    metric: str
    documents: int
    score: float
    base: float
    difference: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class _Prepared:
    """A setting that is about to be scored."""

    settings: Settings
    edited: Edited
    touched: Sequence[str]


class Scorer:
    """A model, what all settings share, and proof that a loaded one stays what it is."""

    def __init__(
        self,
        patient: Patient,
        layer: int,
        common: Settings,
        text: str | None,
        tasks: TaskScorer | None = None,
    ) -> None:
        """Prepare what all settings share.

        Args:
            patient: whose weights are edited, in memory.
            layer: the ME Layer.
            common: everything but the settings that are swept.
            text: a file to measure on in place of the bundled held-out text.
            tasks: run on every setting too.
        """
        self._tasks = tasks
        self._patient, self._anatomy = patient, patient.anatomy
        self._common, self._layer = common, layer
        self._every_target = attention_targets(layer, self._anatomy.attends, "all")
        if text is None:  # what the gate of `convert` measures on
            self._sequences = patient.held_out_mixture(common.check_tokens).sequences
        else:
            self._sequences = patient.held_out(common.check_tokens, text=text)
        self._start: Stream | None = None
        self._calibration_start: Stream | None = None
        self._whole: dict[bool, Calibration] = {}
        self._magnitudes: dict[int, NDArray[np.float64]] | None = None
        self._sums: dict[str, int] = {}
        self._known: dict[Settings, Figures | SurgeryError] = {}
        self._hash = hash_parameters(patient.model) if self._loaded else None

    @property
    def _loaded(self) -> bool:
        """Whether the model is in memory whole, so that an edit could stay in it."""
        return self._tasks is not None or not self._patient.streams

    def score(self, settings: Settings, expected: Sequence[Settings] = ()) -> Figures:
        """The figures that the quality gate of `convert` would show for these settings.

        Args:
            settings: to be scored.
            expected: what will be asked for next. As many of them as memory allows go along, and
                their figures are known when they are asked for.

        Raises:
            SurgeryError: where these settings cannot be scored.
        """
        if settings not in self._known:
            self._score_together([settings, *expected])
        found = self._known.pop(settings)
        if isinstance(found, SurgeryError):
            raise found
        return found

    def require_untouched(self) -> None:
        """Raise Touched unless every loaded parameter holds the bytes it held at the start."""
        if self._hash is not None and hash_parameters(self._patient.model) != self._hash:
            raise Touched

    def _score_together(self, wanted: Sequence[Settings]) -> None:
        begun, together = time.perf_counter(), list[_Prepared]()
        for settings in dict.fromkeys(wanted):
            if settings in self._known:
                continue
            if len(together) >= self._room:
                break
            try:
                together.append(self._prepare(settings))
            except SurgeryError as error:
                self._known[settings] = error
                if not together:
                    return
        figures = self._travel(together)
        for prepared, found in zip(together, figures, strict=True):
            tasks = self._score_tasks(prepared)
            self._require_restored(prepared.touched)
            seconds = (time.perf_counter() - begun) / len(together)
            self._known[prepared.settings] = replace(found, seconds=seconds, **tasks)
        logger.debug("scored %d settings side by side", len(together))

    @property
    def _room(self) -> int:
        """How many settings go side by side: each has a stream, and perhaps a reference."""
        numbers = sum(map(len, self._sequences)) * self._anatomy.hidden_size
        width = WIDTHS[self._patient.loading.dtype]
        return max(1, STREAMS_BYTES // (2 * width * numbers))

    def _prepare(self, settings: Settings) -> _Prepared:
        targets = attention_targets(self._layer, self._anatomy.attends, settings.scope)
        mask = choose_mask(self._patient, targets, settings.selection, self._ranks(settings))
        fold = settings.fold_used
        touched = fold.touched(self._anatomy, mask)
        self._remember(touched)
        calibration = self._calibrate(mask) if fold.calibrates else Calibration()
        edits = fold.edits(self._anatomy, mask, calibration)
        return _Prepared(settings, Edited(self._patient.plain, mask, edits), touched)

    def _travel(self, together: Sequence[_Prepared]) -> list[Figures]:
        ground = self._patient.ground
        if self._start is None:
            self._start = towards(ground, self._sequences, self._every_target[0])
        edits = [prepared.edited for prepared in together]
        streams = travel(ground, edits, self._sequences, start=self._start)
        return [
            self._figures(edited, streams.variants(number)) for number, edited in enumerate(edits)
        ]

    def _figures(self, edited: Edited, streams: Mapping[str, Stream]) -> Figures:
        losses, divergences = dict.fromkeys(VARIANTS, 0.0), dict.fromkeys(_PAIRS, 0.0)
        found = compare_runs(streams, _PAIRS)
        for batch, one in zip(streams["base"].batches, found, strict=True):
            predicted = batch.real.clone()
            predicted[:, :-1] &= batch.real[:, 1:]
            predicted[:, -1] = False
            for name in VARIANTS:
                losses[name] += float(one.loss(name)[predicted].sum())
            for pair in _PAIRS:
                divergences[pair] += float(one.divergence(pair)[batch.real].sum())
        positions = sum(map(len, self._sequences))
        count = positions - len(self._sequences)
        kls = [divergences[known, "folded"] / positions for known in ("reference", "base")]
        folded = measured("folded", losses["folded"], losses["base"], count, *kls)
        mask = edited.mask
        return Figures(
            perplexity=folded.perplexity,
            against_base=folded.against_base,
            kl_from_reference=folded.kl_from_reference,
            kl_from_base=folded.kl_from_base,
            reference_perplexity=perplexity(losses["reference"] / count),
            base_perplexity=perplexity(losses["base"] / count),
            target_layers=mask.layers,
            dimensions=len(mask.dimensions[mask.layers[0]]),
            tokens=positions,
            seconds=0.0,
        )

    def _score_tasks(self, prepared: _Prepared) -> dict[str, Any]:
        if self._tasks is None:
            return {}
        edited = prepared.edited
        weights = EditedWeights(self._patient.model, edited.checkpoint, edited.edits)
        return task_figures(self._tasks.score(weights.active))

    def _ranks(self, settings: Settings) -> dict[int, NDArray[np.float64]] | None:
        """What `activation` ranks by, the same for every rate and scope."""
        if settings.select == "activation" and self._magnitudes is None:
            text = self._patient.calibration()
            self._magnitudes = magnitudes_at(self._patient, self._every_target, text)
        return self._magnitudes if settings.select == "activation" else None

    def _calibrate(self, mask: Mask) -> Calibration:
        first = self._every_target[0]
        whole = mask.layers == (first,)

        def directed(nulled: bool, progress: Progress) -> Calibration:
            if not whole:
                return self._directions(mask, nulled, progress)
            if nulled not in self._whole:
                # Nothing is edited before the first target, so its direction depends on S only in
                # which entries of the center are used: all of them are kept here.
                every = {first: tuple(range(mask.hidden_size))}
                of_all = Mask(mask.hidden_size, mask.select, 1.0, every)
                self._whole[nulled] = self._directions(of_all, nulled, progress)
            known = self._whole[nulled]
            sink = known.directions[first]
            center = sink.center[list(mask.dimensions[first])]
            return replace(known, directions={first: SinkDirection(center, sink.detector)})

        return calibrate(self._patient, mask, directed)

    def _directions(self, mask: Mask, nulled: bool, progress: Progress) -> Calibration:
        sequences, _ = self._patient.calibration_text()
        ground = self._patient.ground
        if self._calibration_start is None:
            self._calibration_start = towards(ground, sequences, self._every_target[0])
        return Calibration(
            *sink_directions(
                ground,
                self._patient.plain,
                mask,
                sequences,
                start=self._calibration_start,
                nulled=nulled,
                progress=progress,
            )
        )

    def _remember(self, touched: Sequence[str]) -> None:
        """Sums of the parameters that are about to be edited for the first time."""
        for name in touched if self._loaded else ():
            if name not in self._sums:
                self._sums[name] = sum_of_bytes(self._patient.model.get_parameter(name))

    def _require_restored(self, touched: Sequence[str]) -> None:
        for name in touched if self._loaded else ():
            if sum_of_bytes(self._patient.model.get_parameter(name)) != self._sums[name]:
                raise Touched


def task_figures(rows: Sequence[TaskRow]) -> dict[str, Any]:
    """The fields of `Figures` that are about tasks, from the rows of "base" and "edited"."""
    if not rows:
        return {}
    first = {row.task: row for row in reversed(rows)}
    chosen = [first[task] for task in dict.fromkeys(row.task for row in rows)]

    def error(name: str) -> float:
        scores = [(row.variants[name].mean, row.higher_is_better) for row in chosen]
        return sum(1.0 - mean if higher else mean for mean, higher in scores) / len(scores)

    figures = []
    for row in chosen:
        edited = row.variants["edited"]
        change = edited.difference
        assert change is not None
        figures.append(
            TaskFigure(
                row.task, row.metric, row.n, edited.mean, row.variants["base"].mean,
                change.difference, change.low, change.high, change.verdict,
            )
        )  # fmt: skip
    return {
        "tasks": tuple(figures),
        "task_error": error("edited"),
        "base_task_error": error("base"),
    }


def sum_of_bytes(parameter: torch.Tensor) -> int:
    """The sum of a tensor's 16-bit words: cheap, on its own device."""
    return int(parameter.detach().contiguous().view(torch.int16).sum(dtype=torch.int64))


def hash_parameters(model: Any) -> str:
    """sha256 over every parameter's name and bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        words = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(words.numpy()))
    return digest.hexdigest()
