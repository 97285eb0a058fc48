"""What the names of files mean to the system that keeps them."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

_LONGEST_NAME = 255


def expanded(path: str | Path) -> Path:
    """A path that a user gave, with the home folder for `~`.

    A shell expands it in `--output ~/x`, and does not in `--output=~/x` or in a notebook.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home of nobody, so a name that begins with a tilde
        return Path(path)


def is_plain_name(name: str) -> bool:
    """Whether a stranger's name of a file stays in the folder it is looked for in, on any system.

    Windows takes `\\` for a separator and `a:b` for a place on a drive; a POSIX system does not.
    """
    return name.isprintable() and PureWindowsPath(name).name == name not in ("", ".", "..")


def longest_name(folder: Path) -> int:
    """Bytes that the name of a file in a folder may have."""
    asked = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else _LONGEST_NAME
    return asked if asked > 0 else _LONGEST_NAME  # where there is no limit, ours is


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place, however either is spelled.

    Where capitals make no difference, two spellings are one file, and `Path.resolve` keeps both.
    """
    if one.resolve() == other.resolve():
        return True
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one of them does not exist, or never could
        return False


def is_within(inner: Path, outer: Path) -> bool:
    """Whether a path lies below a folder, however either is spelled."""
    return any(is_same(parent, outer) for parent in inner.resolve().parents)
