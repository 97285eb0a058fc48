"""Settings scored on one loaded model: each is an edit in memory, undone exactly afterwards.

What the settings have in common is computed once: the layers before the first target, base's
log-probabilities, and the reference's for as long as the mask stays the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.folds.base import Calibration
from surgery.folds.calibrate import sink_directions, towards
from surgery.folds.editing import EditedWeights
from surgery.folds.edits import SinkDirection
from surgery.measure.logits import Batch, Context, make_batches, perplexity
from surgery.measure.quality import SharedPrefix, measured
from surgery.method.mask import Mask, attention_targets
from surgery.models.ground import Loaded
from surgery.models.journey import Stream
from surgery.models.masking import wemask
from surgery.models.observe import device_of, sink_magnitudes
from surgery.patient.locating import choose_mask
from surgery.patient.patient import Patient
from surgery.settings import Settings

if TYPE_CHECKING:
    from surgery.measure.task_scores import TaskRow
    from surgery.measure.tasks import TaskScorer

logger = logging.getLogger(__name__)

# Log-probabilities of base, and of the reference, that are kept: so many numbers each.
KEPT_NUMBERS = 256_000_000


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


class Kept:
    """One variant's log-probabilities and losses by batch, kept as far as memory is meant to go."""

    def __init__(self, make: Callable[[int], torch.Tensor], batches: list[Batch]) -> None:
        self._make, self._batches = make, batches
        self._logs: dict[int, torch.Tensor] = {}
        self._losses: dict[int, float] = {}
        self._room = KEPT_NUMBERS

    def logs(self, number: int) -> torch.Tensor:
        """Log-probabilities of a batch, made again where there was no room to keep them."""
        logs = self._logs.get(number)
        if logs is None:
            logs = self._make(number)
            if number not in self._losses:
                self._losses[number] = self._batches[number].loss(logs)
            if logs.numel() <= self._room:
                self._room -= logs.numel()
                self._logs[number] = logs
        return logs

    @property
    def loss(self) -> float:
        """Summed loss of all batches, in nats; each batch was asked for before."""
        return sum(self._losses[number] for number in range(len(self._batches)))


class Scorer:
    """A loaded model, what all settings share, and proof that the model stays what it is."""

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
        model = patient.model
        self._every_target = attention_targets(layer, self._anatomy.attends, "all")
        stop = self._every_target[0]
        if text is None:  # what the gate of `convert` measures on
            sequences = patient.held_out_mixture(common.check_tokens).sequences
        else:
            sequences = patient.held_out(common.check_tokens, text=text)
        vocabulary = model.config.get_text_config().vocab_size
        self._batches = list(make_batches(sequences, vocabulary, device_of(model)))
        self._positions = sum(batch.positions for batch in self._batches)
        self._predicted = sum(batch.predicted for batch in self._batches)
        self._prefix = SharedPrefix(model, self._anatomy, stop)
        self._calibration_start: Stream | None = None
        self._base = Kept(self._base_logs, self._batches)
        self._reference: tuple[Mask, Kept] | None = None
        self._recorded: set[int] = set()
        self._magnitudes: dict[int, NDArray[np.float64]] | None = None
        self._whole_sink: SinkDirection | None = None
        self._sums: dict[str, int] = {}
        self.parameters = hash_parameters(model)

    def score(self, settings: Settings) -> Figures:
        """The figures that the quality gate of `convert` would show for these settings."""
        start = time.perf_counter()
        model, checkpoint = self._patient.model, self._patient.plain
        targets = attention_targets(self._layer, self._anatomy.attends, settings.scope)
        mask = choose_mask(self._patient, targets, settings.selection, self._ranks(settings))
        fold = settings.fold_used
        touched = fold.touched(self._anatomy, mask)
        self._remember(touched)
        calibration = Calibration(self._sinks(mask)) if fold.calibrates else Calibration()
        edits = fold.edits(self._anatomy, mask, calibration)
        weights = EditedWeights(model, checkpoint, edits)
        reference = self._reference_of(mask)
        loss = from_reference = from_base = 0.0
        for number, batch in enumerate(self._batches):
            known = self._base.logs(number)
            logs = self._run(number, weights.active)
            loss += batch.loss(logs)
            from_base += batch.divergence(known, logs)
            del known
            from_reference += batch.divergence(reference.logs(number), logs)
        logger.debug("scored %s on %d tokens", settings.fold, self._positions)
        rows = self._tasks.score(weights.active) if self._tasks is not None else ()
        self._require_restored(touched)
        base, predicted, positions = self._base.loss, self._predicted, self._positions
        folded = measured(
            "folded", loss, base, predicted, from_reference / positions, from_base / positions
        )
        return Figures(
            perplexity=folded.perplexity,
            against_base=folded.against_base,
            kl_from_reference=folded.kl_from_reference,
            kl_from_base=folded.kl_from_base,
            reference_perplexity=perplexity(reference.loss / predicted),
            base_perplexity=perplexity(base / predicted),
            target_layers=mask.layers,
            dimensions=len(mask.dimensions[mask.layers[0]]),
            tokens=positions,
            seconds=time.perf_counter() - start,
            **task_figures(rows),
        )

    def require_untouched(self) -> None:
        """Raise Touched unless every parameter holds the bytes it held at the start."""
        if hash_parameters(self._patient.model) != self.parameters:
            raise Touched

    def _run(self, number: int, variant: Context) -> torch.Tensor:
        with torch.inference_mode(), variant(), self._prefix.replay(number):
            return self._batches[number].log_probabilities(self._patient.model)

    def _base_logs(self, number: int) -> torch.Tensor:
        if number in self._recorded:
            return self._run(number, nullcontext)
        with torch.inference_mode(), self._prefix.record(number):
            logs = self._batches[number].log_probabilities(self._patient.model)
        self._recorded.add(number)
        return logs

    def _reference_of(self, mask: Mask) -> Kept:
        if self._reference is None or self._reference[0] != mask:
            hooks = partial(wemask, self._patient.model, mask, anatomy=self._anatomy)
            self._reference = None  # the old one's memory is free before the new one's is needed
            self._reference = (mask, Kept(partial(self._run, variant=hooks), self._batches))
        return self._reference[1]

    def _ranks(self, settings: Settings) -> dict[int, NDArray[np.float64]] | None:
        """What `activation` ranks by, the same for every rate and scope."""
        if settings.select == "activation" and self._magnitudes is None:
            self._magnitudes = sink_magnitudes(
                self._patient.model,
                self._anatomy,
                self._every_target,
                self._patient.calibration(),
            )
        return self._magnitudes if settings.select == "activation" else None

    def _sinks(self, mask: Mask) -> dict[int, SinkDirection]:
        first = self._every_target[0]
        if mask.layers != (first,):
            return self._calibrate(mask)
        if self._whole_sink is None:
            # Nothing is edited before the first target, so its direction depends on S only in
            # which entries of the center are used: all of them are kept here.
            every = Mask(
                mask.hidden_size, mask.select, 1.0, {first: tuple(range(mask.hidden_size))}
            )
            self._whole_sink = self._calibrate(every)[first]
        whole = self._whole_sink
        return {first: SinkDirection(whole.center[list(mask.dimensions[first])], whole.detector)}

    def _calibrate(self, mask: Mask) -> dict[int, SinkDirection]:
        sequences, _ = self._patient.calibration_text()
        ground = Loaded(self._patient.model, self._anatomy)
        if self._calibration_start is None:
            self._calibration_start = towards(ground, sequences, self._every_target[0])
        directions, _ = sink_directions(
            ground, self._patient.plain, mask, sequences, start=self._calibration_start
        )
        return directions

    def _remember(self, touched: Sequence[str]) -> None:
        """Sums of the parameters that are about to be edited for the first time."""
        for name in touched:
            if name not in self._sums:
                self._sums[name] = sum_of_bytes(self._patient.model.get_parameter(name))

    def _require_restored(self, touched: Sequence[str]) -> None:
        for name in touched:
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
