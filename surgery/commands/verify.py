"""surgery verify"""

from __future__ import annotations

from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options, settings


@click.command()
@click.argument("folder", metavar="DIR", type=UserPath(path_type=Path))
@click.option("--base", metavar="MODEL", help="The base, when it is not where the manifest says.")
@settings("device", help="Such as cpu or cuda:0.  [default: best]")
@settings("stream")
@settings("trust_remote_code", help="Run the checkpoint's own Python code.")
@output_options
def command(
    folder: Path,
    base: str | None,
    device: str | None,
    stream: bool | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove the converted checkpoint in DIR against its base: bytes, edits, load and logits.

    DIR may be a converted .gguf, whose base is inside, or a .gguf adapter.
    """
    from surgery.commands.terminal import Terminal, print_json
    from surgery.jobs.verify import verify

    terminal = Terminal(quiet=quiet, as_json=as_json)
    result = verify(
        folder,
        base=base,
        device=device,
        stream=stream,
        trust_remote_code=trust_remote_code,
        reporter=terminal,
    )
    terminal.show(result)
    if as_json:
        print_json(result.as_dict())
    result.require()
