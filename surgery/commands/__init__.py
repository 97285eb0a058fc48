"""The command line: one module per command, imported when it is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

from surgery.errors import SurgeryError, Terminated

# name: (module, one line for `surgery --help`). The lines are repeated here so that the help
# needs none of the modules.
_COMMANDS = {
    "analyze": "Locate the Massive Emergence Layer of a model and say why.",
    "convert": "Fold the WeMask mask into a checkpoint and write it, verified.",
    "finetune": "Train a LoRA under the mask, merge, fold and verify it.",
    "sweep": "Score many settings on one loaded model, and say which is best.",
    "verify": "Prove a converted checkpoint against its base.",
    "push": "Upload a converted checkpoint to the Hugging Face Hub.",
    "families": "List the model families: what is possible in each, and how it was tested.",
    "inspect": "Show what was done to a converted checkpoint.",
    "compare": "Show what an edit gained and lost, on text and on tasks.",
    "card": "Render the model card of a converted checkpoint again.",
    "revert": "Undo a conversion: the base again, byte for byte.",
    "reproduce": "Convert again from a manifest and compare every hash.",
}

# Characters of an error.
_LONGEST = 1000


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"surgery.commands.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            _say(str(error))
            sys.exit(error.exit_code)
        except Terminated:
            click.echo("Terminated; nothing was left behind.", err=True)
            sys.exit(143)
        except KeyboardInterrupt:
            click.echo("Interrupted; nothing was left behind.", err=True)
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # of a disk, where nothing nearer to it had better words
            where = f" at {error.filename}" if error.filename else ""
            _say(f"{error.strerror or error}{where}.")
            sys.exit(1)


def _say(message: str) -> None:
    """An error as one sentence; a stranger's file may put line breaks and megabytes into it."""
    from surgery.commands.text import printable

    sentence = " ".join(message.split())
    if len(sentence) > _LONGEST:  # what to do stands at the end
        sentence = f"{sentence[: _LONGEST // 2]} … {sentence[-_LONGEST // 2 :]}"
    click.echo(f"Error: {printable(sentence)}", err=True)


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from surgery.outputs.manifest import tool_version

        click.echo(f"surgery {tool_version()}")
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version)
def cli() -> None:
    """Locate a language model's Massive Emergence Layer and fold WeMask into its weights.

    MODEL is a checkpoint folder, a Hub id (also as name@revision), a .gguf file, or `demo`.
    """
