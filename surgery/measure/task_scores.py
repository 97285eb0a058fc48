"""Scores of tasks, paired by document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import SurgeryError
from surgery.measure.statistics import Difference, over_seeds, paired, score
from surgery.measure.task_loading import LoadedTasks
from surgery.measure.task_settings import TaskSettings


@dataclass(frozen=True)
class VariantScore:
    """One model on one task.

    mean: over documents (and seeds), with its standard error over documents;
    seed_standard_deviation: of the seeds' means, None for a task that seeds do not change.
    truncated: share of generations that hit the limit of new tokens. difference: against base.
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

    n: documents, of `available`. seeds: those that were run; deterministic: seeds change nothing,
    so one was run. filter: which of the harness's answer filters the scores are of. dataset:
    where the documents come from. hashes, scores: per document, for pairing again.
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
    """What one model gave: per leaf task and seed, the harness's per-document records."""

    samples: dict[str, list[list[dict[str, Any]]]]
    truncated: dict[str, float | None]


def score_rows(
    name: str, leaves: Sequence[str], loaded: LoadedTasks, runs: Mapping[str, Run]
) -> Iterator[TaskRow]:
    """One row per metric whose aggregate is the mean over documents."""
    first = loaded.tasks[leaves[0]]
    chosen = _filter(runs["base"].samples[leaves[0]][0])
    documents = runs["base"].samples[leaves[0]][0]
    sample = next(document for document in documents if document["filter"] == chosen)
    means = {
        metric
        for metric, function in first.aggregation().items()
        if getattr(function, "__name__", "") == "mean"
    }
    directions = first.higher_is_better()
    sampled = any(leaf in loaded.sampled for leaf in leaves)
    limits = [loaded.tasks[leaf].get_config("generation_kwargs") or {} for leaf in leaves]
    for metric in sample["metrics"]:
        if metric not in means or not _is_number(sample[metric]):
            continue
        scores: dict[str, list[list[float]]] = {}
        hashes: tuple[str, ...] = ()
        for variant, run in runs.items():
            by_seed = _by_document(leaves, run, chosen, metric)
            order = sorted(by_seed[0])
            found = tuple(by_seed[0][key][0] for key in order)
            if hashes and found != hashes:
                raise SurgeryError(
                    f"The documents of {name} changed between two models; run it again."
                )
            hashes = found
            scores[variant] = [[seed[key][1] for key in order] for seed in by_seed]
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
            max_new_tokens=limits[0].get("max_gen_toks"),
            dataset=_dataset(first, loaded.settings),
            variants={
                variant: _variant_score(
                    variant, scores[variant], averaged, _truncation(leaves, runs[variant]), higher
                )
                for variant in runs
            },
            hashes=hashes,
            scores=averaged,
        )


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
    import numpy as np

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
