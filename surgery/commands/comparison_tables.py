"""A comparison as tables: a measure per row and a model per column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from surgery.commands.tables import titled
from surgery.commands.text import printable, safe
from surgery.report.numbers import short

if TYPE_CHECKING:
    from surgery.measure.task_scores import TaskRow, VariantScore
    from surgery.measure.text import TextMeasure
    from surgery.outputs.comparison import Comparison


def comparison_tables(result: Comparison) -> Iterator[RenderableType]:
    """What edited checkpoints gained and lost: on text, and a table per task."""
    if result.text:
        yield _text_table(result)
    for row in result.tasks:
        yield _task_table(row)
    for note in result.notes:
        yield Text(f"note: {printable(note)}")


def _text_table(result: Comparison) -> RenderableType:
    rows: list[tuple[str, Callable[[TextMeasure], str]]] = [
        ("perplexity", lambda row: short(row.perplexity)),
        ("against base", lambda row: f"{row.against_base:+.1%}" if row.loss else ""),
        ("KL(base ‖ ·), nats per position", lambda row: short(row.kl_from_base)),
        ("KL(reference ‖ ·)", lambda row: short(row.kl_from_reference)),
        ("greedy next token as base", lambda row: f"{row.agreement:.1%}"),
        (
            "attention on the first token",
            lambda row: "–" if row.sink_attention is None else f"{row.sink_attention:.1%}",
        ),
        ("loss − base, nats per token", lambda row: _signed(row.loss, 4)),
        ("  95 % interval over sequences", lambda row: _bounds(row.loss, 4)),
        ("verdict", lambda row: (row.loss.verdict or "not tested") if row.loss else ""),
    ]
    title = f"On {result.settings['tokens']} tokens of {result.settings['text']}"
    return _models_table(title, [row.name for row in result.text], rows, result.text)


def _task_table(row: TaskRow) -> RenderableType:
    limited = f" of {row.available}" if row.n < row.available else ""
    seeds = "no sampling" if row.deterministic else f"{len(row.seeds)} seeds"
    direction = "higher" if row.higher_is_better else "lower"
    title = f"{row.task}: {row.metric} ({direction} is better), {row.n}{limited} documents, {seeds}"

    def split(found: VariantScore) -> str:
        change = found.difference
        return f"{change.gained} / {change.lost}" if change else ""

    rows: list[tuple[str, Callable[[VariantScore], str]]] = [
        ("mean ± standard error", lambda found: f"{found.mean:.3f} ± {found.standard_error:.3f}"),
        ("difference from base", lambda found: _signed(found.difference, 3)),
        ("  95 % interval, paired", lambda found: _bounds(found.difference, 3)),
        ("documents gained / lost", split),
        (
            "  exact p (McNemar)",
            lambda found: f"{found.difference.p_discordant:.3g}" if found.difference else "",
        ),
        ("verdict", lambda found: found.difference.verdict if found.difference else ""),
    ]
    if not row.deterministic:
        rows.insert(1, ("standard deviation over seeds", _plain))
    if row.max_new_tokens is not None:
        rows.insert(-3, (f"cut off at {row.max_new_tokens} tokens", _share))
    return _models_table(title, list(row.variants), rows, list(row.variants.values()))


def _share(found: VariantScore) -> str:
    return "–" if found.truncated is None else f"{found.truncated:.0%}"


def _plain(found: VariantScore) -> str:
    deviation = found.seed_standard_deviation
    return "–" if deviation is None else f"{deviation:.3f}"


def _models_table(
    title: str, names: Sequence[str], rows: Sequence[tuple[str, Any]], models: Sequence[Any]
) -> RenderableType:
    """A measure per row and a model per column, which suits a narrow terminal."""
    table = titled(safe(title))
    table.add_column("")
    for name in names:
        table.add_column(safe(name), justify="right", overflow="fold")
    for label, cell in rows:
        table.add_row(label, *(cell(model) for model in models))
    return table


def _signed(found: Any, digits: int) -> str:
    return "" if found is None else f"{found.difference:+.{digits}f}"


def _bounds(found: Any, digits: int) -> str:
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
