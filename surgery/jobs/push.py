"""Uploading a converted checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from surgery.errors import VerificationFailed
from surgery.files.checkpoint import Origin, check_links, open_checkpoint
from surgery.files.generated import CARD, MANIFEST
from surgery.files.gguf_file import is_gguf
from surgery.files.paths import expanded
from surgery.files.side_files import divided, is_below
from surgery.outputs.checks import verify_files
from surgery.outputs.hub import Place, Pushed, one_file, upload_files, visible_files
from surgery.outputs.manifest import Manifest, manifest_text, read_manifest
from surgery.outputs.places import is_of_this_machine
from surgery.outputs.undo import unpack_file
from surgery.reporter import SILENT, Reporter

logger = logging.getLogger(__name__)


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    reporter: Reporter = SILENT,
) -> Pushed:
    """Upload a converted checkpoint; the repository is created private unless `public`.

    The token comes from the environment (HF_TOKEN) or the cached login, never from an argument.
    Weight files of an earlier upload that this one lacks are removed in the same commit. Raises
    BadSettings for a .gguf file, VerificationFailed when the folder is not what its manifest says,
    SurgeryError when the Hub refuses. Afterwards the
    repository's listing is compared with what was sent: VerificationFailed where it is another.
    """
    path = expanded(folder)
    if is_gguf(path):
        raise one_file(repo, path)
    manifest = read_manifest(path)
    check = verify_files(path, manifest.files)
    if not check.passed:
        raise VerificationFailed(f"{path} will not be pushed: {check.detail}.")
    known = [MANIFEST, *(record.name for record in manifest.files)]
    check_links(path, known)
    strange = next((name for name in visible_files(path) if name not in known), None)
    if strange is not None:
        raise VerificationFailed(
            f"{path} will not be pushed: {strange} is not in its manifest; take it away, or upload "
            "it yourself afterwards."
        )
    named = next(filter(is_of_this_machine, _typed(manifest)), None)
    if named is not None:
        raise VerificationFailed(
            f"{path} will not be pushed: its manifest and card name {named}, a path of this "
            f"machine; run surgery card {path}, which writes both without it."
        )
    sent = _sent(path, manifest)
    if kept := [name for name in sent.left_out if name in known]:
        reporter.say(f"Not sent, because no loader of a model needs it: {', '.join(kept)}")
    files: dict[str, Path | bytes] = {record.name: path / record.name for record in sent.files}
    files[MANIFEST] = path / MANIFEST if sent is manifest else manifest_text(sent).encode()
    place = Place(repo, public=public, revision=revision, create_pr=create_pr)
    told = message or f"Upload {path.name}, made by {manifest.tool}"
    return upload_files(place, files, told, reporter.say)


def _typed(manifest: Manifest) -> list[str]:
    """What a user typed, which an earlier version wrote down as it was."""
    settings = manifest.settings
    return [manifest.base.typed, settings.model, settings.calibration or ""]


def _sent(path: Path, manifest: Manifest) -> Manifest:
    """The manifest of what is sent: that of the folder, unless an earlier version carried more.

    By the list that a conversion goes by; what is not of the base was made here.
    """
    copied = [record.name for record in manifest.files if record.source_sha256 is not None]
    if not copied:
        return manifest
    weights = open_checkpoint(path, Origin("directory", path.name, str(path))).weights
    packed = manifest.replaced.get(CARD)
    card = unpack_file(packed).decode("utf-8", "replace") if packed is not None else None
    _, left = divided(copied, weights, manifest.settings.include, path, card)
    behind = [name for name in copied if any(is_below(name, one) for one in left)]
    if not behind:
        return manifest
    files = [record for record in manifest.files if record.name not in behind]
    return replace(manifest, files=files, left_out=[*manifest.left_out, *behind])
