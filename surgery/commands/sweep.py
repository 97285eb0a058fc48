"""surgery sweep"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from surgery.commands.options import (
    LOADING,
    UserPath,
    listed,
    output_options,
    settings,
    task_options,
)
from surgery.errors import Terminated
from surgery.method.mask import SCOPES, SELECTIONS
from surgery.sweeping.plan import RATES, SCORES


@click.command()
@click.argument("model")
@listed("rate", RATES, "Shares of dimensions to mask.")
@listed("scope", SCOPES, "first: the first layer after the ME Layer; all: all after it.")
@listed(
    "fold",
    None,
    "Of norm, qkv, sink.  [default: norm,sink, or qkv,sink where norm is not possible]",
)
@listed(
    "select",
    SELECTIONS,
    "How dimensions are chosen; activation and random are the paper's controls.",
)
@listed("strength", (1.0,), "1 masks, 0 changes nothing.")
@click.option(
    "--score",
    type=click.Choice(list(SCORES)),
    default="perplexity",
    show_default=True,
    help="What should be low: perplexity, the distance from the paper's reference, or the mean "
    "error on --tasks.",
)
@task_options
@click.option("--trials", type=int, help="Search so many points (TPE) instead of the whole grid.")
@settings("layer")
@click.option(
    "--output",
    "-o",
    type=UserPath(path_type=Path),
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
@settings(*LOADING, "stream")
@settings("seed", help="For random and --trials.")
@settings("check_tokens", default=2048, help="Tokens to measure on.")
@click.option(
    "--text",
    type=UserPath(dir_okay=False),
    metavar="FILE",
    help="Text or JSONL to measure on in place of the bundled held-out text.",
)
@settings("calibration_tokens", help="Tokens that the sink fold and the activation selection see.")
@click.option(
    "--convert-best",
    type=UserPath(path_type=Path),
    metavar="DIR",
    help="Convert with the best settings, to this folder.",
)
@output_options
def command(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score every combination of settings on MODEL, opened once; nothing is written but results.

    Run the same command again, also on another machine with the same --storage, and it goes on:
    no point is scored again.
    """
    from surgery.commands.tables import sweep_table
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
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
    terminal.out.print(sweep_table(found))
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
