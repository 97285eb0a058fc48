"""Publishing a converted checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from surgery.errors import BadSettings, SurgeryError, VerificationFailed
from surgery.files.checkpoint import check_links
from surgery.files.generated import MANIFEST
from surgery.outputs.manifest import read_manifest
from surgery.outputs.verification import verify_files
from surgery.patient.hub import hub_words
from surgery.reporter import SILENT, Reporter

_STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Pushed:
    """Where an upload went."""

    url: str
    commit: str | None
    private: bool | None
    pull_request: str | None


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

    path = Path(folder)
    if path.suffix == ".gguf" and path.is_file():
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
            delete_patterns=list(_STALE),
        )
        private = api.model_info(name, revision=None).private
    return Pushed(
        url=f"{api.endpoint}/{name}",
        commit=getattr(result, "oid", None),
        private=private,
        pull_request=getattr(result, "pr_url", None),
    )


def visible_files(folder: Path) -> Iterator[str]:
    """The files below a folder, those aside whose path has a hidden part."""
    for root, directories, files in os.walk(folder):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()


def one_file(repo: str, path: str | Path = "FILE") -> BadSettings:
    """Why a .gguf file is not pushed, and how it comes to the Hub all the same."""
    return BadSettings(
        "A .gguf file carries its provenance inside and is not pushed with a card; upload it with "
        f"`hf upload {repo} {path}`."
    )


def repository_name(repo: str) -> str:
    """The name of a repository; BadSettings for what cannot be one."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadSettings(f"{repo!r} is not a Hub repository; write it as user/name.") from error
    return repo


def stale_files(present: Iterable[str]) -> list[str]:
    """Weight files among those in a repository, which a new upload replaces or removes."""
    return [name for name in present if any(fnmatch(name, pattern) for pattern in _STALE)]


@contextmanager
def in_one_sentence(repo: str) -> Iterator[None]:
    """What the Hub and its client raise on uploading, as one SurgeryError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except SurgeryError:
        raise
    except LocalTokenNotFoundError as error:
        raise SurgeryError(
            "You are not logged in to the Hub; run `hf auth login` or set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise SurgeryError(
                f"The Hub refuses to write to {repo}; log in with `hf auth login` (or set HF_TOKEN "
                "to a token that may write there)."
            ) from error
        raise SurgeryError(f"Uploading to {repo} failed: {hub_words(error)}") from error
    except Exception as error:  # whatever an answer of another shape, or a proxy, leads to
        raise SurgeryError(f"Uploading to {repo} failed: {hub_words(error)}") from error
