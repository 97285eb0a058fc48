"""surgery inspect"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options


@click.command()
@click.argument("folder", metavar="DIR", type=UserPath(path_type=Path))
@output_options
def command(folder: Path, as_json: bool, quiet: bool) -> None:
    """Show what was done to the checkpoint in DIR, from its manifest; DIR may be a .gguf file."""
    from surgery.commands.tables import titled
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.files.generated import MANIFEST
    from surgery.files.text import read_json
    from surgery.outputs.card import command_line
    from surgery.outputs.gguf_container import read_embedded
    from surgery.outputs.manifest import read_manifest

    terminal = Terminal(quiet=quiet, as_json=as_json)
    manifest = read_embedded(folder)[0] if folder.is_file() else read_manifest(folder)
    if as_json:
        print_json(asdict(manifest) if folder.is_file() else read_json(folder / MANIFEST))
        return
    table = titled(safe(folder), show_header=False)
    base = manifest.base
    table.add_row("base", safe(f"{base.name}{'@' + base.commit if base.commit else ''}"))
    trained, made = manifest.training, command_line(manifest.settings)
    if trained is not None:
        made = f"surgery finetune {trained['recipe']['name']}"
    table.add_row("made by", safe(f"{manifest.tool}: {made}"))
    if trained is not None:
        table.add_row("trained", f"{trained['steps']} steps on {trained['rows']} rows")
    layer = manifest.emergence["layer"] if manifest.emergence else None
    table.add_row("ME Layer", "not searched for" if layer is None else str(layer))
    table.add_row("target layers", ", ".join(str(layer) for layer in sorted(manifest.dimensions)))
    size = len(next(iter(manifest.dimensions.values())))
    table.add_row("masked dimensions", f"{size} of {manifest.hidden_size} per layer")
    table.add_row("edited tensors", safe("\n".join(record.tensor for record in manifest.edits)))
    for row in manifest.quality["variants"] if manifest.quality else ():
        table.add_row(
            f"perplexity, {safe(row['name'])}",
            f"{row['perplexity']:.4g} ({row['against_base']:+.1%})",
        )
    checks = manifest.verification["checks"] if manifest.verification else []
    if checks:  # a .gguf file's manifest was put into it before
        passed = sum(check["passed"] for check in checks)
        table.add_row("verification when written", f"{passed} of {len(checks)} checks passed")
    terminal.out.print(table)
