"""Uploading a converted checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import glob
import logging
from pathlib import Path

from surgery.errors import VerificationFailed
from surgery.files.checkpoint import check_links
from surgery.files.generated import MANIFEST
from surgery.files.gguf_file import is_gguf
from surgery.files.paths import expanded
from surgery.outputs.checks import verify_files
from surgery.outputs.hub import STALE, Pushed, in_one_sentence, one_file, visible_files
from surgery.outputs.manifest import read_manifest
from surgery.patient.repository import repository_name
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
    SurgeryError when the Hub refuses.
    """
    import huggingface_hub

    path = expanded(folder)
    if is_gguf(path):
        raise one_file(repo, path)
    manifest = read_manifest(path)
    check = verify_files(path, manifest.files)
    if not check.passed:
        raise VerificationFailed(f"{path} will not be pushed: {check.detail}.")
    known = [MANIFEST, ".gitattributes", *(record.name for record in manifest.files)]
    check_links(path, known)
    strange = next((name for name in visible_files(path) if name not in known), None)
    if strange is not None:
        raise VerificationFailed(
            f"{path} will not be pushed: {strange} is not in its manifest; take it away, or upload "
            "it yourself afterwards."
        )
    reporter.say(f"Uploading {path} to {repo}")
    api = huggingface_hub.HfApi()
    with in_one_sentence(repo):
        created = api.create_repo(repository_name(repo), private=not public, exist_ok=True)
        name = created.repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        result = api.upload_folder(
            repo_id=name,
            folder_path=path,
            revision=revision,
            create_pr=create_pr,
            commit_message=message or f"Upload {path.name}, made by {manifest.tool}",
            allow_patterns=[glob.escape(name) for name in known],
            # Deletions never touch what is uploaded: only what earlier uploads left behind.
            delete_patterns=list(STALE),
        )
        private = api.model_info(name, revision=None).private
    return Pushed(
        url=f"{api.endpoint}/{name}",
        commit=getattr(result, "oid", None),
        private=private,
        pull_request=getattr(result, "pr_url", None),
    )
