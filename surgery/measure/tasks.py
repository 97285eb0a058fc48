"""Benchmark tasks, run by lm-evaluation-harness on every model under one recorded configuration.

The scores are the harness's own: each model is handed to `simple_evaluate`, and the per-document
results it logs are paired by document here. Under `accelerate launch` every process takes its
share of the documents, and the first one reports.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.measure.edited import BASE, EDITED, Edited, references_of
from surgery.measure.task_host import Host
from surgery.measure.task_loading import LoadedTasks, load_tasks
from surgery.measure.task_scores import Run, TaskRow, score_rows
from surgery.measure.task_settings import TaskSettings
from surgery.patient.patient import Patient
from surgery.reporter import SILENT

if TYPE_CHECKING:
    from surgery.measure.logits import Context

logger = logging.getLogger(__name__)


def run_tasks(
    loaded: LoadedTasks, base: Patient, edited: Sequence[Edited], notes: list[str]
) -> tuple[tuple[TaskRow, ...], dict[str, Any]]:
    """All tasks on base, references and edited checkpoints, one model in memory at a time.

    Args:
        loaded: the tasks.
        base: what the others are compared with; its model is released.
        edited: of the same architecture and tokenizer.
        notes: of what the results' reader should know; more are put there.

    Returns:
        The rows and the configuration that all models ran under. Under `accelerate launch` only
        the first process gets rows.
    """
    from surgery.models.masking import wemask  # imports torch

    host = Host(loaded, base, base.reporter)
    runs: dict[str, Run] = {}
    with host.model(base, notes) as lm:
        runs[BASE] = host.run(BASE, lm, nullcontext)
        for name, mask in references_of(edited).items():
            if loaded.settings.backend == "vllm":
                notes.append("vLLM takes no hooks, so the reference did not run the tasks.")
                break
            hooks = partial(wemask, lm.model, mask, anatomy=base.anatomy)
            runs[name] = host.run(name, lm, hooks)
            del hooks  # which holds the model
    host.release_base()
    for other in edited:
        with host.model(other.patient, notes) as lm:
            runs[other.name] = host.run(other.name, lm, nullcontext)
    if any(run.samples == {} for run in runs.values()):
        return (), host.recorded
    rows = tuple(_rows(loaded, runs))
    logger.info("%d rows of scores on %d models", len(rows), len(runs))
    deterministic = sorted({row.task for row in rows if row.deterministic})
    if deterministic and len(loaded.settings.seeds) > 1:
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
    return rows, host.recorded


def _rows(loaded: LoadedTasks, runs: Mapping[str, Run]) -> Iterator[TaskRow]:
    for name, leaves in loaded.rows:
        yield from score_rows(name, leaves, loaded, runs)


class TaskScorer:
    """Tasks on one loaded model: as it is, and under edits in memory.

    Attributes:
        configuration: that they run under.
    """

    def __init__(self, options: TaskSettings, patient: Patient) -> None:
        """Run the tasks on the model as it is; every edit is compared with that."""
        # Silently: this runs once for every point of a sweep.
        self._loaded, self._patient = load_tasks(options, SILENT), patient
        self._host = Host(self._loaded, patient, SILENT)
        self.configuration = self._host.recorded
        self._base = self._run(BASE, nullcontext)

    def score(self, context: Context) -> tuple[TaskRow, ...]:
        """Rows of "base" and "edited", which is the model within the context."""
        runs = {BASE: self._base, EDITED: self._run(EDITED, context)}
        return tuple(_rows(self._loaded, runs))

    @property
    def documents(self) -> str:
        """sha256 over the documents that were run, which other workers must run too."""
        found = {
            task: [document["doc_hash"] for document in runs[0]]
            for task, runs in sorted(self._base.samples.items())
        }
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _run(self, name: str, context: Context) -> Run:
        with self._host.model(self._patient, []) as lm:
            return self._host.run(name, lm, context)
