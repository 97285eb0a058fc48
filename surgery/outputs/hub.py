"""What every upload to the Hugging Face Hub shares: what is sent, what goes, and what it says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from surgery.errors import BadSettings, SurgeryError
from surgery.patient.hub import hub_words

STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Pushed:
    """Where an upload went."""

    url: str
    commit: str | None
    private: bool | None
    pull_request: str | None


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


def stale_files(present: Iterable[str]) -> list[str]:
    """Weight files among those in a repository, which a new upload replaces or removes."""
    return [name for name in present if any(fnmatch(name, pattern) for pattern in STALE)]


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
