"""surgery convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.commands.options import LOADING, UserPath, output_options, settings


@click.command()
@click.argument("model")
@settings("rate", "scope", "fold", "select", "strength", "layer", "layers", "form")
@click.option(
    "--output",
    "-o",
    type=UserPath(path_type=Path),
    help="Folder to write, or .gguf file if MODEL is one.  [default: ./<name>-wemask-<settings>]",
)
@settings(*LOADING, "stream", "seed", "check", "check_tokens", "fixed", "calibration_tokens")
@settings("max_degradation")
@settings("force", "undo_file", "include")
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion at the output.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@settings("push_to_hub")
@click.option(
    "--remote",
    is_flag=True,
    help="With --push-to-hub: copy unchanged files on the server, send only what changed.",
)
@output_options
def command(
    model: str,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    remote: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fold the WeMask mask into MODEL and write a plain, verified checkpoint."""
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.jobs.convert import convert
    from surgery.jobs.push import push
    from surgery.outputs.hub import one_file
    from surgery.outputs.registry import output_for

    repo = options["push_to_hub"]
    if repo and output_for(options["form"], output).one_file:
        raise one_file(repo)
    terminal = Terminal(quiet=quiet, as_json=as_json)
    if remote:
        if output is not None or not repo:
            raise click.UsageError("--remote needs --push-to-hub, and writes nothing here.")
        if _published(model, terminal, as_json, dry_run, options):
            return
    options |= {"output": output, "overwrite": overwrite, "dry_run": dry_run}
    result = convert(model, reporter=terminal, **options)
    made = result.manifest is not None
    pushed = push(result.output, repo, reporter=terminal) if made and repo else None
    if as_json:
        print_json(
            {
                "output": str(result.output),
                "written": not dry_run,
                "plan": result.plan.summary(),
                "emergence_layer": result.emergence.layer if result.emergence else None,
                "target_layers": list(result.mask.layers),
                "dimensions_per_layer": len(next(iter(result.mask.dimensions.values()))),
                "quality": result.quality.as_dict() if result.quality else None,
                "verification": result.verification.as_dict() if result.verification else None,
                "pushed": vars(pushed) if pushed else None,
            }
        )
    if dry_run:
        terminal.out.print("Dry run: nothing was written, and the quality gate did not run.")
        return
    terminal.out.print(f"[bold green]Written[/bold green] {safe(result.output)}")
    if pushed is not None:
        terminal.out.print(f"[bold green]Pushed[/bold green] {safe(pushed.url)}")


def _published(
    model: str, terminal: Any, as_json: bool, dry_run: bool, options: dict[str, Any]
) -> bool:
    """Whether the conversion could be made on the Hub; what the server refuses is said."""
    from dataclasses import asdict

    from surgery.commands.terminal import print_json
    from surgery.commands.text import safe
    from surgery.jobs.publish import publish
    from surgery.outputs.hub_copy import CopyRefused

    repo = options["push_to_hub"]
    wanted = {name: options[name] for name in options if name not in ("push_to_hub", "check")}
    try:
        result = publish(model, repo, reporter=terminal, dry_run=dry_run, **wanted)
    except CopyRefused as error:
        terminal.say(f"{error} Converting here and uploading everything instead.")
        return False
    moved = {
        "bytes_read": result.bytes_read,
        "bytes_sent": result.bytes_sent,
        "bytes_total": result.bytes_total,
    }
    if as_json:
        pushed = asdict(result.pushed) if result.pushed else None
        print_json({**moved, "plan": result.plan.summary(), "pushed": pushed})
    if result.pushed is None:
        terminal.out.print(
            f"Dry run: nothing was sent; deciding read {result.bytes_read / 1e6:.1f} MB of a model "
            f"of {result.bytes_total / 1e6:.1f} MB."
        )
        return True
    both = result.bytes_read + result.bytes_sent
    terminal.out.print(
        f"[bold green]Pushed[/bold green] {safe(result.pushed.url)}: read "
        f"{result.bytes_read / 1e6:.1f} MB and sent {result.bytes_sent / 1e6:.1f} MB of a model of "
        f"{result.bytes_total / 1e6:.1f} MB ({both / result.bytes_total:.1%}); the quality gate "
        "did not run"
    )
    return True
