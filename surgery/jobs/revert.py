"""Undoing a conversion: the base again, byte for byte."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.digests import file_sha256
from surgery.files.generated import GENERATED, UNDO
from surgery.files.safetensors_file import TensorEntry
from surgery.files.staging import replacing
from surgery.folds.fold import Edit
from surgery.outputs.manifest import FileRecord, Manifest, read_manifest
from surgery.outputs.plan import check_apart, existing_parent
from surgery.outputs.undo import UndoFile, needs_file, unpack_file
from surgery.reporter import SILENT, Reporter

Original = Callable[[Edit, TensorEntry, bytes], bytes]


@dataclass(frozen=True)
class Reverted:
    """A restored base.

    source: where the original values came from: "manifest", "undo file" or "base". files: how
    many were restored, each with the base's sha256. not_carried: files of the base that the
    conversion had left out, so that they are not here either.
    """

    output: Path
    source: str
    files: int
    not_carried: tuple[str, ...]


def revert(
    folder: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    reporter: Reporter = SILENT,
) -> Reverted:
    """Write the base of a converted checkpoint to `output`, checked against the recorded hashes.

    folder: a converted checkpoint, or a converted .gguf file. base: the base model, needed only
    where neither the manifest nor an undo file holds what the edit overwrote. Raises BadSettings
    for an output that exists, BadCheckpoint where the original bytes cannot be had or are not the
    recorded ones; then nothing is written.
    """
    path, target = Path(folder), Path(os.path.abspath(output))
    if path.is_file():
        from surgery.outputs.gguf_conversion import revert_gguf

        return Reverted(target, "manifest", revert_gguf(path, target), ())
    manifest = read_manifest(path)
    if manifest.settings.get("form", "checkpoint") != "checkpoint":
        raise BadSettings(
            f"{path} is an adapter, which changes no byte of its base; there is nothing to undo."
        )
    if manifest.training is not None:
        raise BadSettings(f"{path} was trained, which cannot be undone; take its base instead.")
    check_apart([path], target)
    check_free(target)
    converted = open_checkpoint(path, Origin("directory", path.name, str(path)))
    source, original = _originals(path, manifest, base, reporter)
    edits = {edit.tensor: edit for edit in manifest.rebuilt_edits()}
    records = [record for record in manifest.files if record.name not in GENERATED]
    with (
        replacing(target, lambda: check_free(target)) as staged,
        reporter.bar("Restoring", sum(record.size for record in records)) as advance,
    ):
        for record in records:
            _restore(converted, record, edits, original, staged)
            advance(record.size)
        for name, packed in manifest.replaced.items():
            (staged / name).write_bytes(unpack_file(packed))
    count = len(records) + len(manifest.replaced)
    return Reverted(target, source, count, tuple(manifest.left_out))


def check_free(output: Path) -> None:
    """Raise BadSettings where something is at the output, or nothing can be."""
    if os.path.lexists(output):
        raise BadSettings(f"{output} exists already; choose another --output.")
    parent = existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadSettings(f"{parent} is not a writable directory; choose another --output.")


def _originals(
    folder: Path, manifest: Manifest, base: str | None, reporter: Reporter
) -> tuple[str, Original]:
    """Where the original values are, and how to get a tensor's."""
    kept = {
        record.tensor: base64.b64decode(record.original)
        for record in manifest.edits
        if record.original is not None
    }
    if not needs_file(manifest.rebuilt_edits()):
        return "manifest", lambda edit, _entry, _edited: _in(kept, edit)
    if (folder / UNDO).is_file():
        undo = UndoFile(folder / UNDO)
        return (
            "undo file",
            lambda edit, entry, edited: (
                kept[edit.tensor] if edit.tensor in kept else undo.original(edit, entry, edited)
            ),
        )
    from surgery.jobs.verify import base_of

    try:
        checkpoint: Checkpoint = base_of(manifest, base, reporter)
    except BadCheckpoint as error:
        raise BadCheckpoint(
            f"{folder} was written without an undo file (convert --undo-file), and "
            f"{str(error).rstrip('.')}."
        ) from error

    def from_base(edit: Edit, entry: TensorEntry, _edited: bytes) -> bytes:
        found = checkpoint.tensors.get(edit.tensor)
        if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
            raise BadCheckpoint(f"{checkpoint.origin.typed} has no such tensor as {edit.tensor}.")
        return checkpoint.read_bytes(edit.tensor)

    return "base", from_base


def _in(kept: dict[str, bytes], edit: Edit) -> bytes:
    if edit.tensor not in kept:
        raise BadCheckpoint(f"The manifest lacks the original values of {edit.tensor}.")
    return kept[edit.tensor]


def _restore(
    converted: Checkpoint,
    record: FileRecord,
    edits: dict[str, Edit],
    original: Original,
    staged: Path,
) -> None:
    source, target = converted.folder / record.name, staged / record.name
    if not source.is_file():
        raise BadCheckpoint(f"{source} is missing; fetch the converted checkpoint again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        for name, edit in edits.items():
            entry = converted.tensors.get(name)
            if entry is None:
                raise BadCheckpoint(f"{converted.folder} has no tensor {name}.")
            if entry.file != record.name:
                continue
            raw = original(edit, entry, converted.read_bytes(name))
            if len(raw) != entry.size:
                raise BadCheckpoint(f"The original values of {name} do not fit the tensor.")
            file.seek(entry.begin)
            file.write(raw)
    if file_sha256(target) != (record.source_sha256 or record.sha256):
        raise BadCheckpoint(
            f"{record.name} does not come out as the base's (another sha256): the converted "
            "checkpoint, or what it was reverted with, is damaged; nothing was written."
        )
