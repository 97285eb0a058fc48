"""A folder: the base's own files, copied, the planned tensors patched in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from surgery.errors import BadCheckpoint
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.digests import file_sha256
from surgery.files.generated import FIGURE, GENERATED, UNDO
from surgery.files.safetensors_file import TensorEntry
from surgery.files.staging import replacing
from surgery.folds.edits import Edit
from surgery.outputs.base import Output, Request, Restored
from surgery.outputs.behaviour import behaviour
from surgery.outputs.checks import (
    Check,
    Verification,
    verify_edits,
    verify_files,
    verify_originals,
    verify_structure,
    verify_untouched,
)
from surgery.outputs.describe import FileComparison, compare_files, describe
from surgery.outputs.figure import plot_layers
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import Operation
from surgery.outputs.plan import (
    Plan,
    check_apart,
    check_free,
    check_output,
    edits_by_file,
    make_plan,
)
from surgery.outputs.records import FileRecord
from surgery.outputs.review import Review
from surgery.outputs.undo import UndoFile, needs_file, undo_size, unpack_file, write_undo
from surgery.outputs.write import copy_plan, staging
from surgery.patient.hub import check_downloads
from surgery.patient.quantised import require_editable

# The stored bytes of a tensor before its edit, from the edit, its entry and its present bytes.
Original = Callable[[Edit, TensorEntry, bytes], bytes]


class Folder(Output):
    """A checkpoint as its base is one, with card, figure and manifest beside the weights."""

    name = "checkpoint"

    def default_path(self, stem: str, words: Sequence[str]) -> Path:
        return Path(f"{stem}-wemask-{'-'.join(words)}")

    def accept(self, request: Request) -> None:
        sources = request.checkpoint.sources
        check_output(sources, request.target, overwrite=request.overwrite)
        fold, strength = request.settings.fold_used, request.settings.strength
        require_editable(
            request.checkpoint, linear=fold.linear, low_rank=fold.low_rank, strength=strength
        )

    def plan(self, operation: Operation, target: Path, *, overwrite: bool) -> Plan:
        checkpoint, edits = operation.patient.checkpoint, operation.edits
        return make_plan(
            checkpoint,
            edits,
            target,
            overwrite=overwrite,
            figure=operation.drawn,
            undo_size=undo_size(checkpoint, edits) if operation.settings.undo_file else 0,
        )

    def write(
        self, plan: Plan, manifest: Manifest, operation: Operation
    ) -> tuple[Verification, Manifest]:
        checkpoint, reporter = plan.checkpoint, operation.patient.reporter
        with staging(plan.output, *checkpoint.sources, overwrite=plan.overwrite) as folder:
            with reporter.bar("Writing", plan.bytes_written) as advance:
                written = copy_plan(plan, folder, advance)
            check_downloads(checkpoint, {w.name: w.source_sha256 for w in written})
            if FIGURE in plan.generated and operation.emergence is not None:
                title = checkpoint.origin.name
                plot_layers(operation.emergence, folder / FIGURE, title=title)
            checks = [
                verify_structure(checkpoint, folder),
                verify_edits(checkpoint, folder, plan.edits),
            ]
            if operation.settings.check:
                reporter.say("Verifying")
                checks.append(verify_untouched(checkpoint, folder, [e.tensor for e in plan.edits]))
                checks += behaviour(
                    operation.patient,
                    operation.mask,
                    operation.fold,
                    folder,
                    operation.edits,
                    manifest.quality,
                )
            verification = Verification(tuple(checks))
            verification.require()
            files = [FileRecord(w.name, w.size, w.sha256, w.source_sha256) for w in written]
            manifest = replace(manifest, verification=verification.as_dict(), files=files)
            if UNDO in plan.generated:
                write_undo(folder / UNDO, checkpoint, plan.edits)
            manifest = describe(manifest, folder, checkpoint, plan.generated)
            reporter.show(verification)
        return verification, manifest

    def wrote(self, manifest: Manifest, path: Path) -> bool:
        return path.is_dir() and manifest.settings.form == self.name and manifest.training is None

    def checks(self, review: Review) -> list[Check]:
        path, manifest, base = review.path, review.manifest, review.checkpoint
        edits = manifest.rebuilt_edits()
        review.reporter.say("Comparing bytes")
        checks = [verify_files(path, manifest.files), verify_structure(base, path)]
        if not checks[1].passed:
            return checks
        edits_by_file(base, edits)  # a damaged manifest may name anything
        checks.append(verify_edits(base, path, edits))
        changed = [edit.tensor for edit in edits]
        checks.append(verify_untouched(base, path, changed, manifest.files))
        originals = manifest.originals()
        if originals:
            checks.append(verify_originals(base, originals))
        fold, mask, patient = manifest.settings.fold_used, manifest.mask(), review.patient()
        # Again from the anatomy: a manifest does not say where a tensor is in the loaded model.
        known = () if fold.exact else fold.edits(patient.anatomy, mask, manifest.calibration())
        return [*checks, *behaviour(patient, mask, fold, path, known, manifest.quality)]

    def restore(self, review: Review, target: Path) -> Restored:
        path, manifest, reporter = review.path, review.manifest, review.reporter
        check_apart([path], target)
        check_free(target)
        converted = open_checkpoint(path, Origin("directory", path.name, str(path)))
        source, original = _originals(review)
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
        return Restored(source, count, tuple(manifest.left_out))

    def compare(
        self, review: Review, again: Path, repeated: Manifest
    ) -> tuple[FileComparison, ...]:
        return compare_files(review.manifest, again, repeated)


def _originals(review: Review) -> tuple[str, Original]:
    """Where the original values are, and how to get a tensor's."""
    kept = review.manifest.originals()

    def from_manifest(edit: Edit, _entry: TensorEntry, _edited: bytes) -> bytes:
        if edit.tensor not in kept:
            raise BadCheckpoint(f"The manifest lacks the original values of {edit.tensor}.")
        return kept[edit.tensor]

    if not needs_file(review.manifest.rebuilt_edits()):
        return "manifest", from_manifest
    if (review.path / UNDO).is_file():
        undo = UndoFile(review.path / UNDO)

        def from_file(edit: Edit, entry: TensorEntry, edited: bytes) -> bytes:
            return kept.get(edit.tensor) or undo.original(edit, entry, edited)

        return "undo file", from_file
    try:
        base = review.checkpoint
    except BadCheckpoint as error:
        raise BadCheckpoint(
            f"{review.path} was written without an undo file (convert --undo-file), and "
            f"{str(error).rstrip('.')}."
        ) from error

    def from_base(edit: Edit, entry: TensorEntry, _edited: bytes) -> bytes:
        found = base.tensors.get(edit.tensor)
        if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
            raise BadCheckpoint(f"{base.origin.typed} has no such tensor as {edit.tensor}.")
        return base.read_bytes(edit.tensor)

    return "base", from_base


def _restore(
    converted: Checkpoint,
    record: FileRecord,
    edits: dict[str, Edit],
    original: Original,
    staged: Path,
) -> None:
    """One file of the base, from the converted one."""
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
