"""surgery compare"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.options import check_png, output_options, task_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from surgery.measure.task_scores import TaskRow, VariantScore
    from surgery.measure.text import TextMeasure
    from surgery.outputs.comparison import Comparison


@click.command()
@click.argument("base")
@click.argument("edited", nargs=-1, required=True)
@click.option(
    "--text",
    metavar="FILE",
    help="Text or JSONL in place of the bundled text; or a data set of the Hub, "
    "hub:NAME[[:CONFIGURATION]:SPLIT].",
)
@click.option("--no-text", is_flag=True, help="Measure on tasks only.")
@click.option(
    "--check-tokens", type=int, default=4096, show_default=True, help="Tokens of text to measure."
)
@task_options
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm"]),
    default="hf",
    show_default=True,
    help="What runs the tasks; vllm runs checkpoints only, not the reference.",
)
@click.option("--no-reference", is_flag=True, help="Leave out the paper's hooks on the base.")
@click.option("--revision", help="Branch, tag or commit of a Hub BASE.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: best]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    default="float32",
    show_default=True,
    help="That all models run in.",
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the checkpoints' own Python code. Read it first."
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Results file, for `surgery card DIR --results FILE`.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Curves by position, and differences with intervals.",
)
@output_options
def command(
    base: str,
    edited: tuple[str, ...],
    no_text: bool,
    no_reference: bool,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what EDITED checkpoints gained and lost against BASE, paired and with intervals.

    On text by default; on tasks of lm-evaluation-harness with --tasks. For several GPUs:
    `accelerate launch -m surgery compare ...`.
    """
    from surgery.commands.terminal import Terminal, print_json, safe
    from surgery.errors import BadSettings
    from surgery.jobs.compare import compare

    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise BadSettings(f"The folder {path.parent} does not exist.")
    check_png(plot)
    terminal = Terminal(quiet=quiet, as_json=as_json)
    result = compare(
        base,
        *edited,
        measure=not no_text,
        reference=not no_reference,
        reporter=terminal,
        **options,
    )
    if not result.text and not result.tasks:
        return  # one of several processes, and not the one that reports
    if output is not None:
        result.write(output)
    if plot is not None:
        from surgery.report.comparison_plot import plot_changes

        plot_changes(result, plot)
    if as_json:
        print_json(result.as_dict())
    for table in _tables(result):
        terminal.out.print(table)
    for path in (output, plot):
        if path is not None:
            terminal.out.print(f"[bold green]Written[/bold green] {safe(path)}")


def _tables(result: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    from surgery.commands.terminal import printable

    if result.text:
        yield _text_table(result)
    for row in result.tasks:
        yield _task_table(row)
    for note in result.notes:
        yield Text(f"note: {printable(note)}")


def _text_table(result: Comparison) -> RenderableType:
    from surgery.commands.tables import number

    rows: list[tuple[str, Callable[[TextMeasure], str]]] = [
        ("perplexity", lambda row: number(row.perplexity)),
        ("against base", lambda row: f"{row.against_base:+.1%}" if row.loss else ""),
        ("KL(base ‖ ·), nats per position", lambda row: number(row.kl_from_base)),
        ("KL(reference ‖ ·)", lambda row: number(row.kl_from_reference)),
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
    from rich.table import Table

    from surgery.commands.terminal import safe

    table = Table(title=safe(title), title_justify="left")
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
