"""Proving the bytes of a written checkpoint, against its base and its manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.errors import BadCheckpoint, SurgeryError, VerificationFailed
from surgery.files.checkpoint import Checkpoint, Origin, check_links, open_checkpoint
from surgery.files.descriptors import read_at
from surgery.files.digests import file_sha256
from surgery.files.generated import GENERATED
from surgery.files.side_files import is_hidden
from surgery.folds.edits import Edit
from surgery.outputs.records import CheckRecord, FileRecord, VerificationRecord
from surgery.outputs.write import edited_blocks

_STEP = 4 * 1024 * 1024


@dataclass(frozen=True)
class Check:
    """One thing that was tested, whether it held, and what was seen."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Raise VerificationFailed, naming the first check that did not hold."""
        for check in self.checks:
            if not check.passed:
                raise VerificationFailed(f"verification failed: {check.name}: {check.detail}.")

    def as_dict(self) -> VerificationRecord:
        """Plain data for JSON."""
        checks: list[CheckRecord] = [
            {"name": check.name, "passed": check.passed, "detail": check.detail}
            for check in self.checks
        ]
        return {"passed": self.passed, "checks": checks}


def checked(name: str, test: Callable[[], str]) -> Check:
    """Run a test that returns a detail, or raises SurgeryError with what is wrong."""
    try:
        return Check(name, True, test())
    except SurgeryError as error:
        return Check(name, False, str(error).rstrip("."))


def verify_structure(base: Checkpoint, folder: Path) -> Check:
    """Index against headers; names, shapes, dtypes and files against the base."""

    def test() -> str:
        written = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
        if set(written.tensors) != set(base.tensors):
            strange = next(iter(set(written.tensors) ^ set(base.tensors)))
            raise BadCheckpoint(f"the tensor {strange} is in one of base and output only")
        for name, entry in base.tensors.items():
            if written.tensors[name] != entry:
                raise BadCheckpoint(f"{name} has another dtype, shape or place than in the base")
        return f"{len(base.tensors)} tensors in {len(base.weight_files)} file(s)"

    return checked("names, shapes, dtypes and index are the base's", test)


def verify_edits(base: Checkpoint, folder: Path, edits: Sequence[Edit]) -> Check:
    """Every edited tensor equals the edit, recomputed from the base."""

    def test() -> str:
        for edit in edits:
            entry = base.tensors[edit.tensor]
            with (
                open(base.folder / entry.file, "rb") as source,
                open(folder / entry.file, "rb") as written,
            ):
                for position, block in edited_blocks(source.fileno(), entry, edit):
                    if read_at(written.fileno(), len(block), position) != bytes(block):
                        raise BadCheckpoint(f"{edit.tensor} is not what the edit gives")
        return f"{len(edits)} tensors recomputed"

    return checked("every edited tensor equals the edit recomputed from the base", test)


def verify_untouched(
    base: Checkpoint, folder: Path, changed: Iterable[str], recorded: Iterable[FileRecord] = ()
) -> Check:
    """All tensors but the changed ones, and all side files, are byte-identical to the base.

    Args:
        base: as it is stored.
        folder: of what was written.
        changed: names of the tensors that were to change.
        recorded: the files that the manifest lists; they must be the base's too, also where an
            earlier version carried more than this one.
    """
    known = (record.name for record in recorded)
    carried = dict.fromkeys((*base.weight_files, *base.side_files, *known))

    def test() -> str:
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name in changed:
            entry = base.tensors[name]
            ranges.setdefault(entry.file, []).append((entry.begin, entry.end))
        compared = 0
        for name in carried:
            if name in GENERATED:
                continue
            skip = sorted(ranges.get(name, []))
            compared += _compare_files(base.folder / name, folder / name, skip)
        present = {
            (Path(root) / file).relative_to(folder).as_posix()
            for root, _directories, files in os.walk(folder)
            for file in files
        }
        others = present - {*carried, *GENERATED}
        # Hidden files are the Hub's and the system's; no loader looks at them.
        strange = sorted(name for name in others if not is_hidden(name))
        if strange:
            raise BadCheckpoint(f"the output has a file the base has not: {strange[0]}")
        return f"{compared / 1e6:.1f} MB compared"

    return checked("every other tensor and side file is byte-identical to the base", test)


def _compare_files(source: Path, written: Path, skip: list[tuple[int, int]]) -> int:
    """Bytes compared; BadCheckpoint at the first difference outside the skipped ranges."""
    try:
        size = source.stat().st_size
        if written.stat().st_size != size:
            raise BadCheckpoint(f"{written.name} has another length than in the base")
        compared = 0
        with open(source, "rb") as one, open(written, "rb") as other:
            position = 0
            for begin, end in [*skip, (size, size)]:
                while position < begin:
                    count = min(_STEP, begin - position)
                    left = read_at(one.fileno(), count, position)
                    if left != read_at(other.fileno(), count, position) or not left:
                        raise BadCheckpoint(
                            f"{written.name} differs from the base near byte {position}"
                        )
                    position += len(left)
                    compared += len(left)
                position = max(position, end)
        return compared
    except OSError as error:
        raise BadCheckpoint(f"{error.filename} cannot be read: {error.strerror}") from error


def verify_files(folder: Path, files: Sequence[FileRecord]) -> Check:
    """sha256 of every file against the manifest."""

    def test() -> str:
        check_links(folder, [record.name for record in files])
        for record in files:
            path = folder / record.name
            if not path.is_file():
                raise BadCheckpoint(f"{record.name} is missing")
            if file_sha256(path) != record.sha256:
                raise BadCheckpoint(f"{record.name} has another sha256 than the manifest says")
        return f"{len(files)} files"

    return checked("every file has the manifest's sha256", test)


def verify_originals(base: Checkpoint, originals: Mapping[str, bytes]) -> Check:
    """The original values kept in the manifest are the base's."""

    def test() -> str:
        for name, raw in originals.items():
            if base.read(name).tobytes() != raw:
                raise BadCheckpoint(f"the original values of {name} are not the base's")
        return f"{len(originals)} tensors"

    return checked("original values kept for undoing are the base's", test)


def verify_masked(base: Checkpoint, folder: Path, edits: Sequence[Edit]) -> Check:
    """What counts of the masked inputs in the saved file: gains and biases, or input columns.

    At strength 1 it is exactly zero; at another it is the base's times 1 - γ, rounded once.

    Args:
        base: the unfolded model; only what is masked has to be as before the fold.
        folder: of the saved checkpoint.
        edits: of a fold that is exact.
    """
    saved = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    strengths = {edit.strength for edit in edits} - {1.0}
    shares = ", ".join(f"{1.0 - strength:.6g}" for strength in sorted(strengths))
    name = (
        f"masked inputs are {shares} times the base's, rounded once, in the saved file"
        if strengths
        else "masked inputs are exactly zero in the saved file"
    )

    def test() -> str:
        seen: Counter[str] = Counter()
        for edit in edits:
            values = edit.masked(saved.read(edit.tensor))
            if edit.strength == 1.0:
                expected = np.zeros_like(values)
            else:
                dtype = base.tensors[edit.tensor].dtype
                expected = edit.masked(edit.apply(base.read(edit.tensor), dtype))
            if not np.array_equal(values, expected):
                what = "zero" if edit.strength == 1.0 else "that multiple of the base's"
                raise BadCheckpoint(f"{edit.tensor} is not {what}")
            seen[edit.kind] += values.size
        return ", ".join(f"{count} values of {_KINDS[kind]}" for kind, count in seen.items())

    return checked(name, test)


_KINDS = {"gain": "gains", "bias": "biases", "columns": "input columns"}
