"""surgery sweep"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from surgery.commands.options import analysis_options, output_options, task_options
from surgery.errors import Terminated


def _list_of(kind: Callable[[str], Any]) -> Callable[..., Any]:
    """Reads an option such as 0.1,0.2."""

    def parse(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            return tuple(kind(part.strip()) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not a list such as 0.1,0.2") from error

    return parse


@click.command()
@click.argument("model")
@click.option(
    "--rates",
    default="0.02,0.05,0.1,0.2,0.3,0.5",
    show_default=True,
    callback=_list_of(float),
    metavar="LIST",
    help="Shares of dimensions to mask.",
)
@click.option(
    "--scopes",
    default="first,all",
    show_default=True,
    callback=_list_of(str),
    metavar="LIST",
    help="first: the first layer after the ME Layer; all: all after it.",
)
@click.option(
    "--folds",
    callback=_list_of(str),
    metavar="LIST",
    help="Of norm, qkv, sink.  [default: norm,sink, or qkv,sink where norm is not possible]",
)
@click.option(
    "--selects",
    default="weight,activation,random",
    show_default=True,
    callback=_list_of(str),
    metavar="LIST",
    help="How dimensions are chosen; activation and random are the paper's controls.",
)
@click.option(
    "--strengths",
    default="1",
    show_default=True,
    callback=_list_of(float),
    metavar="LIST",
    help="1 masks, 0 changes nothing.",
)
@click.option(
    "--score",
    type=click.Choice(["perplexity", "kl", "tasks"]),
    default="perplexity",
    show_default=True,
    help="What should be low: perplexity, the distance from the paper's reference, or the mean "
    "error on --tasks.",
)
@task_options
@click.option("--trials", type=int, help="Search so many points (TPE) instead of the whole grid.")
@click.option("--layer", type=int, metavar="M", help="The ME Layer, instead of searching for it.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder for the study, results.json and sweep.png.  [default: ./<name>-sweep]",
)
@click.option(
    "--storage",
    metavar="URL",
    help="The study's database: postgresql://… is shared by workers on several machines.  "
    "[default: an SQLite file in the output]",
)
@click.option("--study", "study_name", metavar="NAME", help="[default: <name>-sweep]")
@click.option("--jobs", type=int, default=1, show_default=True, help="Worker processes here.")
@analysis_options
@click.option("--seed", type=int, default=0, show_default=True, help="For random and --trials.")
@click.option(
    "--check-tokens", type=int, default=2048, show_default=True, help="Tokens to measure on."
)
@click.option(
    "--text",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Text or JSONL to measure on in place of the bundled held-out text.",
)
@click.option(
    "--calibration-tokens",
    type=int,
    default=4096,
    show_default=True,
    help="Tokens that the sink fold and the activation selection see.",
)
@click.option(
    "--convert-best",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Convert with the best settings, to this folder.",
)
@output_options
def command(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score every combination of settings on MODEL, loaded once; nothing is written but results.

    Run the same command again, also on another machine with the same --storage, and it goes on:
    no point is scored twice.
    """
    from surgery.commands.tables import sweep_table
    from surgery.commands.terminal import Terminal, print_json, safe
    from surgery.files.generated import FIGURE
    from surgery.jobs.sweep import sweep
    from surgery.sweeping.result import RESULTS

    terminal = Terminal(quiet=quiet, as_json=as_json)
    try:
        found = sweep(model, reporter=terminal, **options)
    except KeyboardInterrupt as stop:
        click.echo("Interrupted; the same command goes on from here.", err=True)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    if as_json:
        print_json(found.as_dict())
    terminal.table(sweep_table(found))
    if found.best is not None:
        terminal.out.print(
            "front ●: no other point has both a lower score and less distance from the paper's "
            "reference"
            if found.score != "kl"
            else "front ●: no other point has both a lower KL and a lower perplexity"
        )
        if found.score == "tasks":
            terminal.out.print(
                f"The best of {len(found.rows)} points owes some of its score to chance; confirm "
                "it on other documents with `surgery compare`."
            )
        terminal.out.print("Best settings:")
        terminal.out.print(f"  {safe(found.best.command)}", soft_wrap=True)
        terminal.out.print(
            f"Written: {safe(found.output / RESULTS)}, {safe(found.output / FIGURE)}"
        )
    if found.converted is not None:
        terminal.out.print(f"[bold green]Converted[/bold green] {safe(found.converted.output)}")
