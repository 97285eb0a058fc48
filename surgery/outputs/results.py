"""Results of `surgery compare`, as the manifest keeps them and the model card shows them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.errors import BadSettings
from surgery.files.text import read_json

logger = logging.getLogger(__name__)

SCHEMA = 1
LABELS = {
    "base": "base",
    "reference": "the paper's reference (hook)",
    "edited": "**this checkpoint**",
}
# Names end up in Markdown and YAML, so they hold nothing that means something there.
_PLAIN = re.compile(r"[\w ./:,()+=@-]{1,150}")


@dataclass(frozen=True)
class Interval:
    """A difference from base.

    Attributes:
        difference: its mean.
        low: lower bound of its 95 % interval; None where one document cannot give it.
        high: upper bound, likewise.
        verdict: what the interval shows; None without scipy.
    """

    difference: float
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class TextRow:
    """One model on the text: what the manifest keeps of `measure.text.TextMeasure`.

    A class of its own, as the two below are: it reads what another program or version has written,
    strictly, and needs no torch. The fields mean what they mean there.
    """

    perplexity: float
    against_base: float
    kl_from_base: float | None
    kl_from_reference: float | None
    agreement: float
    sink_attention: float | None
    loss: Interval | None


@dataclass(frozen=True)
class TaskScore:
    """One model on one task: what the manifest keeps of `measure.task_scores.VariantScore`."""

    mean: float
    standard_error: float | None
    seed_standard_deviation: float | None
    truncated: float | None
    difference: Interval | None


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task: what the manifest keeps of `measure.task_scores.TaskRow`."""

    task: str
    metric: str
    higher_is_better: bool
    n: int
    available: int
    deterministic: bool
    seeds: list[int]
    max_new_tokens: int | None
    dataset: dict[str, str | None]
    variants: dict[str, TaskScore]


@dataclass(frozen=True)
class Results:
    """What was measured on one checkpoint.

    Attributes:
        text_name: what text it was; None where none was measured.
        tokens: of the text.
        sequences: of these tokens.
        dtype: that the models ran in.
        chat_template: whether tasks were posed as chat; None without tasks, as all that follow.
        thinking: whether the template let the models think.
        batch_size: a number or "auto".
        backend: what ran the models.
        versions: of the packages that can influence a result.
        text: measures by "base", "reference" and "edited".
        tasks: a row per metric, its variants by the same.
    """

    text_name: str | None
    tokens: int
    sequences: int
    dtype: str
    chat_template: bool | None
    thinking: bool | None
    batch_size: str | None
    backend: str | None
    versions: dict[str, str]
    text: dict[str, TextRow]
    tasks: list[TaskResult]


def results_for(path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a results file says about a checkpoint, for the `results` of its manifest.

    Checkpoints are told apart by the sha256 of their weight files.

    Args:
        path: the results file.
        digests: sha256 of the checkpoint's files, by name.

    Raises:
        BadSettings: for results of another checkpoint, and for a file that is none of ours.
        BadCheckpoint: for a file that is not JSON.
    """
    raw = read_json(path)
    if raw.get("schema_version") != SCHEMA:
        raise BadSettings(f"{path} is not a results file of `surgery compare --output`.")
    weights = {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
    try:
        measured = next((v for v in raw["variants"] if _is(v, weights)), None)
        if measured is None:
            raise BadSettings(
                f"{path} holds no results of this checkpoint: the sha256 of its weight files is "
                "not among those measured."
            )
        names = {
            "base": "base",
            "reference": measured["reference"],
            "edited": measured["name"],
        }
        found = asdict(check_results(_selected(raw, names)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadSettings(f"{path} is damaged: {_short(error)}.") from error
    logger.info("results of %s in %s", measured["name"], path)
    return found


def _is(variant: Mapping[str, Any], weights: Mapping[str, str]) -> bool:
    return variant["kind"] == "edited" and bool(weights) and variant["weights"] == weights


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150].rstrip(".") or type(error).__name__


def _selected(raw: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    settings = raw["settings"]
    tasks = settings.get("tasks") or {}
    text = {row["name"]: row for row in raw["text"]}
    return {
        "text_name": settings["text"],
        "tokens": settings["tokens"],
        "sequences": settings["sequences"],
        "dtype": settings["dtype"],
        **{
            name: tasks.get(name) for name in ("chat_template", "thinking", "batch_size", "backend")
        },
        "versions": {**raw["versions"], "surgery": str(raw["tool"]).rpartition(" ")[2]},
        "text": {role: text[name] for role, name in names.items() if name in text},
        "tasks": [
            {
                **row,
                "variants": {
                    role: row["variants"][name]
                    for role, name in names.items()
                    if name in row["variants"]
                },
            }
            for row in raw["tasks"]
        ],
    }


def check_results(found: Any) -> Results:
    """The results field of a manifest; ValueError where it is damaged."""
    from pydantic import TypeAdapter

    results: Results = TypeAdapter(Results).validate_json(
        json.dumps(found, allow_nan=False), strict=True
    )
    for text in _texts(results):
        if text is not None and not _PLAIN.fullmatch(text):
            raise ValueError(f"{text[:50]!r} is not a plain name")
    if any({"base", "edited"} - set(row.variants) for row in results.tasks):
        raise ValueError("a task lacks the base or this checkpoint")
    if results.text and {"base", "edited"} - set(results.text):
        raise ValueError("the text measures lack the base or this checkpoint")
    roles = {*results.text, *(role for task in results.tasks for role in task.variants)}
    if roles - set(LABELS):
        raise ValueError("there is a variant of no known kind")
    return results


def _texts(results: Results) -> Iterator[str | None]:
    yield from (results.text_name, results.dtype, results.batch_size, results.backend)
    for name, version in results.versions.items():
        yield from (name, version)
    for row in results.text.values():
        yield row.loss.verdict if row.loss else None
    for task in results.tasks:
        yield from (task.task, task.metric, *task.dataset.values())
        for scored in task.variants.values():
            yield scored.difference.verdict if scored.difference else None


# --------------------------------------------------------------------------------------------
# On the card
# --------------------------------------------------------------------------------------------


def card_words(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The results as the card's template shows them."""
    if found is None:
        return None
    results = check_results(found)
    return {
        "text": [
            {
                "label": LABELS[role],
                "perplexity": f"{row.perplexity:.4g}",
                "kl_from_base": _number(row.kl_from_base) if role != "base" else "–",
                "kl_from_reference": _number(row.kl_from_reference) if role == "edited" else "–",
                "agreement": f"{row.agreement:.1%}" if role != "base" else "–",
                "sink": f"{row.sink_attention:.1%}" if row.sink_attention is not None else "–",
                "loss": _interval(row.loss, 4) if row.loss else "–",
                "verdict": (row.loss.verdict if row.loss else None) or "–",
            }
            for role, row in results.text.items()
        ],
        "text_words": f"{results.tokens} tokens in {results.sequences} sequences of "
        f"{results.text_name}",
        "dtype": results.dtype,
        "tasks": [_task_row(task, role) for task in results.tasks for role in task.variants],
        "configuration": _configuration(results),
        "versions": ", ".join(f"{name} {version}" for name, version in results.versions.items()),
    }


def _task_row(task: TaskResult, role: str) -> dict[str, str]:
    found = task.variants[role]
    first = role == next(iter(task.variants))
    arrow = "↑" if task.higher_is_better else "↓"
    limit = f" of {task.available}" if task.n < task.available else ""
    deviation = found.seed_standard_deviation
    return {
        "task": f"{task.task}, {task.metric} {arrow}" if first else "",
        "n": f"{task.n}{limit}" if first else "",
        "label": LABELS[role],
        "mean": f"{found.mean:.3f} ± {_number(found.standard_error)}",
        "seeds": "no sampling"
        if task.deterministic
        else f"{_number(deviation)} ({len(task.seeds)})",
        "truncated": f"{found.truncated:.0%}" if found.truncated is not None else "–",
        "difference": _interval(found.difference, 3) if found.difference else "–",
        "verdict": (found.difference.verdict if found.difference else None) or "–",
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _interval(found: Interval, digits: int) -> str:
    words = f"{found.difference:+.{digits}f}"
    if found.low is None or found.high is None:
        return words
    return f"{words} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def _configuration(results: Results) -> str:
    if not results.tasks:
        return ""
    template = "with" if results.chat_template else "without"
    thinking = "on" if results.thinking else "off"
    limits = sorted({t.max_new_tokens for t in results.tasks if t.max_new_tokens is not None})
    tokens = f", at most {' or '.join(map(str, limits))} new tokens" if limits else ""
    return (
        f"0-shot, {template} chat template, thinking {thinking}{tokens}, batch size "
        f"{results.batch_size}, {results.dtype}, backend {results.backend}"
    )


def model_index(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The results as `model-index` metadata, which the Hub shows beside the model."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = check_results(found)
    entries = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.dataset.get("path") or task.task,
            dataset_name=task.task,
            dataset_config=task.dataset.get("config"),
            dataset_split=task.dataset.get("split"),
            dataset_args={
                "num_few_shot": 0,
                "documents": task.n,
                "limit": task.n if task.n < task.available else None,
                "seeds": task.seeds,
                "sampled": not task.deterministic,
                "chat_template": results.chat_template,
            },
            metric_type=task.metric,
            metric_value=round(task.variants["edited"].mean, 6),
            metric_name=_metric_name(task, results),
        )
        for task in results.tasks
    ]
    return eval_results_to_model_index(name, entries)


def _metric_name(task: TaskResult, results: Results) -> str:
    scored = task.variants["edited"]
    limit = f" of {task.available}, limited" if task.n < task.available else ""
    seeds = "no sampling" if task.deterministic else f"seeds {', '.join(map(str, task.seeds))}"
    difference = ""
    if scored.difference is not None:
        difference = (
            f"; base {task.variants['base'].mean:.3f}, difference "
            f"{_interval(scored.difference, 3)}: {scored.difference.verdict}"
        )
    harness = results.versions.get("lm_eval", "unknown")
    return (
        f"{task.metric} (n = {task.n}{limit}; standard error {_number(scored.standard_error)}; "
        f"{seeds}{difference}; lm-eval {harness}, transformers "
        f"{results.versions.get('transformers', 'unknown')})"
    )
