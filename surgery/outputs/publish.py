"""Publishing a conversion of a Hub model without downloading it.

A norm fold changes a few kilobytes in one file of many. The others are copied on the server, from
repository to repository; only the file that changes passes through here, and what the analysis
reads.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, VerificationFailed
from surgery.files.checkpoint import Checkpoint, carried, divided
from surgery.files.descriptors import read_at, write_exactly
from surgery.files.generated import CARD, FIGURE, GENERATED, MANIFEST
from surgery.files.safetensors_file import read_header
from surgery.files.text import write_text
from surgery.folds.fold import Edit, make_edits
from surgery.jobs.convert import check_given_layers, hashed, known_manifest
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, attention_targets
from surgery.models.anatomy import Anatomy, depth_of
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.hub import Pushed, in_one_sentence, repository_name, stale_files
from surgery.outputs.manifest import (
    FileRecord,
    Manifest,
    records,
    write_manifest,
)
from surgery.outputs.plan import RemotePlan, edits_by_file
from surgery.outputs.verification import Verification, checked
from surgery.outputs.write import edited_blocks
from surgery.patient.analysis import choose_mask, examine, given_emergence, stream_model
from surgery.patient.hub import hub_words
from surgery.patient.quantised import method_of
from surgery.patient.remote import KeptRanges
from surgery.patient.source import resolve_light
from surgery.patient.subject import Subject
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

_STEP = 8 * 1024 * 1024


@dataclass(frozen=True)
class Published:
    """A conversion that was made on the Hub; pushed and manifest are None after a dry run.

    bytes_read, bytes_sent: what passed through here, of bytes_total in the model's weights.
    """

    plan: RemotePlan
    pushed: Pushed | None
    manifest: Manifest | None
    bytes_read: int
    bytes_sent: int
    bytes_total: int


class CopyRefused(SurgeryError):
    """The server, or this release of its client, does not copy between repositories."""


def publish(
    model: str,
    repo: str,
    *,
    reporter: Reporter = SILENT,
    public: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Published:
    """Convert a Hub model into a repository, copying on the server what stays as it is.

    options: the fields of `Settings`. The quality gate, which needs the whole model, is left out.
    Raises BadSettings for what only the whole model can tell, CopyRefused where the files cannot
    be copied there; nothing is committed then.
    """
    settings = Settings(model=model, push_to_hub=repo, **{**options, "check": False})
    _require_headers_enough(settings)
    checkpoint = resolve_light(model, settings.revision, reporter.say)
    pushed, manifest, sent = None, None, 0
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        # The file that changes holds layers that the analysis has read by then.
        remote = checkpoint.remote
        if remote is not None:
            checkpoint = replace(checkpoint, remote=KeptRanges(remote, Path(temporary)))
        decided = _decide(checkpoint, settings, repo, reporter)
        reporter.show(decided.plan)
        if not dry_run:
            pushed, manifest, sent = _publish(decided, settings, public, reporter)
            _confirm(pushed, repo, manifest)
    small = sum(path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file())
    read = getattr(remote, "bytes_read", 0) + small
    return Published(decided.plan, pushed, manifest, read, sent, checkpoint.size)


@dataclass(frozen=True)
class _Decided:
    """All that is known before a file is fetched. info: the base's files on the Hub."""

    plan: RemotePlan
    anatomy: Anatomy
    mask: Mask
    emergence: Emergence | None
    info: Mapping[str, _Remote]


def _decide(checkpoint: Checkpoint, settings: Settings, repo: str, reporter: Reporter) -> _Decided:
    """Mask, edits and files, from headers, gains and the layers up to the emergence."""
    if checkpoint.origin.kind != "hub":
        raise BadSettings(f"--remote is for models on the Hub; {settings.model} is not one.")
    given = settings.layer is not None or settings.layers is not None
    if method_of(checkpoint.config) and not given:
        raise BadSettings(
            "A quantised model is not searched on the Hub: give --layer, or leave out --remote."
        )
    check_given_layers(settings, depth_of(checkpoint.config))
    anatomy = examine(
        checkpoint,
        check=not method_of(checkpoint.config),
        trust_remote_code=settings.trust_remote_code,
    )
    anatomy.require(settings.fold)
    anatomy.require_selection(settings.select)
    subject = Subject(checkpoint, settings, reporter)
    emergence = given_emergence(settings.layer) if settings.layer is not None else None
    if settings.layers is not None:
        targets = tuple(sorted(set(settings.layers)))
    else:
        if emergence is None:
            streamed = stream_model(subject, anatomy, settings, reporter)
            emergence = streamed.emergence
            reporter.show(emergence)
        targets = attention_targets(emergence.require(), anatomy.attends, settings.scope)
    mask = choose_mask(subject, anatomy, targets, settings)
    edits = make_edits(anatomy, mask, settings.fold)
    changed = edits_by_file(checkpoint, edits)
    info, left_out = _listing(checkpoint)
    checkpoint = replace(checkpoint, left_out=left_out)
    plan = RemotePlan(
        checkpoint,
        repo,
        edits,
        sent={name: checkpoint.file_sizes[name] for name in changed},
        copied={name: known.size for name, known in info.items() if name not in changed},
    )
    return _Decided(plan, anatomy, mask, emergence, info)


def _publish(
    decided: _Decided, settings: Settings, public: bool, reporter: Reporter
) -> tuple[Pushed, Manifest, int]:
    """Fetch and patch what changes, and commit; with how many bytes were sent."""
    plan, info = decided.plan, decided.info
    by_file = edits_by_file(plan.checkpoint, plan.edits)
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        folder = Path(temporary)
        with reporter.bar("Reading", sum(plan.sent.values())) as advance:
            for name, changes in by_file.items():
                _patched(plan.checkpoint, name, changes, info[name], folder, advance)
        manifest = _describe(decided, settings, folder, by_file)
        pushed, sent = _commit(plan.checkpoint, plan.repository, folder, info, public, reporter)
    return pushed, manifest, sent


def _require_headers_enough(settings: Settings) -> None:
    """Raise BadSettings for what needs the whole model."""
    if settings.fold == "sink" or settings.select == "activation" or settings.form != "checkpoint":
        raise BadSettings(
            "--remote does not load the model, which --fold sink and --select activation need; "
            "leave it out."
        )
    if settings.undo_file:
        raise BadSettings("--undo-file is written by ordinary conversions; leave out --remote.")


@dataclass(frozen=True)
class _Remote:
    """A file of the base on the Hub; sha256 where it is stored as a large file."""

    size: int
    sha256: str | None


def _listing(checkpoint: Checkpoint) -> tuple[dict[str, _Remote], tuple[str, ...]]:
    """The base's files that a conversion carries, and the names of those that it leaves behind."""
    import huggingface_hub

    with in_one_sentence(checkpoint.origin.name):
        found = huggingface_hub.HfApi().model_info(
            checkpoint.origin.name, revision=checkpoint.origin.commit, files_metadata=True
        )
        listing = {}
        for sibling in found.siblings or []:
            name = sibling.rfilename
            large = sibling.lfs.sha256 if sibling.lfs is not None else None
            known = name in checkpoint.weight_files
            if known or (carried(name) and name not in GENERATED):
                listing[name] = _Remote(int(sibling.size or 0), large)
        names = sorted(sibling.rfilename for sibling in found.siblings or [])
    return listing, divided(names, set(checkpoint.weight_files))[1]


def _patched(
    checkpoint: Checkpoint,
    name: str,
    edits: Sequence[Edit],
    known: _Remote,
    folder: Path,
    advance: Any,
) -> None:
    """One changed file, fetched whole, checked against the Hub's sha256, and patched."""
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
    decided: _Decided, settings: Settings, folder: Path, by_file: Mapping[str, Sequence[Edit]]
) -> Manifest:
    """Card, figure and manifest beside the changed files."""
    checkpoint, edits, emergence = decided.plan.checkpoint, decided.plan.edits, decided.emergence
    verification = _verify(checkpoint, folder, edits, by_file)
    verification.require()
    manifest = replace(
        known_manifest(
            checkpoint,
            decided.anatomy,
            decided.mask,
            records(checkpoint, edits),
            emergence,
            settings,
        ),
        verification=verification.as_dict(),
    )
    figure = emergence is not None and bool(emergence.rows)
    if figure and emergence is not None:
        from surgery.report.plots import plot_layers

        plot_layers(emergence, folder / FIGURE, title=checkpoint.origin.name)
    card = render_card(manifest, front_matter(checkpoint.folder / CARD), figure=figure)
    write_text(folder / CARD, card)
    files = []
    for name, known in decided.info.items():
        source = known.sha256 or _small_sha256(checkpoint, name)
        if name in by_file:
            made = hashed(folder, name)
            files.append(FileRecord(name, made.size, made.sha256, source))
        else:
            files.append(FileRecord(name, known.size, source, source))
    files += [hashed(folder, name) for name in ((CARD, FIGURE) if figure else (CARD,))]
    manifest = replace(manifest, files=files)
    write_manifest(manifest, folder)
    return manifest


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
    checkpoint: Checkpoint,
    repo: str,
    folder: Path,
    info: Mapping[str, _Remote],
    public: bool,
    reporter: Reporter,
) -> tuple[Pushed, int]:
    """One commit: changed and generated files sent, the others copied; and how much was sent."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    made = sorted(path.name for path in folder.iterdir())
    api = huggingface_hub.HfApi()
    origin = checkpoint.origin
    with in_one_sentence(repo):
        name = api.create_repo(repository_name(repo), private=not public, exist_ok=True).repo_id
        present = api.list_repo_files(name)
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=part, path_or_fileobj=folder / part) for part in made
    ]
    copied = [part for part in info if part not in made]
    operations += [
        CommitOperationDelete(path_in_repo=part)
        for part in stale_files(present)
        if part not in made and part not in copied
    ]
    reporter.say(f"Copying {len(copied)} files on the server, sending {len(made)}")
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
    pushed = Pushed(
        url=f"{api.endpoint}/{name}",
        commit=getattr(result, "oid", None),
        private=private,
        pull_request=None,
    )
    return pushed, sum((folder / part).stat().st_size for part in made)


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
