"""surgery finetune"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options
from surgery.errors import Terminated


@click.command()
@click.argument("recipe", type=UserPath(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=UserPath(path_type=Path),
    help="Folder to write, instead of the recipe's.  [default: ./<recipe>-output]",
)
@click.option("--model", metavar="MODEL", help="Train this model instead of the recipe's.")
@click.option("--smoke", is_flag=True, help="Try the recipe: a tiny model, few steps, no download.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output.")
@click.option("--overwrite", is_flag=True, help="Begin again where a training lies already.")
@output_options
def command(
    recipe: Path,
    output: Path | None,
    model: str | None,
    smoke: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a LoRA under the mask as RECIPE says, merge it, fold, verify, and write the result.

    RECIPE is a YAML file in TRL's vocabulary with one block `surgery:`, such as those in the folder
    recipes. For several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml
    -m surgery finetune RECIPE.
    """
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.jobs.finetune import finetune

    terminal = Terminal(quiet=quiet, as_json=as_json)
    try:
        result = finetune(
            recipe,
            output=output,
            smoke=smoke,
            resume=resume,
            overwrite=overwrite,
            changes={"model_name_or_path": model} if model is not None else None,
            reporter=terminal,
        )
    except KeyboardInterrupt as error:  # checkpoints stay, unlike what other commands leave
        click.echo("Interrupted; go on from the last checkpoint with --resume.", err=True)
        sys.exit(143 if isinstance(error, Terminated) else 130)
    if result is None:  # one of several processes, and not the one that writes
        return
    if as_json:
        history = {"history": None, "recipe": None}
        print_json(
            {
                "output": str(result.output),
                "model": str(result.model) if result.model else None,
                "adapter": str(result.adapter) if result.adapter else None,
                "base": str(result.base) if result.base else None,
                **{key: value for key, value in result.record.items() if key not in history},
            }
        )
        return
    for folder in (result.model, result.adapter, result.base):
        if folder is not None:
            terminal.out.print(f"[bold green]Written[/bold green] {safe(folder)}")
    if result.record["recipe"]["keys"]["surgery"]["intervention"] == "gated_attention":
        terminal.out.print(
            "Gated attention cannot be folded: this adapter needs surgery.gated_attention to run."
        )
