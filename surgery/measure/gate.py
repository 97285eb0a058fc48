"""The quality gate of a fold: base, the paper's reference and the folded weights on one text."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from surgery.errors import QualityGate, SurgeryError
from surgery.folds.base import Calibration, Fold
from surgery.folds.edits import Edit
from surgery.folds.registry import FOLDS
from surgery.measure.quality import Measured, Quality, require_quality, summary
from surgery.measure.stopping import look, looks
from surgery.measure.trial import Edited, Trial, run_trial
from surgery.method.mask import Mask
from surgery.patient.mixture import alternating
from surgery.patient.patient import Patient
from surgery.settings import Settings

logger = logging.getLogger(__name__)


def measure_fold(
    patient: Patient,
    mask: Mask,
    edits: Sequence[Edit],
    calibration: Calibration,
    settings: Settings,
) -> tuple[Quality, Calibration]:
    """What edits do to a patient on held-out text, and the calibration with its leak there.

    The text is measured until it is clear on which side of the limit the fold lies, or to its end
    (`measure.stopping`).

    Args:
        patient: whose weights are edited, in memory.
        mask: of the reference.
        edits: of the fold.
        calibration: of the fold.
        settings: how much text at most, and the limit.
    """
    fold, limit = settings.fold_used, math.log1p(settings.max_degradation)
    sequences = text_for(patient, fold, settings.check_tokens)
    lengths = [len(sequence) for sequence in sequences]
    ends = [len(sequences)] if settings.fixed else looks(lengths)
    edited = Edited(patient.plain, mask, edits, calibration.directions)
    trial, found = Trial(), None
    work = sum(lengths) * patient.anatomy.depth
    with patient.reporter.bar("Measuring base, reference and fold", work) as advance:
        for begin, end in pairwise([0, *ends]):
            trial += run_trial(patient.ground, edited, sequences[begin:end], progress=advance)
            losses = [[one.losses[name] for one in trial.sequences] for name in ("base", "folded")]
            found = look(losses[0], losses[1], len(ends))
            if found.decides(limit):
                break
    assert found is not None
    quality = summary(trial, found, len(ends), limit, patient.tokenizer)
    logger.info(
        "perplexity of the fold: %+.2f %% against base on %d tokens",
        100 * quality["folded"].against_base,
        quality.tokens,
    )
    leaks = {
        layer: replace(
            answers.leak,
            plain=calibration.leaks[layer].plain if layer in calibration.leaks else None,
            null=calibration.leaks[layer].null if layer in calibration.leaks else None,
        )
        for layer, answers in trial.answers.items()
    }
    return quality, Calibration(calibration.directions, leaks)


def text_for(patient: Patient, fold: Fold, tokens: int) -> list[list[int]]:
    """Held-out text in the order in which it is measured.

    A fold that depends on what a token looks like is shown late tokens first, in which ordinary
    tokens may look like the sink.
    """
    mixture = patient.held_out_mixture(tokens)
    early = alternating(mixture.short, mixture.chats)
    return [*early, *mixture.long] if fold.exact else [*mixture.long, *early]


def passes(patient: Patient, mask: Mask, quality: Quality, settings: Settings) -> bool:
    """Whether a fold is as good as allowed; False where it had to be forced.

    Raises:
        QualityGate: where it is worse and `--force` is not given; it names a fold that does better.
    """
    fold = settings.fold_used
    try:
        require_quality(quality, fold, settings.max_degradation, None)
    except QualityGate:
        if settings.force:
            return False
        better = _alternative(patient, mask, settings)
        require_quality(quality, fold, settings.max_degradation, better)
    return True


def _alternative(patient: Patient, mask: Mask, settings: Settings) -> tuple[str, Measured] | None:
    """How a fold that reaches fewer tokens does, for the error message."""
    other = next((one for one in FOLDS.values() if one.tokens == "first"), None)
    if settings.fold_used.tokens == "first" or other is None:
        return None
    try:
        patient.reporter.say(
            f"Too much degradation; measuring the {other.name} fold for comparison"
        )
        calibration = other.calibrate(patient, mask)
        edits = other.edits(patient.anatomy, mask, calibration)
        instead = replace(settings, fold=other.name)
        quality, _ = measure_fold(patient, mask, edits, Calibration(), instead)
    except SurgeryError:
        return None
    return other.name, quality["folded"]
