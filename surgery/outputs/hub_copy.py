"""A conversion on the Hub, without downloading the model.

A norm fold changes a few kilobytes in one file of many. The others are copied on the server, from
repository to repository; only the file that changes passes through here, and what the analysis
reads.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, VerificationFailed
from surgery.files.checkpoint import Checkpoint
from surgery.files.descriptors import read_at, write_exactly
from surgery.files.generated import CARD, FIGURE, GENERATED, MANIFEST
from surgery.files.safetensors_file import read_header
from surgery.files.side_files import divided
from surgery.folds.edits import Edit
from surgery.outputs.checks import Verification, checked
from surgery.outputs.describe import describe, hashed
from surgery.outputs.figure import plot_layers
from surgery.outputs.hub import Pushed, in_one_sentence, stale_files
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import Operation
from surgery.outputs.plan import RemoteFile, RemotePlan, edits_by_file
from surgery.outputs.records import FileRecord
from surgery.outputs.write import edited_blocks
from surgery.patient.hub import hub_words
from surgery.patient.quantised import method_of, require_editable
from surgery.patient.repository import repository_name
from surgery.settings import Settings

_STEP = 8 * 1024 * 1024


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
        info, left_out = _listing(checkpoint)
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
                for name, edits in by_file.items():
                    _patched(plan, name, edits, folder, advance)
            manifest = _describe(plan, operation, folder, by_file)
            made = sorted(path.name for path in folder.iterdir())
            copied = [name for name in plan.listing if name not in made]
            reporter.say(f"Copying {len(copied)} files on the server, sending {len(made)}")
            pushed = _commit(plan, folder, made, copied, public)
            sent = sum((folder / name).stat().st_size for name in made)
        _confirm(pushed, plan.repository, manifest)
        return Copied(pushed, manifest, sent)


def _listing(checkpoint: Checkpoint) -> tuple[dict[str, RemoteFile], tuple[str, ...]]:
    """The base's files that a conversion carries, and the names of those that it leaves behind."""
    import huggingface_hub

    with in_one_sentence(checkpoint.origin.name):
        found = huggingface_hub.HfApi().model_info(
            checkpoint.origin.name, revision=checkpoint.origin.commit, files_metadata=True
        )
        names = sorted(sibling.rfilename for sibling in found.siblings or [])
        kept, left = divided(names, checkpoint.weights, (), checkpoint.folder)
        carried = {*checkpoint.weight_files, *kept} - {*GENERATED}
        listing = {}
        for sibling in found.siblings or []:
            large = sibling.lfs.sha256 if sibling.lfs is not None else None
            if sibling.rfilename in carried:
                listing[sibling.rfilename] = RemoteFile(int(sibling.size or 0), large)
    return listing, left


def _patched(
    plan: RemotePlan,
    name: str,
    edits: Sequence[Edit],
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    """One changed file, fetched whole, checked against the Hub's sha256, and patched."""
    checkpoint, known = plan.checkpoint, plan.listing[name]
    digest, size = hashlib.sha256(), checkpoint.file_sizes[name]
    with open(folder / name, "xb+") as file:
        for begin in range(0, size, _STEP):
            raw = checkpoint.ranges.read(name, begin, min(begin + _STEP, size))
            digest.update(raw)
            file.write(raw)
            advance(len(raw))
        file.flush()
        if known.sha256 is not None and digest.hexdigest() != known.sha256:
            raise BadCheckpoint(f"{name} did not arrive as it is on the Hub (another sha256).")
        for edit in edits:
            entry = checkpoint.tensors[edit.tensor]
            for position, block in edited_blocks(file.fileno(), entry, edit):
                write_exactly(file.fileno(), block, position)


def _describe(
    plan: RemotePlan, operation: Operation, folder: Path, by_file: Mapping[str, Sequence[Edit]]
) -> Manifest:
    """Card, figure and manifest beside the changed files."""
    checkpoint, emergence = plan.checkpoint, operation.emergence
    verification = _verify(checkpoint, folder, plan.edits, by_file)
    verification.require()
    files = []
    for name, known in plan.listing.items():
        source = known.sha256 or _small_sha256(checkpoint, name)
        if name in by_file:
            made = hashed(folder, name)
            files.append(FileRecord(name, made.size, made.sha256, source))
        else:
            files.append(FileRecord(name, known.size, source, source))
    manifest = replace(operation.manifest(plan), verification=verification.as_dict(), files=files)
    if operation.drawn and emergence is not None:
        plot_layers(emergence, folder / FIGURE, title=checkpoint.origin.name)
    generated = (CARD, *([FIGURE] if operation.drawn else []), MANIFEST)
    return describe(manifest, folder, checkpoint, generated)


def _small_sha256(checkpoint: Checkpoint, name: str) -> str:
    """Of a file that the Hub keeps in git, whose hashes are of another kind."""
    path = checkpoint.folder / name
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    ranges = checkpoint.ranges
    return hashlib.sha256(ranges.read(name, 0, ranges.size(name))).hexdigest()


def _verify(
    checkpoint: Checkpoint,
    folder: Path,
    edits: tuple[Edit, ...],
    by_file: Mapping[str, Sequence[Edit]],
) -> Verification:
    """The changed files against the base on the Hub; the others are copies by their hash."""

    def structure() -> str:
        for name in by_file:
            header = read_header(folder / name)
            if any(checkpoint.tensors[tensor] != entry for tensor, entry in header.items()):
                raise BadCheckpoint(f"{name} has another header than the base's")
        return f"{len(checkpoint.tensors)} tensors in {len(checkpoint.weight_files)} file(s)"

    def edited() -> str:
        for edit in edits:
            entry = checkpoint.tensors[edit.tensor]
            expected = edit.apply(checkpoint.read(edit.tensor), entry.dtype).tobytes()
            with open(folder / entry.file, "rb") as file:
                if read_at(file.fileno(), entry.size, entry.begin) != expected:
                    raise BadCheckpoint(f"{edit.tensor} is not what the edit gives")
        return f"{len(edits)} tensors recomputed"

    return Verification(
        (
            checked("names, shapes, dtypes and index are the base's", structure),
            checked("every edited tensor equals the edit recomputed from the base", edited),
        )
    )


def _commit(
    plan: RemotePlan, folder: Path, made: Sequence[str], copied: Sequence[str], public: bool
) -> Pushed:
    """One commit: changed and generated files sent, the others copied."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    api, repo, origin = huggingface_hub.HfApi(), plan.repository, plan.checkpoint.origin
    with in_one_sentence(repo):
        name = api.create_repo(repository_name(repo), private=not public, exist_ok=True).repo_id
        present = api.list_repo_files(name)
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=part, path_or_fileobj=folder / part) for part in made
    ]
    operations += [
        CommitOperationDelete(path_in_repo=part)
        for part in stale_files(present)
        if part not in made and part not in copied
    ]
    try:
        operations += [
            CommitOperationCopy(
                src_path_in_repo=part,
                path_in_repo=part,
                src_revision=origin.commit,
                src_repo_id=origin.name,
                src_repo_type="model",
            )
            for part in copied
        ]
        result = api.create_commit(
            name, operations, commit_message=f"{origin.name} with WeMask, copied on the server"
        )
    except Exception as error:  # of the server, or of a client that cannot ask it to
        first = hub_words(error)
        raise CopyRefused(f"The files cannot be copied to {repo} on the server: {first}") from error
    with in_one_sentence(repo):
        private = api.model_info(name).private
    return Pushed(
        url=f"{api.endpoint}/{name}",
        commit=getattr(result, "oid", None),
        private=private,
        pull_request=None,
    )


def _confirm(pushed: Pushed, repo: str, manifest: Manifest) -> None:
    """Raise VerificationFailed unless the large files in the repository are the manifest's."""
    import huggingface_hub

    with in_one_sentence(repo):
        found = huggingface_hub.HfApi().model_info(
            pushed.url.split("/", 3)[3], revision=pushed.commit, files_metadata=True
        )
        there = {s.rfilename: s.lfs.sha256 for s in found.siblings or [] if s.lfs is not None}
        names = {sibling.rfilename for sibling in found.siblings or []}
    for record in manifest.files:
        if record.name not in names or there.get(record.name, record.sha256) != record.sha256:
            raise VerificationFailed(f"{repo} does not hold {record.name} as it was to be.")
    if MANIFEST not in names:
        raise VerificationFailed(f"{repo} does not hold {MANIFEST}.")
