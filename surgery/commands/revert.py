"""surgery revert"""

from __future__ import annotations

from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options


@click.command()
@click.argument("folder", metavar="DIR", type=UserPath(path_type=Path))
@click.option(
    "--output", "-o", required=True, type=UserPath(path_type=Path), help="Where to write it."
)
@click.option("--base", metavar="MODEL", help="The base, where its bytes are needed.")
@output_options
def command(folder: Path, output: Path, base: str | None, as_json: bool, quiet: bool) -> None:
    """Undo the conversion in DIR: write its base again, byte for byte.

    A norm fold needs nothing else; qkv and sink need the undo file (convert --undo-file) or the
    base. Every restored file is compared with its recorded sha256. DIR may be a converted .gguf.
    """
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.jobs.revert import revert

    terminal = Terminal(quiet=quiet, as_json=as_json)
    result = revert(folder, output, base=base, reporter=terminal)
    if as_json:
        print_json({**vars(result), "output": str(result.output)})
    terminal.out.print(
        f"[bold green]Restored[/bold green] {safe(result.output)}: {result.files} file(s), every "
        f"sha256 the base's; original values from the {result.source}"
    )
    if result.not_carried:
        terminal.say(f"Never carried over from the base: {', '.join(result.not_carried)}")
