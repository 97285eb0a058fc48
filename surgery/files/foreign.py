"""Values of a stranger's configuration, each of the type that its reader counts on.

A `config.json` is written by other programs and edited by hand: whatever is asked of it may be
missing, null, negative, a string or a list. What is read here is right, or refused in one sentence
that names the field and the value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from surgery.errors import BadCheckpoint

# Characters of a value that a sentence repeats.
_SHOWN = 60


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, which JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(table: Mapping[str, Any], *names: str, default: int | None = None, least: int = 0) -> int:
    """The first whole number under some names.

    Args:
        table: a configuration, or a part of it.
        names: of the field, of which null counts as missing.
        default: where there is none of them; without one that is refused.
        least: the smallest number that makes sense.

    Raises:
        BadCheckpoint: for a value of another type, or a smaller one.
    """
    for name in names:
        value = table.get(name)
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_whole(value) or value < least:
            raise wrong(name, value, f"a whole number from {least} on")
        return int(value)
    if default is None:
        raise BadCheckpoint(f"config.json has no usable {names[0]}.")
    return default


def words(table: Mapping[str, Any], name: str, default: str = "") -> str:
    """The text of a field; `default` where it is missing or null, refused for anything else."""
    value = table.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    return value


def block(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a configuration; empty where it is missing or null, refused for anything else."""
    value = table.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(name, value, "an object")
    return value


def wrong(name: str, value: Any, expected: str) -> BadCheckpoint:
    """The sentence about a value of the wrong type."""
    shown = json.dumps(value, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return BadCheckpoint(f"config.json says {name} = {shown}, which is not {expected}.")
