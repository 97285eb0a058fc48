"""Many settings of a conversion on one loaded model: which is best, and at what price.

The points are rates × scopes × folds × selections × strengths, each an edit in memory. An optuna
study holds what came out of them, so that a sweep goes on where it was killed, and any number of
workers share it: `surgery.sweeping`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from surgery.errors import BadSettings
from surgery.files.paths import expanded
from surgery.files.text import write_text
from surgery.jobs.convert import convert
from surgery.measure.task_settings import TaskSettings, task_settings
from surgery.patient.patient import Patient
from surgery.report.plots import SweptPoint, plot_sweep
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings
from surgery.sweeping.plan import RATES, SCORES, Plan, default_folds, varied
from surgery.sweeping.queue import SharedStudy
from surgery.sweeping.result import (
    FIGURE,
    RESULTS,
    STUDY,
    Row,
    Sweep,
    collect,
    for_convert,
    make_folder,
)
from surgery.sweeping.workers import finish

__all__ = ["FIGURE", "RESULTS", "Row", "Sweep", "sweep"]

logger = logging.getLogger(__name__)

CHECK_TOKENS = 2048


def sweep(
    model: str,
    *,
    rates: Sequence[float] = RATES,
    scopes: Sequence[str] = ("first", "all"),
    folds: Sequence[str] | None = None,
    selects: Sequence[str] = ("weight", "activation", "random"),
    strengths: Sequence[float] = (1.0,),
    score: str = "perplexity",
    text: str | None = None,
    output: str | Path | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    jobs: int = 1,
    trials: int | None = None,
    convert_best: str | Path | None = None,
    layer: int | None = Settings.layer,
    seed: int = Settings.seed,
    check_tokens: int = CHECK_TOKENS,
    calibration: str | None = Settings.calibration,
    calibration_tokens: int = Settings.calibration_tokens,
    revision: str | None = Settings.revision,
    device: str | None = Settings.device,
    dtype: str = Settings.dtype,
    stream: bool | None = Settings.stream,
    trust_remote_code: bool = Settings.trust_remote_code,
    tasks: Sequence[str] = (),
    data: str | None = TaskSettings.data,
    limit: int | None = TaskSettings.limit,
    batch_size: str | None = TaskSettings.batch_size,
    seeds: tuple[int, ...] = TaskSettings.seeds,
    max_new_tokens: int | None = TaskSettings.max_new_tokens,
    temperature: float | None = TaskSettings.temperature,
    chat_template: bool | None = TaskSettings.chat_template,
    thinking: bool = TaskSettings.thinking,
    backend: str = TaskSettings.backend,
    reporter: Reporter = SILENT,
) -> Sweep:
    """Score every combination of settings on one model; results.json and a figure.

    A sweep that was interrupted goes on where it was. What prevents one point stands in its row.

    Args:
        model: a folder, a Hub id, a .gguf file or "demo".
        rates: shares of dimensions to mask.
        scopes: of "first" and "all".
        folds: by default `norm` (`qkv` where that is not possible) and `sink`.
        selects: of "weight", "activation" and "random".
        strengths: γ.
        score: "perplexity", "kl" or "tasks" (the mean error on lm-eval tasks), each minimised.
        text: a file to measure on in place of the bundled held-out text.
        output: folder of the results; by default ./<name>-sweep.
        storage: the study's database, by default an SQLite file in `output`; workers on several
            machines share a postgresql:// one.
        study_name: of the study in its database; by default <name>-sweep.
        jobs: local processes, each on a device of its own where there are several.
        trials: search so many points (TPE) instead of the whole grid.
        convert_best: a folder to convert to with the best settings.
        layer, seed, check_tokens, calibration, calibration_tokens: as in `Settings`.
        revision, device, dtype, stream, trust_remote_code: as in `Loading`.
        tasks: which decide, where the score is "tasks".
        data, limit, batch_size, seeds, max_new_tokens: as in `TaskSettings`.
        temperature, chat_template, thinking, backend: as in `TaskSettings`.
        reporter: whom to tell.

    Raises:
        BadSettings: the study was made with other settings.
        SurgeryError: for what prevents every point.
    """
    given = locals()
    if jobs < 1:
        raise BadSettings("--jobs must be at least 1.")
    common = Settings.gathered(given)
    patient = Patient.admit(model, common.loading, reporter)
    values = varied(
        common,
        rate=rates,
        scope=scopes,
        fold=default_folds(patient) if folds is None else folds,
        select=selects,
        strength=strengths,
    )
    chosen = task_settings(given)
    plan = Plan(common, values, score, text, trials, chosen)
    plan.check(patient)
    origin = patient.checkpoint.origin
    name = origin.name.rsplit("/", 1)[-1]
    folder = expanded(f"{name}-sweep" if output is None else output)
    make_folder(folder, patient.checkpoint.sources)
    url = storage or f"sqlite:///{(folder / STUDY).absolute()}"
    shared = SharedStudy(url, study_name or f"{name}-sweep", plan.space, common.seed)
    shared.agree(plan.facts(origin), "the given storage" if storage else str(folder))
    finish(plan, patient, shared, jobs)
    found = collect(plan, shared, origin, folder)
    _write(found)
    if convert_best is not None and found.best is not None:
        best = asdict(found.best.point.settings(for_convert(common)))
        logger.info("converting with the best settings to %s", convert_best)
        found = replace(found, converted=convert(output=convert_best, reporter=reporter, **best))
        _write(found)
    return found


def _write(found: Sweep) -> None:
    """Results and figure, each whole, also where another process of the sweep ends just now."""
    with tempfile.TemporaryDirectory(prefix=f"{STUDY}.", dir=found.output) as made:
        part = Path(made)
        write_text(part / RESULTS, found.as_json())
        if found.best is not None:
            plot_sweep(
                [
                    SweptPoint(**asdict(row.point), score=row.score, on_front=row.on_front)
                    for row in found.rows
                    if row.score is not None
                ],
                part / FIGURE,
                base=found.base_score,
                words=SCORES[found.score].words,
            )
        for path in part.iterdir():
            os.replace(path, found.output / path.name)
