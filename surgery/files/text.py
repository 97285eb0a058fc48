"""Text and JSON: a stranger's read within bounds, ours written alike on every system."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint

LARGEST_TEXT = 64 * 1024 * 1024


def read_text(path: Path) -> str:
    """The text of a file of a usual size, in UTF-8, its ends of lines as they are.

    Whatever a stranger's file names is read in this way: never from a device or a pipe, which may
    have no end.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no plain file, too large, or no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        # Python takes memory for all that is asked for; what reports no size may hold anything.
        size = os.fstat(file.fileno()).st_size or LARGEST_TEXT
        raw = file.read(min(size, LARGEST_TEXT) + 1)
    if len(raw) > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT // 2**20} MiB")
    return raw.decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; BadCheckpoint, in one sentence, where it holds none."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds no JSON object.")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, with the same bytes on every system: lines end as `text` says."""
    path.write_bytes(text.encode("utf-8"))
