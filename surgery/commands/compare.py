"""surgery compare"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.commands.options import (
    UserPath,
    check_png,
    options,
    output_options,
    settings,
    task_options,
)
from surgery.measure.task_settings import TaskSettings


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
@settings("check_tokens", help="Tokens of text to measure.")
@task_options
@options(TaskSettings, "backend")
@click.option("--no-reference", is_flag=True, help="Leave out the paper's hooks on the base.")
@settings("revision", help="Branch, tag or commit of a Hub BASE.")
@settings("device", help="Such as cpu or cuda:0.  [default: best]")
@settings("dtype", help="That all models run in.")
@settings("stream", help="Measure text layer by layer from the files, or load models whole.")
@settings("trust_remote_code", help="Run the checkpoints' own Python code. Read it first.")
@click.option(
    "--output",
    "-o",
    type=UserPath(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Results file, for `surgery card DIR --results FILE`.",
)
@click.option(
    "--plot",
    type=UserPath(path_type=Path, dir_okay=False),
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
    **wanted: Any,
) -> None:
    """Show what EDITED checkpoints gained and lost against BASE, paired and with intervals.

    On text by default; on tasks of lm-evaluation-harness with --tasks. For several GPUs:
    `accelerate launch -m surgery compare ...`.
    """
    from surgery.commands.comparison_tables import comparison_tables
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.errors import BadSettings
    from surgery.jobs.compare import compare
    from surgery.report.comparison_plot import plot_changes

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
        **wanted,
    )
    if not result.text and not result.tasks:
        return  # one of several processes, and not the one that reports
    if output is not None:
        result.write(output)
    if plot is not None:
        plot_changes(result, plot)
    if as_json:
        print_json(result.as_dict())
    for table in comparison_tables(result):
        terminal.out.print(table)
    for path in (output, plot):
        if path is not None:
            terminal.out.print(f"[bold green]Written[/bold green] {safe(path)}")
