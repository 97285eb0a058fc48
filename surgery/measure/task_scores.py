"""Scores of tasks, paired by document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.measure.statistics import Difference, over_seeds, paired, score
from surgery.measure.task_loading import LoadedTasks
from surgery.measure.task_settings import TaskSettings


@dataclass(frozen=True)
class VariantScore:
    """One model on one task.

    Attributes:
        mean: over documents (and seeds).
        standard_error: over documents.
        by_seed: means over the documents.
        seed_standard_deviation: of these; None for a task that seeds do not change.
        truncated: share of generations that hit the limit of new tokens; None where it is unknown.
        difference: against base; None for the base.
    """

    mean: float
    standard_error: float
    by_seed: tuple[float, ...]
    seed_standard_deviation: float | None
    truncated: float | None
    difference: Difference | None


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task, on every model.

    Attributes:
        task: name of the task or group.
        metric: of the harness.
        higher_is_better: whether it is a score, not an error.
        filter: which of the harness's answer filters the scores are of.
        n: documents that were run.
        available: documents that there are.
        deterministic: whether seeds change nothing, so that one was run.
        seeds: those that were run.
        max_new_tokens: None for tasks that do not generate.
        dataset: where the documents come from.
        variants: scores by model.
        hashes: of the documents, for pairing again.
        scores: by model and document, means over the seeds.
    """

    task: str
    metric: str
    higher_is_better: bool
    filter: str
    n: int
    available: int
    deterministic: bool
    seeds: tuple[int, ...]
    max_new_tokens: int | None
    dataset: dict[str, Any]
    variants: dict[str, VariantScore]
    hashes: tuple[str, ...] = ()
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass
class Run:
    """What one model gave.

    Attributes:
        samples: per leaf task and seed, the harness's per-document records.
        truncated: per leaf task, the share of generations that were cut; None where unknown.
    """

    samples: dict[str, list[list[dict[str, Any]]]]
    truncated: dict[str, float | None]


def score_rows(
    name: str, leaves: Sequence[str], loaded: LoadedTasks, runs: Mapping[str, Run]
) -> Iterator[TaskRow]:
    """One row per metric whose aggregate is the mean over documents.

    Args:
        name: of the row.
        leaves: tasks in it.
        loaded: all tasks.
        runs: by model, "base" being the first.

    Raises:
        SurgeryError: where two models were given other documents.
    """
    first = loaded.tasks[leaves[0]]
    documents = runs["base"].samples[leaves[0]][0]
    chosen = _filter(documents)
    sample = next(document for document in documents if document["filter"] == chosen)
    aggregates, directions = first.aggregation(), first.higher_is_better()
    sampled = any(leaf in loaded.sampled for leaf in leaves)
    for metric in sample["metrics"]:
        averages = getattr(aggregates.get(metric), "__name__", "") == "mean"
        if not averages or not _is_number(sample[metric]):
            continue
        hashes, scores = _paired(name, leaves, runs, chosen, metric)
        averaged = {
            variant: tuple(sum(column) / len(column) for column in zip(*by_seed, strict=True))
            for variant, by_seed in scores.items()
        }
        higher = directions.get(metric) is not False
        yield TaskRow(
            task=name,
            metric=metric,
            higher_is_better=higher,
            filter=chosen,
            n=len(hashes),
            available=sum(len(loaded.tasks[leaf].eval_docs) for leaf in leaves),
            deterministic=not sampled,
            seeds=loaded.settings.seeds if sampled else loaded.settings.seeds[:1],
            max_new_tokens=(first.get_config("generation_kwargs") or {}).get("max_gen_toks"),
            dataset=_dataset(first, loaded.settings),
            variants={
                variant: _variant_score(
                    variant, scores[variant], averaged, _truncation(leaves, run), higher
                )
                for variant, run in runs.items()
            },
            hashes=hashes,
            scores=averaged,
        )


def _paired(
    name: str, leaves: Sequence[str], runs: Mapping[str, Run], chosen: str, metric: str
) -> tuple[tuple[str, ...], dict[str, list[list[float]]]]:
    """The documents' hashes, and by model the scores per seed and document, in one order."""
    scores: dict[str, list[list[float]]] = {}
    hashes: tuple[str, ...] = ()
    for variant, run in runs.items():
        by_seed = _by_document(leaves, run, chosen, metric)
        order = sorted(by_seed[0])
        found = tuple(by_seed[0][key][0] for key in order)
        if hashes and found != hashes:
            raise SurgeryError(f"The documents of {name} changed between two models; run it again.")
        hashes = found
        scores[variant] = [[seed[key][1] for key in order] for seed in by_seed]
    return hashes, scores


def _variant_score(
    variant: str,
    by_seed: list[list[float]],
    averaged: Mapping[str, tuple[float, ...]],
    truncated: float | None,
    higher: bool,
) -> VariantScore:
    summary = score(averaged[variant])
    means = [sum(values) / len(values) for values in by_seed]
    difference = None
    if variant != "base":
        difference = paired(averaged["base"], averaged[variant], higher_is_better=higher)
    return VariantScore(
        summary.mean, summary.standard_error, tuple(means), over_seeds(means)[1], truncated,
        difference,
    )  # fmt: skip


def _truncation(leaves: Sequence[str], run: Run) -> float | None:
    known = [run.truncated[leaf] for leaf in leaves if run.truncated.get(leaf) is not None]
    return sum(share for share in known if share is not None) / len(known) if known else None


def _filter(documents: Sequence[Mapping[str, Any]]) -> str:
    """One of a task's answer filters: the tolerant one where it has several."""
    names = list(dict.fromkeys(str(document["filter"]) for document in documents))
    return "flexible-extract" if "flexible-extract" in names else names[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _by_document(
    leaves: Sequence[str], run: Run, chosen: str, metric: str
) -> list[dict[tuple[str, int], tuple[str, float]]]:
    """Per seed: hash and score by (task, document)."""
    seeds = max(len(run.samples[leaf]) for leaf in leaves)
    found: list[dict[tuple[str, int], tuple[str, float]]] = [{} for _ in range(seeds)]
    for leaf in leaves:
        for seed, documents in enumerate(run.samples[leaf]):
            for document in documents:
                if document["filter"] == chosen and metric in document:
                    key = leaf, int(document["doc_id"])
                    found[seed][key] = str(document["doc_hash"]), float(document[metric])
    return found


def _dataset(task: Any, settings: TaskSettings) -> dict[str, Any]:
    """Where documents come from, for the results file and the card."""
    config = task.config
    ours = config.dataset_kwargs or {}
    local = settings.data is not None and "hub" in ours
    return {
        "path": ours.get("hub") or config.dataset_path or str(config.task),
        "config": ours.get("config") or config.dataset_name,
        "split": ours.get("split") or config.test_split or config.validation_split,
        "local_file": ours.get("file") if local else None,
    }
