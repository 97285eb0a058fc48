"""The quality gate of a fold: base, the paper's reference and the folded weights on one text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from surgery.errors import QualityGate, SurgeryError
from surgery.folds.base import Calibration, Fold
from surgery.folds.calibrate import LeakWatcher
from surgery.folds.editing import EditedWeights
from surgery.folds.edits import Edit
from surgery.folds.registry import FOLDS
from surgery.measure.logits import Context
from surgery.measure.quality import Measured, Quality, measure, require_quality
from surgery.method.mask import Mask
from surgery.models.masking import wemask
from surgery.patient.patient import Patient
from surgery.settings import Settings

logger = logging.getLogger(__name__)


def measure_fold(
    patient: Patient,
    mask: Mask,
    edits: Sequence[Edit],
    calibration: Calibration,
    tokens: int,
) -> tuple[Quality, Calibration]:
    """What edits do to a patient on held-out text, and the calibration with its leak there.

    Args:
        patient: whose weights are edited, in memory.
        mask: of the reference.
        edits: of the fold.
        calibration: of the fold.
        tokens: of text, at most about.
    """
    model = patient.model
    sequences = patient.held_out(tokens)
    watcher = LeakWatcher(model, patient.anatomy, calibration.directions)
    weights = EditedWeights(model, patient.plain, edits)

    @contextmanager
    def folded() -> Iterator[None]:
        with weights.active(), watcher.watch():
            yield

    reference = partial(wemask, model, mask, anatomy=patient.anatomy)
    variants: dict[str, Context] = {
        "base": nullcontext, "reference": reference, "folded": folded
    }  # fmt: skip
    total = sum(len(sequence) for sequence in sequences)
    with patient.reporter.bar("Measuring base, reference and fold", total) as advance:
        quality = measure(
            model, patient.anatomy, sequences, min(mask.layers), variants, progress=advance
        )
    logger.info(
        "perplexity of the fold: %+.2f %% against base", 100 * quality["folded"].against_base
    )
    return quality, Calibration(calibration.directions, watcher.leaks())


def passes(patient: Patient, mask: Mask, quality: Quality, settings: Settings) -> bool:
    """Whether a fold is as good as allowed; False where it had to be forced.

    Raises:
        QualityGate: where it is worse and `--force` is not given; it names a fold that does better.
    """
    fold = settings.fold_used
    try:
        require_quality(quality, fold.name, settings.max_degradation, None)
    except QualityGate:
        if settings.force:
            return False
        better = _alternative(patient, mask, fold, settings.check_tokens)
        require_quality(quality, fold.name, settings.max_degradation, better)
    return True


def _alternative(
    patient: Patient, mask: Mask, fold: Fold, tokens: int
) -> tuple[str, Measured] | None:
    """How a fold that reaches fewer tokens does on the same text, for the error message."""
    other = next((one for one in FOLDS.values() if one.tokens == "first"), None)
    if fold.tokens == "first" or other is None:
        return None
    try:
        patient.reporter.say(
            f"Too much degradation; measuring the {other.name} fold for comparison"
        )
        calibration = other.calibrate(patient, mask)
        edits = other.edits(patient.anatomy, mask, calibration)
        quality, _ = measure_fold(patient, mask, edits, Calibration(), tokens)
    except SurgeryError:
        return None
    return other.name, quality["folded"]
