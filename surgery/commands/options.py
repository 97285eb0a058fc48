"""Options made from the fields of dataclasses, and what several commands share.

A field's metadata says `help`, and where they matter `choices`, `metavar` and `name`, as it is
spelled on the command line; type and default are the field's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from surgery.errors import BadSettings
from surgery.files.paths import expanded

# No model has as many layers; a slip of the finger should not fill the memory.
_DEEPEST = 10_000
# How a model is opened, in the order of the help.
LOADING = ("revision", "device", "dtype", "calibration", "trust_remote_code")

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


class UserPath(click.Path):
    """A path on the command line, `~` expanded also where the shell leaves it: `--output=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, checked as `click.Path` does."""
        spelled = expanded(value) if str(value).startswith("~") else value
        return super().convert(spelled, param, ctx)


def output_options(function: Function) -> Function:
    """--json and --quiet."""
    function = click.option(
        "--quiet", "-q", is_flag=True, help="Print nothing but errors (and JSON, with --json)."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def options(kind: type, *names: str, **changes: Any) -> Decorator:
    """Options for fields of a dataclass, in the order given.

    Args:
        kind: the dataclass.
        names: of its fields.
        changes: what this command says otherwise, as `click.option` takes it: `help`, `default`.
    """

    def decorate(function: Function) -> Function:
        for name in reversed(names):
            function = _option(kind, name, changes)(function)
        return function

    return decorate


def settings(*names: str, **changes: Any) -> Decorator:
    """Options for fields of `Settings`; see `options`."""
    from surgery.settings import Settings  # imports numpy, for commands that have such options

    return options(Settings, *names, **changes)


def task_options(function: Function) -> Function:
    """Which tasks of lm-evaluation-harness to run, and how."""
    from surgery.measure.task_settings import TaskSettings  # likewise

    names = [known.name for known in fields(TaskSettings) if known.name != "backend"]
    return options(TaskSettings, *names)(function)


def listed(name: str, default: Sequence[Any] | None, help: str) -> Decorator:
    """An option for several values of a field of `Settings`, such as `--rates 0.1,0.2`."""
    from surgery.settings import Settings  # likewise

    read = _list_of(get_type_hints(Settings)[name])
    text = _joined(default)
    return click.option(
        f"--{name}s", callback=read, default=text, show_default=True, metavar="LIST", help=help
    )


def check_png(path: Path | None) -> None:
    """Raise BadSettings for a --plot that names no PNG."""
    if path is not None and path.suffix.lower() != ".png":
        raise BadSettings(f"--plot draws a PNG; {path} should end in .png.")


# --------------------------------------------------------------------------------------------
# From a field to an option
# --------------------------------------------------------------------------------------------


def _option(kind: type, name: str, changes: dict[str, Any]) -> Decorator:
    from surgery.settings import spelled  # the dataclass's module imports it too

    known = next(field for field in fields(kind) if field.name == name)
    facts, hint = known.metadata, _plain(get_type_hints(kind)[name])
    declared = spelled(known)
    given: dict[str, Any] = {
        "help": facts["help"],
        "metavar": facts.get("metavar"),
        "default": None if known.default is MISSING else known.default,
        "show_default": True,
        "type": hint,
    }
    if hint is bool:
        given.pop("type")
        if declared.startswith("--no-"):
            given |= {"default": False, "callback": lambda _ctx, _parameter, value: not value}
        if "/" not in declared:
            given["is_flag"] = True
    elif facts.get("repeated"):
        given |= {"type": str, "multiple": True, "show_default": False}
    elif get_origin(hint) is tuple:
        given |= {"type": str, "callback": _PARSERS[name]}
        given["default"] = _joined(given["default"])
    elif "choices" in facts:
        given["type"] = click.Choice(list(facts["choices"]))
    elif given["metavar"] in _PATHS:
        given["type"] = _PATHS[given["metavar"]]
    return click.option(declared, name, **{**given, **changes})


# What a file or folder to read may be, by the metavar of its option.
_PATHS = {"FILE": UserPath(dir_okay=False), "DIR": UserPath()}


def _plain(hint: Any) -> Any:
    """A type without the None that says that nothing need be given."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(part for part in get_args(hint) if part is not NoneType)


def _joined(values: Sequence[Any] | None) -> str | None:
    """Several values as they are typed."""
    if not values:
        return None
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _list_of(kind: Callable[[str], Any], words: str = "a list such as 0.1,0.2") -> Function:
    """Reads several values, separated by commas."""

    def parse(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            return tuple(kind(part.strip()) for part in value.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not {words}") from error

    return parse


def _words(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _layers(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
    """ "7,9-11" as (7, 9, 10, 11)."""
    if value is None:
        return None
    found: set[int] = set()
    try:
        for part in value.split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), min(int(last or first), _DEEPEST) + 1))
        if not found or max(found) >= _DEEPEST:
            raise ValueError(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 7,9-11") from error
    return tuple(sorted(found))


# How the text of an option with several values is read, by the field.
_PARSERS = {
    "layers": _layers,
    "seeds": _list_of(int, "a list of numbers such as 0,1,2"),
    "tasks": _words,
}
