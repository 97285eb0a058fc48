"""What every upload to the Hugging Face Hub shares: what is sent, what goes, and what it says."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.errors import BadSettings, SurgeryError, VerificationFailed
from surgery.patient.hub import hub_words, unreachable
from surgery.patient.repository import repository_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

# Said with every upload, or a .gitignore in the repository would decide what arrives.
_IGNORE_NOTHING = "# every file of this upload is meant\n"
# Seconds before another try, where the Hub itself has failed.
_WAITS = (1.0, 4.0)
_STEP = 8 * 1024 * 1024

STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Pushed:
    """Where an upload went.

    Attributes:
        url: of the repository.
        commit: that was made, or the newest one where it had all of this already.
        private: whether the repository is.
        pull_request: its address, where one was asked for.
        files: what was compared with the repository's listing afterwards, by name.
    """

    url: str
    commit: str | None
    private: bool | None
    pull_request: str | None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """A file as the Hub is to list it.

    Attributes:
        size: in bytes.
        sha256: of its content; None where only git's digest is known.
        blob: git's sha1 of its content; None where only the sha256 is known.
    """

    size: int
    sha256: str | None
    blob: str | None

    @classmethod
    def of(cls, source: Path | bytes) -> Expected:
        """What is known of a file that is sent from here."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        for block in [source] if isinstance(source, bytes) else _blocks(source):
            sha256.update(block)
            blob.update(block)
        return cls(size, sha256.hexdigest(), blob.hexdigest())

    def is_as(self, found: Any) -> bool:
        """Whether the Hub's description of a file is this one, as far as both can be compared."""
        if found.size != self.size:
            return False
        if found.lfs is not None:
            return self.sha256 in (None, found.lfs.sha256)
        return self.blob in (None, found.blob_id)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_STEP):
            yield block


@dataclass(frozen=True)
class Place:
    """Where in the Hub an upload goes.

    Attributes:
        repo: the repository, as the user named it.
        public: whether it is created public.
        revision: a branch, created when missing; None for the main one.
        create_pr: whether to open a pull request.
    """

    repo: str
    public: bool = False
    revision: str | None = None
    create_pr: bool = False


class Upload:
    """One commit to a repository, which is looked at before anybody says that it arrived.

    Raises:
        SurgeryError: the Hub refuses, in one sentence.
    """

    def __init__(self, place: Place) -> None:
        import huggingface_hub

        api = huggingface_hub.HfApi()
        # No .gitignore of a base decides what arrives.
        api.preupload_lfs_files = partial(  # type: ignore[method-assign]
            api.preupload_lfs_files, gitignore_content=_IGNORE_NOTHING
        )
        self.place, self.api = place, api
        with in_one_sentence(place.repo):
            created = self.api.create_repo(
                repository_name(place.repo), private=not place.public, exist_ok=True
            )
            self.name: str = created.repo_id
            if place.revision is not None and not place.create_pr:
                self.api.create_branch(self.name, branch=place.revision, exist_ok=True)
            self.present = self.api.list_repo_files(self.name, revision=place.revision)

    def stale(self, coming: Iterable[str]) -> list[str]:
        """Weight files of an earlier upload, which this one neither holds nor replaces."""
        return sorted(set(stale_files(self.present)) - set(coming))

    def staying(self, coming: Iterable[str]) -> list[str]:
        """What else is in the repository and stays there."""
        gone = {*coming, *self.stale(coming), ".gitattributes"}
        return sorted(set(self.present) - gone)

    def commit(
        self,
        operations: Callable[[], Sequence[Any]],
        expected: Mapping[str, Expected],
        message: str,
    ) -> Pushed:
        """Commit, then compare the repository's listing with what it should be.

        Args:
            operations: makes the client's operations, anew for every try.
            expected: every file of the commit, by its name.
            message: of the commit.

        Raises:
            VerificationFailed: where a file is not there, or is another.
        """
        place = self.place

        def once() -> Any:
            return self.api.create_commit(
                self.name,
                operations(),
                commit_message=message,
                revision=place.revision,
                create_pr=place.create_pr,
            )

        # A pull request that was opened before the answer got lost would be opened twice.
        result = once() if place.create_pr else persistently(once)
        with in_one_sentence(place.repo):
            self._compare(result.oid, expected)
            private = self.api.model_info(self.name).private
        return Pushed(
            url=f"{self.api.endpoint}/{self.name}",
            commit=result.oid,
            private=private,
            pull_request=result.pr_url,
            files=tuple(sorted(expected)),
        )

    def _compare(self, commit: str, expected: Mapping[str, Expected]) -> None:
        """Raise VerificationFailed unless the commit holds every file as it was to be."""
        there = persistently(lambda: _listed(self.api, self.name, commit))
        for name, known in expected.items():
            if name not in there:
                what = "did not arrive"
            elif not known.is_as(there[name]):
                what = "is another there (another size or digest)"
            else:
                continue
            raise VerificationFailed(
                f"{self.name} does not hold what was sent: {name} {what}; look at commit {commit}, "
                "and push again."
            )


def _listed(api: HfApi, name: str, commit: str) -> dict[str, Any]:
    """The files of a commit as the Hub describes them, by their names."""
    listing = api.list_repo_tree(name, recursive=True, revision=commit)
    return {found.path: found for found in listing if hasattr(found, "blob_id")}


def upload_files(
    place: Place, files: Mapping[str, Path | bytes], message: str, say: Callable[[str], None]
) -> Pushed:
    """Upload files under their names; weight files of an earlier upload go.

    Args:
        place: where to.
        files: their contents by name, or where they lie.
        message: of the commit.
        say: told what is sent, and what stays in the repository beside it.

    Raises:
        SurgeryError: the Hub refuses.
        VerificationFailed: not all of it arrived as it is here.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    expected = {name: Expected.of(source) for name, source in files.items()}
    upload = Upload(place)
    say(f"Sending {len(files)} files to {place.repo}: {', '.join(sorted(files))}")
    if staying := upload.staying(files):
        say(f"In {place.repo} already, and left there: {', '.join(staying)}")

    def operations() -> list[Any]:
        return [
            *(
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
                for name, source in files.items()
            ),
            *(CommitOperationDelete(path_in_repo=name) for name in upload.stale(files)),
        ]

    with in_one_sentence(place.repo):
        return upload.commit(operations, expected, message)


def persistently(once: Callable[[], Result]) -> Result:
    """What a request gives, tried again where the Hub failed, not where it refused."""
    for wait in _WAITS:
        try:
            return once()
        except Exception as error:
            if not failed(error):
                raise
            time.sleep(wait)
    return once()


def failed(error: Exception) -> bool:
    """Whether an exception says that the Hub failed for now: busy, out of order, or not reached."""
    status = status_of(error)
    return unreachable(error) if status is None else status in (408, 429) or status >= 500


def status_of(error: Exception) -> int | None:
    """The HTTP status behind what the Hub's client raised."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


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
