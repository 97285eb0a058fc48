"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

# No model has as many layers; a slip of the finger should not fill the memory.
_DEEPEST = 10_000

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --quiet."""
    function = click.option(
        "--quiet", "-q", is_flag=True, help="Print nothing but errors (and JSON, with --json)."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def analysis_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How to load and observe a model."""
    for option in (
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Run the checkpoint's own Python code. Read it first.",
        ),
        click.option(
            "--calibration",
            metavar="FILE",
            type=click.Path(dir_okay=False),
            help="Text or JSONL in place of the bundled prompts.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
            default="float32",
            show_default=True,
            help="Of the analysis; the written dtype is the source's.",
        ),
        click.option("--device", help="Of the analysis, such as cpu or cuda:0.  [default: best]"),
        click.option("--revision", help="Branch, tag or commit of a Hub model."),
    ):
        function = option(function)
    return function


def task_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which tasks of lm-evaluation-harness to run, and how."""
    for option in (
        click.option(
            "--thinking/--no-thinking",
            default=False,
            show_default=True,
            help="The template's enable_thinking.",
        ),
        click.option(
            "--chat-template/--no-chat-template",
            default=None,
            help="Pose tasks as chat.  [default: where the tokenizer has a template]",
        ),
        click.option(
            "--temperature",
            type=float,
            help="For all generations; 0 is greedy.  [default: the task's]",
        ),
        click.option(
            "--max-new-tokens",
            type=int,
            help="Per generation.  [default: 512; GSM8K 128, as the paper]",
        ),
        click.option(
            "--seeds",
            callback=_numbers,
            default="0,1,2",
            show_default=True,
            help="For sampling tasks.",
        ),
        click.option("--batch-size", help="A number or auto.  [default: auto; 8 on the CPU]"),
        click.option("--limit", type=int, help="Documents per task."),
        click.option(
            "--data",
            type=click.Path(),
            metavar="DIR",
            help="Local documents for the shipped tasks.",
        ),
        click.option(
            "--tasks",
            callback=_words,
            metavar="LIST",
            help="knowledge, math, safety, any name of lm-evaluation-harness, or YAML files and "
            "folders.",
        ),
    ):
        function = option(function)
    return function


def _numbers(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,1,2") from error


def _words(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def check_png(path: Path | None) -> None:
    """Raise BadSettings for a --plot that names no PNG."""
    from surgery.errors import BadSettings

    if path is not None and path.suffix.lower() != ".png":
        raise BadSettings(f"--plot draws a PNG; {path} should end in .png.")


def parse_layers(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
    """ "7,9-11" as (7, 9, 10, 11)."""
    if value is None:
        return None
    try:
        found: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), min(int(last or first), _DEEPEST) + 1)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 7,9-11") from error
    if not found or max(found) >= _DEEPEST:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 7,9-11")
    return tuple(sorted(set(found)))
