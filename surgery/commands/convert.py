"""surgery convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.commands.options import analysis_options, output_options, parse_layers


@click.command()
@click.argument("model")
@click.option(
    "--rate", type=float, default=0.1, show_default=True, help="Share of dimensions to mask."
)
@click.option(
    "--scope",
    type=click.Choice(["first", "all"]),
    default="first",
    show_default=True,
    help="Mask the first layer after the ME Layer, or all after it.",
)
@click.option(
    "--fold",
    type=click.Choice(["norm", "qkv", "sink"]),
    default="norm",
    show_default=True,
    help="norm, qkv: every token. sink: the massive token alone (the paper's method).",
)
@click.option(
    "--select",
    type=click.Choice(["weight", "activation", "random"]),
    default="weight",
    show_default=True,
    help="How dimensions are chosen; weight is the paper's.",
)
@click.option(
    "--strength", type=float, default=1.0, show_default=True, help="1 masks, 0 changes nothing."
)
@click.option("--layer", type=int, metavar="M", help="The ME Layer, instead of searching for it.")
@click.option(
    "--layers", callback=parse_layers, metavar="LIST", help="Target layers, such as 7 or 7,9-11."
)
@click.option(
    "--as",
    "form",
    type=click.Choice(["checkpoint", "adapter", "gguf-adapter"]),
    default="checkpoint",
    show_default=True,
    help="With --fold sink: a PEFT or llama.cpp LoRA of rank 1 for the untouched base.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder to write, or .gguf file if MODEL is one.  [default: ./<name>-wemask-<settings>]",
)
@analysis_options
@click.option("--seed", type=int, default=0, show_default=True, help="For --select random.")
@click.option("--no-check", is_flag=True, help="Skip trace, quality gate and logit comparison.")
@click.option(
    "--check-tokens", type=int, default=4096, show_default=True, help="Tokens the gate measures on."
)
@click.option(
    "--calibration-tokens",
    type=int,
    default=4096,
    show_default=True,
    help="Tokens that --fold sink and --select activation see.",
)
@click.option(
    "--max-degradation",
    type=float,
    default=0.1,
    show_default=True,
    help="Allowed rise of perplexity over base, as a share.",
)
@click.option("--force", is_flag=True, help="Write despite the quality gate; the card says so.")
@click.option(
    "--undo-file",
    is_flag=True,
    help="Keep what qkv and sink overwrite, for `surgery revert` without the base.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion at the output.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--push-to-hub", metavar="REPO", help="Upload afterwards (private).")
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
    no_check: bool,
    remote: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fold the WeMask mask into MODEL and write a plain, verified checkpoint."""
    from surgery.commands.terminal import Terminal, print_json, safe
    from surgery.jobs.convert import convert

    gguf = options["form"] == "gguf-adapter" or (output is not None and output.suffix == ".gguf")
    if options["push_to_hub"] and gguf:
        from surgery.outputs.hub import one_file

        raise one_file(options["push_to_hub"])
    terminal = Terminal(quiet=quiet, as_json=as_json)
    if remote:
        if output is not None or not options["push_to_hub"]:
            raise click.UsageError("--remote needs --push-to-hub, and writes nothing here.")
        if _published(model, terminal, as_json, dry_run, options):
            return
    result = convert(
        model,
        output=output,
        overwrite=overwrite,
        dry_run=dry_run,
        check=not no_check,
        reporter=terminal,
        **options,
    )
    pushed = None
    if result.manifest is not None and options["push_to_hub"]:
        from surgery.jobs.push import push

        pushed = push(result.output, options["push_to_hub"], reporter=terminal)
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

    from surgery.commands.terminal import print_json, safe
    from surgery.jobs.publish import publish
    from surgery.outputs.hub_copy import CopyRefused

    settings = {name: value for name, value in options.items() if name != "push_to_hub"}
    try:
        result = publish(
            model, options["push_to_hub"], reporter=terminal, dry_run=dry_run, **settings
        )
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
