"""What will be written, decided from headers alone before the first byte moves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.files.generated import CARD, FIGURE, GENERATED, MANIFEST, UNDO
from surgery.files.paths import is_same, is_within, longest_name
from surgery.folds.edits import Edit
from surgery.models.anatomy import is_editable

# Room for the card, the manifest and the figure.
_MARGIN = 8 * 1024 * 1024


@dataclass(frozen=True)
class FilePlan:
    """One file of the output: copied as it is, or copied and patched by `edits`."""

    name: str
    size: int
    edits: tuple[Edit, ...] = ()

    @property
    def action(self) -> str:
        return "patch" if self.edits else "copy"


@dataclass(frozen=True)
class Plan:
    """Everything that will be written.

    Attributes:
        checkpoint: what is copied, under the names that its container has.
        output: the path that was asked for.
        files: what it will consist of.
        edits: the changed tensors; of an adapter, those that it stands for.
        overwrite: whether an earlier conversion may be replaced.
        generated: files that are made anew, such as the card.
        undo_size: bytes of what the edits overwrite, where that is kept in a file.
        first: name of the first of several shards of one file; empty for a folder or a whole file.
        beside: what the edits become, where the base stays as it is; else empty.
    """

    checkpoint: Checkpoint
    output: Path
    files: tuple[FilePlan, ...]
    edits: tuple[Edit, ...]
    overwrite: bool
    generated: tuple[str, ...] = ()
    undo_size: int = 0
    first: str = ""
    beside: str = ""

    @property
    def product(self) -> Path:
        """What is there in the end: the output itself, or the first of its shards."""
        return self.output.with_name(self.first) if self.first else self.output

    @property
    def bytes_written(self) -> int:
        """Bytes of all files but those made anew."""
        return sum(file.size for file in self.files)

    @property
    def bytes_needed(self) -> int:
        """Free disk space without which nothing is begun."""
        return self.bytes_written + self.undo_size + _MARGIN

    @property
    def bytes_edited(self) -> int:
        """Bytes of the tensors that change."""
        if self.beside:
            return 0
        return sum(self.checkpoint.tensors[edit.tensor].size for edit in self.edits)

    def summary(self) -> dict[str, Any]:
        """The plan as data: what `--dry-run --json` prints."""
        return {
            "source": str(self.checkpoint.folder),
            "output": str(self.product),
            "bytes_written": self.bytes_written,
            "bytes_needed": self.bytes_needed,
            "bytes_edited": self.bytes_edited,
            "tensors_total": len(self.checkpoint.tensors),
            "tensors_edited": _edit_records(self.checkpoint, self.edits),
            "files": [
                {"name": file.name, "bytes": file.size, "action": file.action}
                for file in self.files
            ],
            "generated": list(self.generated),
            "left_out": list(self.checkpoint.left_out),
        }


@dataclass(frozen=True)
class RemoteFile:
    """A file of the base on the Hub.

    Attributes:
        size: in bytes.
        sha256: where it is a large file.
        blob: git's sha1 of it, where it is a small one.
    """

    size: int
    sha256: str | None
    blob: str | None = None


@dataclass(frozen=True)
class RemotePlan:
    """What a conversion on the Hub will do, decided before any file is fetched.

    Attributes:
        checkpoint: of the base, on the Hub.
        repository: where it goes.
        edits: the changed tensors.
        sent: the base's files that are patched here, with their sizes in bytes.
        copied: those that stay on the server, likewise.
        listing: all of them, as the Hub lists them.
    """

    checkpoint: Checkpoint
    repository: str
    edits: tuple[Edit, ...]
    sent: Mapping[str, int]
    copied: Mapping[str, int]
    listing: Mapping[str, RemoteFile]

    def summary(self) -> dict[str, Any]:
        """The plan as data: what `--dry-run --json` prints."""
        return {
            "source": f"{self.checkpoint.origin.name}@{self.checkpoint.origin.commit}",
            "repository": self.repository,
            "tensors_total": len(self.checkpoint.tensors),
            "tensors_edited": _edit_records(self.checkpoint, self.edits),
            "sent": dict(self.sent),
            "copied": dict(self.copied),
            "left_out": list(self.checkpoint.left_out),
        }


def _edit_records(checkpoint: Checkpoint, edits: tuple[Edit, ...]) -> list[dict[str, Any]]:
    """Which tensors change, and what they are, as data."""
    return [
        {
            "tensor": edit.tensor,
            "layer": edit.layer,
            "kind": edit.kind,
            "dtype": checkpoint.tensors[edit.tensor].dtype,
            "shape": list(checkpoint.tensors[edit.tensor].shape),
            "file": checkpoint.tensors[edit.tensor].file,
            "dimensions": len(edit.dimensions),
        }
        for edit in edits
    ]


def make_plan(
    checkpoint: Checkpoint,
    edits: tuple[Edit, ...],
    output: Path,
    *,
    overwrite: bool = False,
    figure: bool = False,
    undo_size: int = 0,
) -> Plan:
    """Decide every file of the output and check all that can be checked.

    figure: whether the layers are drawn. undo_size: bytes of the undo file; 0: there is none.
    Raises BadSettings for an output that exists or is the source, Unsupported for a tensor in a
    format that cannot be edited, BadCheckpoint for edits the headers contradict, and BadSettings
    when the disk is too small.
    """
    by_file = edits_by_file(checkpoint, edits)
    names = (*checkpoint.weight_files, *checkpoint.side_files)
    files = tuple(
        FilePlan(name, checkpoint.file_sizes[name], by_file.get(name, ()))
        for name in names
        if name not in GENERATED
    )
    plan = Plan(
        checkpoint,
        Path(os.path.abspath(output)),
        files,
        edits,
        overwrite,
        generated=(CARD, *([FIGURE] * figure), *([UNDO] if undo_size else []), MANIFEST),
        undo_size=undo_size,
    )
    check_output(plan.checkpoint.sources, plan.output, overwrite=overwrite)
    check_space(plan)
    return plan


def edits_by_file(
    checkpoint: Checkpoint, edits: tuple[Edit, ...]
) -> Mapping[str, tuple[Edit, ...]]:
    """Edits by the file they patch; raises where the headers contradict them, see `make_plan`."""
    by_file: dict[str, tuple[Edit, ...]] = {}
    seen: set[str] = set()
    for edit in edits:
        entry = checkpoint.tensors.get(edit.tensor)
        if entry is None:
            raise BadCheckpoint(f"The checkpoint has no tensor {edit.tensor} to edit.")
        if edit.tensor in seen:
            raise BadCheckpoint(f"{edit.tensor} would be edited twice.")
        seen.add(edit.tensor)
        if not is_editable(checkpoint, edit.tensor):
            raise Unsupported(
                f"{edit.tensor} is stored as {entry.dtype}, which cannot be edited; convert the "
                "unquantised checkpoint."
            )
        if not edit.fits(entry.shape):
            raise BadCheckpoint(
                f"{edit.tensor} has shape {list(entry.shape)}, which the mask does not fit."
            )
        by_file[entry.file] = (*by_file.get(entry.file, ()), edit)
    return by_file


def check_apart(sources: Iterable[Path], output: Path) -> None:
    """Raise BadSettings where an output is one of the sources, or lies inside or around one."""
    for source in sources:
        if is_same(source, output):
            raise BadSettings("The output is the source itself; choose another --output.")
        if is_within(output, source) or is_within(source, output):
            raise BadSettings(
                f"The output {output} and the source {source} lie inside one another; "
                "choose an --output elsewhere."
            )


def check_output(sources: Iterable[Path], output: Path, *, overwrite: bool) -> None:
    """Raise BadSettings unless `output` may be created; nothing is touched."""
    check_apart(sources, output)
    if os.path.lexists(output):
        if not overwrite:
            raise BadSettings(f"{output} exists already; give --overwrite or another --output.")
        if not output.is_dir() or output.is_symlink():
            raise BadSettings(f"{output} is not a directory, so it will not be overwritten.")
        if any(output.iterdir()) and not (output / MANIFEST).is_file():
            raise BadSettings(
                f"{output} holds files that surgery did not write (no {MANIFEST}), so it will not "
                "be overwritten; remove it yourself or choose another --output."
            )
    check_parent(output)


def check_parent(output: Path) -> None:
    """Raise BadSettings unless something can be created at a path."""
    parent = existing_parent(output)
    if not parent.is_dir():
        raise BadSettings(f"{parent} is not a directory; choose another --output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadSettings(f"{parent} is not writable; choose another --output.")
    # What is written has a longer name until it is whole: see `staging.temporary_sibling`.
    if longest_name(parent) < len(os.fsencode(f".{output.name}.12345678.part")):
        raise BadSettings(f"The name {output.name} is too long; choose another --output.")


def existing_parent(path: Path) -> Path:
    """The nearest ancestor that exists."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def check_space(plan: Plan) -> None:
    """Raise BadSettings where the disk is too small for a plan."""
    free = shutil.disk_usage(existing_parent(plan.output)).free
    if free < plan.bytes_needed:
        raise BadSettings(
            f"Writing needs {plan.bytes_needed / 1e9:.2f} GB and {existing_parent(plan.output)} "
            f"has {free / 1e9:.2f} GB free; choose an --output on a larger disk."
        )


def check_free(output: Path) -> None:
    """Raise BadSettings where something is at the output, or nothing can be."""
    if os.path.lexists(output):
        raise BadSettings(f"{output} exists already; choose another --output.")
    parent = existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadSettings(f"{parent} is not a writable directory; choose another --output.")
