"""A conversion on the Hub, without downloading the model.

A norm fold changes a few kilobytes in one file of many. The others are copied on the server, from
repository to repository; only the file that changes passes through here, and what the analysis
reads.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError
from surgery.files import dtypes
from surgery.files.checkpoint import Checkpoint
from surgery.files.descriptors import read_at, write_exactly
from surgery.files.digests import file_sha256
from surgery.files.generated import CARD, FIGURE, GENERATED, MANIFEST
from surgery.files.safetensors_file import read_header
from surgery.files.side_files import divided, require_matches
from surgery.folds.edits import Edit
from surgery.outputs.checks import Verification, checked
from surgery.outputs.describe import describe, hashed
from surgery.outputs.figure import plot_layers
from surgery.outputs.hub import (
    Expected,
    Place,
    Pushed,
    Upload,
    failed,
    in_one_sentence,
    status_of,
)
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import Operation
from surgery.outputs.plan import RemoteFile, RemotePlan, edits_by_file
from surgery.outputs.records import FileRecord
from surgery.outputs.write import edited_blocks
from surgery.patient.hub import hub_words
from surgery.patient.quantised import method_of, require_editable
from surgery.patient.remote import KeptRanges
from surgery.settings import Settings

_STEP = 8 * 1024 * 1024
# Room for the card, the manifest and the figure.
_MARGIN = 8 * 1024 * 1024


class CopyRefused(SurgeryError):
    """The server, or this release of its client, does not copy between repositories."""


@dataclass(frozen=True)
class Copied:
    """What was committed.

    Attributes:
        pushed: where it went.
        manifest: in the repository.
        bytes_sent: what passed from here.
    """

    pushed: Pushed
    manifest: Manifest
    bytes_sent: int


class HubCopy:
    """A repository made of another one's files and of what changed."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def accept(self, checkpoint: Checkpoint, settings: Settings) -> None:
        """Refuse what the whole model is needed for, before anything is read.

        Raises:
            BadSettings: with the way out.
        """
        fold = settings.fold_used
        if fold.calibrates or settings.select == "activation" or settings.form != "checkpoint":
            raise BadSettings(
                "--remote does not load the model, which --fold sink and --select activation need; "
                "leave it out."
            )
        if settings.undo_file:
            raise BadSettings("--undo-file is written by ordinary conversions; leave out --remote.")
        if checkpoint.origin.kind != "hub":
            raise BadSettings(f"--remote is for models on the Hub; {settings.model} is not one.")
        require_editable(
            checkpoint,
            linear=fold.linear,
            low_rank=fold.low_rank,
            strength=settings.strength,
        )
        if method_of(checkpoint.config) and not settings.targets_given:
            raise BadSettings(
                "A quantised model is not searched on the Hub: give --layer, or leave out --remote."
            )

    def plan(self, operation: Operation) -> RemotePlan:
        """What is patched here and sent, and what is copied on the server."""
        checkpoint, edits = operation.patient.checkpoint, operation.edits
        changed = edits_by_file(checkpoint, edits)
        info, left_out = _listing(checkpoint, operation.settings.include)
        _check_space(sum(checkpoint.file_sizes[name] for name in changed))
        return RemotePlan(
            replace(checkpoint, left_out=left_out),
            self.repository,
            edits,
            sent={name: checkpoint.file_sizes[name] for name in changed},
            copied={name: known.size for name, known in info.items() if name not in changed},
            listing=info,
        )

    def write(self, plan: RemotePlan, operation: Operation, *, public: bool) -> Copied:
        """Fetch and patch what changes, commit in one step, and look at what is there then.

        Raises:
            CopyRefused: where the server does not copy; then nothing was committed.
            VerificationFailed: where the repository does not hold what it should.
        """
        reporter = operation.patient.reporter
        by_file = edits_by_file(plan.checkpoint, plan.edits)
        with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
            folder = Path(temporary)
            with reporter.bar("Reading", sum(plan.sent.values())) as advance:
                expected: dict[str, str] = {}
                for name, edits in by_file.items():
                    expected |= _patched(plan, name, edits, folder, advance)
            manifest = _describe(plan, operation, folder, expected)
            made = sorted(
                path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
            )
            copied = [name for name in plan.listing if name not in made]
            reporter.say(
                f"Copying {len(copied)} files on the server ({', '.join(copied)}), sending "
                f"{len(made)} ({', '.join(made)})"
            )
            pushed = _commit(plan, folder, made, copied, public)
            sent = sum((folder / name).stat().st_size for name in made)
        return Copied(pushed, manifest, sent)


def _listing(
    checkpoint: Checkpoint, include: Sequence[str]
) -> tuple[dict[str, RemoteFile], tuple[str, ...]]:
    """The base's files that a conversion carries, and the names of those that it leaves behind."""
    import huggingface_hub

    with in_one_sentence(checkpoint.origin.name):
        found = huggingface_hub.HfApi().model_info(
            checkpoint.origin.name, revision=checkpoint.origin.commit, files_metadata=True
        )
        known = {
            sibling.rfilename: RemoteFile(
                int(sibling.size or 0),
                sibling.lfs.sha256 if sibling.lfs is not None else None,
                sibling.blob_id if sibling.lfs is None else None,
            )
            for sibling in found.siblings or []
        }
    require_matches(known, include)
    weights = checkpoint.weight_files
    kept, left = divided(sorted(known), checkpoint.weights, include, checkpoint.folder)
    carried = [name for name in known if name in weights or name in kept]
    return {name: known[name] for name in carried if name not in GENERATED}, left


def _check_space(needed: int) -> None:
    """Raise BadSettings where the temporary folder has no room for the files that change."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        raise BadSettings(
            f"The files that change need {(needed + _MARGIN) / 1e9:.2f} GB in {folder}, which has "
            f"{free / 1e9:.2f} GB free; set TMPDIR to a folder on a larger disk."
        )


def _patched(
    plan: RemotePlan,
    name: str,
    edits: Sequence[Edit],
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """One changed file, fetched whole, checked against the Hub's sha256, and patched.

    What the analysis has kept of it is moved, so that it takes its room once.

    Returns:
        sha256 of every edited tensor, recomputed from the base's bytes.
    """
    checkpoint, known, path = plan.checkpoint, plan.listing[name], folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint.remote, KeptRanges):
        checkpoint.remote.move(name, path, advance)
    else:
        _copy(checkpoint, name, path, advance)
    if known.sha256 is not None and file_sha256(path) != known.sha256:
        raise BadCheckpoint(f"{name} did not arrive as it is on the Hub (another sha256).")
    entries = {edit.tensor: checkpoint.tensors[edit.tensor] for edit in edits}
    expected = {}
    with open(path, "rb+") as file:
        for edit in edits:
            entry = entries[edit.tensor]
            raw = read_at(file.fileno(), entry.size, entry.begin)
            values = dtypes.decode(raw, entry.dtype, entry.shape)
            applied = edit.apply(values, entry.dtype).tobytes()
            expected[edit.tensor] = hashlib.sha256(applied).hexdigest()
            for position, block in edited_blocks(file.fileno(), entry, edit):
                write_exactly(file.fileno(), block, position)
    return expected


def _copy(checkpoint: Checkpoint, name: str, path: Path, advance: Callable[[int], None]) -> None:
    """A file of the Hub's cache."""
    size = checkpoint.file_sizes[name]
    with open(path, "xb") as file:
        for begin in range(0, size, _STEP):
            raw = checkpoint.ranges.read(name, begin, min(begin + _STEP, size))
            file.write(raw)
            advance(len(raw))


def _describe(
    plan: RemotePlan, operation: Operation, folder: Path, expected: Mapping[str, str]
) -> Manifest:
    """Card, figure and manifest beside the changed files."""
    checkpoint, emergence = plan.checkpoint, operation.emergence
    verification = _verify(plan, folder, expected)
    verification.require()
    files = []
    for name, known in plan.listing.items():
        source = known.sha256 or _small_sha256(checkpoint, name, known)
        if name in plan.sent:
            made = hashed(folder, name)
            files.append(FileRecord(name, made.size, made.sha256, source))
        else:
            files.append(FileRecord(name, known.size, source, source))
    manifest = replace(operation.manifest(plan), verification=verification.as_dict(), files=files)
    if operation.drawn and emergence is not None:
        plot_layers(emergence, folder / FIGURE, title=checkpoint.origin.name)
    generated = (CARD, *([FIGURE] if operation.drawn else []), MANIFEST)
    return describe(manifest, folder, checkpoint, generated)


def _small_sha256(checkpoint: Checkpoint, name: str, known: RemoteFile) -> str:
    """Of a file that the Hub keeps in git, whose hashes are of another kind."""
    path = checkpoint.folder / name
    ranges = checkpoint.ranges
    raw = path.read_bytes() if path.is_file() else ranges.read(name, 0, ranges.size(name))
    found = Expected.of(raw)
    if known.blob not in (None, found.blob):
        raise BadCheckpoint(f"{name} did not arrive as it is on the Hub (another git digest).")
    return str(found.sha256)


def _verify(plan: RemotePlan, folder: Path, expected: Mapping[str, str]) -> Verification:
    """The changed files against the base on the Hub; the others are copies by their hash."""
    checkpoint = plan.checkpoint

    def structure() -> str:
        for name in plan.sent:
            header = read_header(folder / name)
            if any(checkpoint.tensors[tensor] != entry for tensor, entry in header.items()):
                raise BadCheckpoint(f"{name} has another header than the base's")
        return f"{len(checkpoint.tensors)} tensors in {len(checkpoint.weight_files)} file(s)"

    def edited() -> str:
        for edit in plan.edits:
            entry = checkpoint.tensors[edit.tensor]
            with open(folder / entry.file, "rb") as file:
                raw = read_at(file.fileno(), entry.size, entry.begin)
            if hashlib.sha256(raw).hexdigest() != expected[edit.tensor]:
                raise BadCheckpoint(f"{edit.tensor} is not what the edit gives")
        return f"{len(plan.edits)} tensors recomputed"

    return Verification(
        (
            checked("names, shapes, dtypes and index are the base's", structure),
            checked("every edited tensor equals the edit recomputed from the base", edited),
        )
    )


def _commit(
    plan: RemotePlan, folder: Path, made: Sequence[str], copied: Sequence[str], public: bool
) -> Pushed:
    """One commit: changed and generated files sent, the others copied.

    Raises:
        CopyRefused: where the server, or this release of its client, refuses the copies.
        SurgeryError: for everything else, the server's own failures among it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    origin = plan.checkpoint.origin
    upload = Upload(Place(plan.repository, public=public))
    expected = {name: Expected.of(folder / name) for name in made}
    for name in copied:
        known = plan.listing[name]
        expected[name] = Expected(known.size, known.sha256, known.blob)

    def operations() -> list[Any]:
        return [
            *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=folder / n) for n in made),
            *(CommitOperationDelete(path_in_repo=name) for name in upload.stale(expected)),
            *(
                CommitOperationCopy(
                    src_path_in_repo=name,
                    path_in_repo=name,
                    src_revision=origin.commit,
                    src_repo_id=origin.name,
                    src_repo_type="model",
                )
                for name in copied
            ),
        ]

    message = f"{origin.name} with WeMask, copied on the server"
    with in_one_sentence(plan.repository):
        try:
            return upload.commit(operations, expected, message)
        except Exception as error:
            if not _refuses_copies(error):
                raise
            raise CopyRefused(
                f"The files cannot be copied to {plan.repository} on the server: {hub_words(error)}"
            ) from error


def _refuses_copies(error: Exception) -> bool:
    """Whether an exception says that files are not copied between repositories, and no more.

    Either this release of the client cannot ask for it, knows of a file that it cannot, or got a
    list of such files; or the server refuses. A server that fails has refused nothing.
    """
    status = status_of(error)
    if status is not None:
        refused = status == 501 or (400 <= status < 500 and not failed(error))
        return refused and _asked_to_copy(error)
    if isinstance(error, TypeError):
        return "src_repo" in str(error)
    if isinstance(error, ValueError):
        return "Cannot duplicate" in str(error)
    return type(error).__name__ == "FileDuplicationError"  # which not every release has


def _asked_to_copy(error: Any) -> bool:
    request = getattr(error.response, "request", None)
    url = str(getattr(request, "url", "") or getattr(error.response, "url", ""))
    # Objects that were not copied are missed at the commit.
    return "/lfs-files/duplicate" in url or "LFS pointer" in str(error)
