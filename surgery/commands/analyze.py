"""surgery analyze"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.commands.options import LOADING, UserPath, check_png, output_options, settings

if TYPE_CHECKING:
    from surgery.commands.terminal import Terminal


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@settings(*LOADING)
@settings("rate", help="Share of the dimensions in the evidence: the largest gains, and the mask.")
@click.option(
    "--stream/--no-stream",
    " /--load",
    default=None,
    help="Run layer by layer from the files, or load the model whole.  "
    "[default: stream what is on the Hub, or larger than 1 GB]",
)
@click.option("--all-layers", is_flag=True, help="Stream to the last layer, for a whole table.")
@click.option(
    "--evidence", is_flag=True, help="Print everything the paper measures, by layer; takes longer."
)
@click.option(
    "--report",
    metavar="DIR",
    type=UserPath(file_okay=False, path_type=Path),
    help="Write a page with all the evidence, its figures and numbers; takes longer. Downloads a "
    "Hub model, unless with --stream.",
)
@click.option(
    "--plot",
    metavar="FILE.png",
    type=UserPath(dir_okay=False, path_type=Path),
    help="Draw the norms by layer.",
)
@output_options
def command(
    models: tuple[str, ...],
    evidence: bool,
    report: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Locate the Massive Emergence Layer of MODEL and say why.

    With several models, compare them: the paper's Table 8 for your list.
    """
    from surgery.commands.terminal import Terminal
    from surgery.errors import BadSettings

    if plot is not None and not plot.absolute().parent.is_dir():
        raise BadSettings(f"The folder of {plot} does not exist.")
    check_png(plot)
    if report is not None:
        from surgery.outputs.plan import check_apart
        from surgery.report.page import check_folder

        check_apart([Path(model) for model in models if os.path.exists(model)], report)
        check_folder(report)
    terminal = Terminal(quiet=quiet, as_json=as_json)
    if len(models) == 1:
        _one(models[0], evidence, report, plot, as_json, terminal, options)
        return
    if evidence:
        raise BadSettings("--evidence is for one model; with several, only Table 8 is made.")
    _several(models, report, plot, as_json, terminal, options)


def _one(
    model: str,
    evidence: bool,
    report: Path | None,
    plot: Path | None,
    as_json: bool,
    terminal: Terminal,
    options: dict[str, Any],
) -> None:
    from surgery.commands.tables import evidence_tables
    from surgery.commands.terminal import print_json
    from surgery.jobs.analyze import analyze
    from surgery.outputs.figure import plot_layers
    from surgery.report.data import summary
    from surgery.report.page import write_report

    wanted = evidence or report is not None
    analysis = analyze(model, reporter=terminal, evidence=wanted, **options)
    emergence = analysis.emergence
    if plot is not None:
        plot_layers(emergence, plot, title=analysis.checkpoint.origin.name)
    if report is not None:
        terminal.say("Drawing the report")
        write_report(analysis, report, {"models": [model], **options})
    if as_json:
        data = summary(analysis)
        if not evidence:
            data.pop("evidence", None)
        print_json(data)
    terminal.show(emergence)
    if evidence and analysis.evidence is not None:
        for table in evidence_tables(analysis.evidence):
            terminal.out.print(table)
    if emergence.layer is not None:
        first, every = analysis.targets("first"), analysis.targets("all")
        terminal.out.print(
            f"target layers: --scope first → {list(first)}, --scope all → {every[0]} to {every[-1]}"
        )
    _say_written(terminal, report, plot)
    if analysis.streamed is not None:
        seen = analysis.streamed
        terminal.out.print(
            f"{seen.layers_run} of {seen.depth} layers run; "
            f"{seen.bytes_read / 1e6:,.1f} MB of {seen.bytes_total / 1e6:,.1f} MB read"
        )
    emergence.require()


def _several(
    models: tuple[str, ...],
    report: Path | None,
    plot: Path | None,
    as_json: bool,
    terminal: Terminal,
    options: dict[str, Any],
) -> None:
    from surgery.commands.tables import side_by_side
    from surgery.commands.terminal import print_json
    from surgery.jobs.side_by_side import analyze_all
    from surgery.report.data import comparison_curves, comparison_data, table_row
    from surgery.report.page import write_comparison
    from surgery.report.plots import plot_comparison

    compared = analyze_all(models, reporter=terminal, **options)
    if plot is not None:
        plot_comparison(comparison_curves(compared), plot)
    if report is not None:
        write_comparison(compared, report, {"models": list(models), **options})
    if as_json:
        print_json({"models": comparison_data(compared)})
    terminal.out.print(side_by_side([table_row(one.model, one.analysis) for one in compared]))
    _say_written(terminal, report, plot)
    # The others are reported all the same; the exit code says that the list is not complete.
    failed = [one for one in compared if one.error is not None]
    for one in failed[1:]:
        terminal.say(f"{one.model}: {one.error}")
    if failed and failed[0].error is not None:
        raise failed[0].error


def _say_written(terminal: Terminal, report: Path | None, plot: Path | None) -> None:
    if plot is not None:
        terminal.say(f"Figure written to {plot}")
    if report is not None:
        terminal.say(f"Report written to {report / 'index.html'}")
