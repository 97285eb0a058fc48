"""Benchmark tasks, run by lm-evaluation-harness on every model under one recorded configuration.

The scores are the harness's own: each model is handed to `simple_evaluate`, and the per-document
results it logs are paired by document here. Under `accelerate launch` every process takes its
share of the documents, and the first one reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    nullcontext,
)
from functools import partial
from typing import Any

from surgery.files.checkpoint import Checkpoint
from surgery.measure.task_host import make_host
from surgery.measure.task_loading import LoadedTasks, load_tasks
from surgery.measure.task_scores import Run, TaskRow, score_rows
from surgery.measure.task_settings import TaskSettings
from surgery.method.mask import Mask
from surgery.patient.patient import Patient
from surgery.reporter import SILENT


def run_tasks(
    loaded: LoadedTasks,
    patient: Patient,
    references: Mapping[str, Mask],
    edited: Sequence[tuple[str, Checkpoint]],
    notes: list[str],
) -> tuple[tuple[TaskRow, ...], dict[str, Any]]:
    """All tasks on base, references and edited checkpoints, one model in memory at a time.

    Returns the rows and the configuration that all models ran under. Under `accelerate launch`
    only the first process gets rows.
    """
    from surgery.models.masking import wemask  # imports torch

    options = loaded.settings
    host, recorded = make_host(loaded, patient, patient.reporter)
    runs: dict[str, Run] = {}
    with host.model(patient.checkpoint, notes) as lm:
        runs["base"] = host.run("base", lm, nullcontext)
        for name, mask in references.items():
            if options.backend == "vllm":
                notes.append("vLLM takes no hooks, so the reference did not run the tasks.")
                break
            hooks = partial(wemask, lm.model, mask, anatomy=patient.anatomy)
            runs[name] = host.run(name, lm, hooks)
    patient.release()
    for name, checkpoint in edited:
        lm = None  # one model at a time
        with host.model(checkpoint, notes) as lm:
            runs[name] = host.run(name, lm, nullcontext)
    if any(run.samples == {} for run in runs.values()):
        return (), recorded
    rows = tuple(
        row for name, leaves in loaded.rows for row in score_rows(name, leaves, loaded, runs)
    )
    deterministic = sorted({row.task for row in rows if row.deterministic})
    if deterministic and len(options.seeds) > 1:
        notes.append(
            f"Seeds change nothing in {', '.join(deterministic)} (no sampling), so these ran once "
            "and have no deviation over seeds."
        )
    compared = sum(len(row.variants) - 1 for row in rows)
    if compared > 1:
        notes.append(
            f"{compared} differences were tested at 95 % each: about {compared * 0.05:.1g} would "
            "be called better or worse by chance alone."
        )
    return rows, recorded


class TaskScorer:
    """Tasks on one loaded model: as it is, and under edits in memory."""

    def __init__(self, options: TaskSettings, patient: Patient) -> None:
        """Runs the tasks on the model as it is; every edit is compared with that."""
        # Silently: this runs once for every point of a sweep.
        self._loaded, self._patient = load_tasks(options, SILENT), patient
        self._host, self.configuration = make_host(self._loaded, patient, SILENT)
        self._base = self._run("base", nullcontext)

    def score(self, context: Callable[[], AbstractContextManager[Any]]) -> tuple[TaskRow, ...]:
        """Rows of "base" and "edited", which is the model within the context."""
        runs = {"base": self._base, "edited": self._run("edited", context)}
        return tuple(
            row
            for name, leaves in self._loaded.rows
            for row in score_rows(name, leaves, self._loaded, runs)
        )

    @property
    def documents(self) -> str:
        """sha256 over the documents that were run, which other workers must run too."""
        found = {
            task: [document["doc_hash"] for document in runs[0]]
            for task, runs in sorted(self._base.samples.items())
        }
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _run(self, name: str, context: Callable[[], AbstractContextManager[Any]]) -> Run:
        with self._host.model(self._patient.checkpoint, []) as lm:
            return self._host.run(name, lm, context)
