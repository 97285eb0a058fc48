"""The folder of a training: named, begun, or found again to resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import BadSettings, first_line
from surgery.files.paths import expanded
from surgery.files.staging import held, remove_stale, replacing, write_whole
from surgery.files.text import read_json
from surgery.outputs.plan import check_apart
from surgery.outputs.treatment import BLOCK
from surgery.training.recipe import Recipe
from surgery.training.trainer import disk_failed

# What lies in the output folder.
MODEL, ADAPTER, BASE = "model", "adapter", "base"
WORK = "training"


def target_of(output: str | Path | None, raw: Mapping[str, Any], recipe: Path) -> Path:
    """The folder to write: as told, else the recipe's, else named after the recipe."""
    block = raw.get(BLOCK)
    named = output or (block.get("output") if isinstance(block, dict) else None)
    if named is not None and (not isinstance(named, str | Path) or "\0" in str(named)):
        raise BadSettings(f"{BLOCK}: output cannot be {named!r}.")
    return Path(os.path.abspath(expanded(named or f"{recipe.stem}-output")))


@contextmanager
def in_one_sentence(output: Path) -> Iterator[None]:
    """What the disk refuses while training, which several libraries say in their own ways."""
    try:
        yield
    except Exception as error:
        if not disk_failed(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, RuntimeError):
            reason = "a checkpoint could not be written (is the disk full?)"
        raise BadSettings(
            f"Training in {output} failed: {reason.rstrip('.')}; once that is mended, go on with "
            "--resume."
        ) from error


def prepare(
    recipe: Recipe,
    sources: Sequence[Path],
    output: Path,
    stack: ExitStack,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the work folder, or find the one to resume from; BadSettings where neither may be.

    Until `stack` is closed no other process trains there.
    """
    work, known = output / WORK, output / WORK / "recipe.json"
    record = json.loads(json.dumps(recipe.record(), default=str))
    if resume:
        remove_stale(output)
        if not known.is_file():
            raise BadSettings(f"{output} holds no training to resume; begin it without --resume.")
        before = read_json(known)
        differing = _differing(before, record)
        if differing:
            raise BadSettings(
                f"{output} was begun with another recipe ({', '.join(differing)} differ); a "
                "resumed training must be the same one."
            )
        stack.enter_context(held(work))
        write_json(known, record)
        return
    check_apart(sources, output)
    with replacing(output, lambda: _check_output(output, overwrite=overwrite)) as folder:
        _check_output(output, overwrite=overwrite)
        (folder / WORK).mkdir()
        write_json(folder / WORK / "recipe.json", record)
        stack.enter_context(held(folder / WORK))


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Raise BadSettings unless a training may begin in `output`."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise BadSettings(f"{output} exists already and is no folder; choose another --output.")
    work = output / WORK
    if not (work / "recipe.json").is_file():
        if any(output.iterdir()):
            raise BadSettings(f"{output} exists already; choose another --output.")
        return
    if not overwrite:
        raise BadSettings(
            f"{output} holds a training already; go on with --resume, begin again with "
            "--overwrite, or choose another --output."
        )
    with held(work):
        pass


def write_json(path: Path, value: Any) -> None:
    write_whole(path, f"{json.dumps(value, indent=1)}\n".encode())


# What may change between a training and its resumption: none of it touches the weights.
_AFTERWARDS = {"save", "output", "push", "max_degradation", "force"}


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two recipes are different trainings."""

    def plain(record: Mapping[str, Any]) -> dict[str, Any]:
        block = record.get(BLOCK) or {}
        kept = {key: value for key, value in block.items() if key not in _AFTERWARDS}
        return {**{key: value for key, value in record.items() if key != BLOCK}, **kept}

    one, other = plain(before), plain(now)
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
