"""surgery card"""

from __future__ import annotations

from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options


@click.command()
@click.argument("folder", metavar="DIR", type=UserPath(path_type=Path))
@click.option(
    "--results",
    type=UserPath(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Results of `surgery compare --output FILE`, measured on this checkpoint.",
)
@output_options
def command(folder: Path, results: Path | None, as_json: bool, quiet: bool) -> None:
    """Render the model card in DIR again, from the manifest, with results if they are given."""
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.jobs.card import refresh_card

    terminal = Terminal(quiet=quiet, as_json=as_json)
    card = refresh_card(folder, results=results)
    if as_json:
        print_json({"card": str(card)})
    terminal.out.print(f"[bold green]Written[/bold green] {safe(card)}")
