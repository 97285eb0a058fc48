"""surgery reproduce"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options, settings


@click.command()
@click.argument("folder", metavar="DIR", type=UserPath(path_type=Path))
@click.option("--base", metavar="MODEL", help="The base, when it is not where the manifest says.")
@settings("stream")
@settings("trust_remote_code", help="Run the checkpoint's own Python code.")
@output_options
def command(
    folder: Path,
    base: str | None,
    stream: bool | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert again from the manifest in DIR and compare every hash; DIR may be a .gguf file."""
    from surgery.commands.tables import titled
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.errors import VerificationFailed
    from surgery.jobs.reproduce import reproduce

    terminal = Terminal(quiet=quiet, as_json=as_json)
    result = reproduce(
        folder, base=base, stream=stream, trust_remote_code=trust_remote_code, reporter=terminal
    )
    table = titled("Reproduction")
    for heading in ("file", "recorded sha256", "repeated"):
        table.add_column(heading)
    for file in result.files:
        mark = "[green]the same[/green]" if file.same else f"[red]{str(file.repeated)[:16]}[/red]"
        table.add_row(safe(file.name), file.recorded[:16], mark)
    terminal.out.print(table)
    if as_json:
        print_json({"same": result.same, **asdict(result)})
    if not result.same:
        names = ", ".join(file.name for file in result.files if not file.same)
        other = ", ".join(f"{n} {a} → {b}" for n, (a, b) in result.versions_differ.items())
        raise VerificationFailed(
            f"these files came out differently: {names}"
            + (f"; versions differ too: {other}." if other else ".")
        )
