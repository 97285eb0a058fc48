"""Files that other files of a checkpoint call for: code, modules of an encoder, pictures."""

from __future__ import annotations

import ast
import json
import posixpath
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from surgery.errors import BadCheckpoint
from surgery.files.generated import CARD

_LARGEST = 4 * 1024 * 1024
_MODULES = "modules.json"
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".avif", ".bmp", ".mp4", ".webm")
# What a card shows: Markdown's images and their references, HTML's sources, and in the metadata.
_SHOWN = re.compile(
    r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*<?([^\s>]+)"
    r"|\b(?:src|srcset|poster)\s*=\s*[\"']?([^\"'\s>]+)|^thumbnail:\s*[\"']?([^\"'\s]+)",
    re.MULTILINE,
)
_LICENCE_LINK = re.compile(r"^license_link:\s*[\"']?([^\"'\s]+)", re.MULTILINE)
_ON_THE_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/[^/]+/[^/]+/\w+/[^/]+/")


def called_for(names: Collection[str], folder: Path | None, card: str | None = None) -> set[str]:
    """Those of the names that configurations, code and card of the folder name.

    Args:
        names: Of the files, with "/" between folders.
        folder: Where they lie, or those of them that say what is needed; None where none do.
        card: The text of the card, where it is not the one in the folder.
    """
    if folder is None:
        return set()
    known = set(names)
    return {
        *_code(known, folder),
        *_modules(known, folder),
        *(name for name in _links(_text(folder, CARD) if card is None else card) if name in known),
    }


def _text(folder: Path, name: str) -> str:
    """The text of a file; nothing where there is none of a usual size."""
    path = folder / name
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}.") from error


def _json(folder: Path, name: str) -> Any:
    try:
        return json.loads(_text(folder, name))
    except (ValueError, RecursionError):  # it is refused where it is needed
        return None


# --------------------------------------------------------------------------------------------
# Code
# --------------------------------------------------------------------------------------------


def _code(known: set[str], folder: Path) -> set[str]:
    """The modules that `auto_map` and `custom_pipelines` name, and what they import from beside."""
    first = [
        f"{reference.split('.', 1)[0]}.py"
        for name in known
        if "/" not in name and name.endswith(".json") and "config" in name
        for reference in _references(_json(folder, name))
        if "--" not in reference  # of another repository
    ]
    return _with_imports([*first, "custom_generate/generate.py"], known, folder)


def _with_imports(first: Sequence[str], known: set[str], folder: Path) -> set[str]:
    """Modules that are there, and those that they import from beside, and so on."""
    found, waiting = set[str](), list(first)
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            waiting += _imported(name, _text(folder, name))
    return found


def _references(value: Any, depth: int = 0) -> Iterator[str]:
    """The classes named below the keys that transformers takes code from."""
    if not isinstance(value, dict) or depth > 8:
        return
    for key, part in value.items():
        if key in ("auto_map", "custom_pipelines"):
            yield from _strings(part)
        else:
            yield from _references(part, depth + 1)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth < 8:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part, depth + 1)


def _imported(name: str, source: str) -> list[str]:
    """Files that a module may import by a relative import, whether they exist or not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a stranger's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = posixpath.dirname(name)
        for _ in range(node.level - 1):
            folder = posixpath.dirname(folder)
        module = posixpath.join(folder, *(node.module or "").split("."))
        paths = [module] if node.module else []
        paths += [posixpath.join(module, alias.name) for alias in node.names]
        for path in paths:
            found += [f"{path}.py", f"{path}/__init__.py"]
    return found


# --------------------------------------------------------------------------------------------
# Modules of a sentence encoder, and the card
# --------------------------------------------------------------------------------------------


def _modules(known: set[str], folder: Path) -> set[str]:
    """What lies in the folders that modules.json names, their own weights too, and its code."""
    listed = _json(folder, _MODULES)
    found: set[str] = set()
    for module in listed if isinstance(listed, list) else ():
        if not isinstance(module, dict):
            continue
        path, kind = str(module.get("path") or "").strip("/"), str(module.get("type") or "")
        if path and not path.startswith("."):
            found |= {name for name in known if posixpath.dirname(name) == path}
        if kind and not kind.startswith("sentence_transformers."):
            found |= _with_imports([f"{kind.split('.', 1)[0]}.py"], known, folder)
    return found


def _links(text: str) -> Iterator[str]:
    """Pictures that a card shows, and the licence that it links to."""
    for match in _SHOWN.finditer(text):
        name = _local(next(group for group in match.groups() if group))
        if name.lower().endswith(_PICTURES):
            yield name
    for match in _LICENCE_LINK.finditer(text):
        yield _local(match[1])


def _local(link: str) -> str:
    """A link of a card as a path in its repository, if it is one."""
    link = _ON_THE_HUB.sub("", link.split("#", 1)[0].split("?", 1)[0])
    return posixpath.normpath(unquote(link)).lstrip("/")
