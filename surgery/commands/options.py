"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
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
