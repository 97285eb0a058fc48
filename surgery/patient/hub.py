"""The Hub: downloads, its cache, and what goes wrong in words."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, SurgeryError, first_line
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.side_files import is_other_format, is_weights, matches
from surgery.files.text import read_json
from surgery.files.weights import Weights, choose

_log = logging.getLogger(__name__)


def download(
    name: str, revision: str | None, say: Callable[[str], None], include: Sequence[str] = ()
) -> Path:
    """The folder of a model's files in the Hub's cache, fetched unless they are there.

    Args:
        name: The model's id.
        revision: A branch, tag or commit; None for the newest.
        say: Told what is being fetched.
        include: Patterns of further files that are carried.

    Raises:
        BadCheckpoint: The Hub does not give them, and the cache does not hold them.
    """
    import huggingface_hub

    with hub_errors(name, revision):
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision)
            weights = weights_on_hub(name, info)
            wanted = _needed(names_of(info), weights, include)
            say(f"Fetching {name} (commit {str(info.sha)[:12]}) from the Hub")
            # By the name the user gave, so that the cache also knows it when offline.
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]
            )
        except Exception as error:
            if not unreachable(error):
                raise
            _log.info("the Hub cannot be reached; looking for %s in its cache", name)
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=True
            )
    return Path(folder)


def _needed(names: Sequence[str], weights: Weights, include: Sequence[str]) -> list[str]:
    """What to fetch: everything but other copies of the weights, which are large."""
    return [
        name
        for name in names
        if name in (*weights.files, weights.entry)
        or matches(name, include)
        or not (is_weights(name) or is_other_format(name))
        # A sentence encoder has modules with weights of their own.
        or ("/" in name and name.endswith(".safetensors") and not is_other_format(name))
    ]


def names_of(info: Any) -> list[str]:
    """The names of the files in a listing of the Hub."""
    return [sibling.rfilename for sibling in info.siblings or []]


def weights_on_hub(name: str, info: Any) -> Weights:
    """The weights that stock transformers takes from a commit of a repository.

    Args:
        name: of the repository.
        info: the Hub's listing of the commit.

    Raises:
        BadCheckpoint: there are none, or not all of them.
    """
    import huggingface_hub

    if not isinstance(info.sha, str):
        raise BadCheckpoint(f"The Hub's answer about {name} names no commit; try again later.")
    names = names_of(info)

    def read(file: str) -> dict[str, Any]:
        return read_json(Path(huggingface_hub.hf_hub_download(name, file, revision=info.sha)))

    config = read("config.json") if "config.json" in names else {}
    return choose(names, read, name, config)


def cached(name: str, revision: str | None) -> Path | None:
    """The cached snapshot of a Hub model; None unless all its weight files are there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        )
        open_checkpoint(folder, Origin("hub", name, name))
    except (LocalEntryNotFoundError, BadCheckpoint):
        return None
    return folder


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What the Hub and its client raise, as one sentence each."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{name}@{revision}" if revision else name
    try:
        yield
    except SurgeryError:
        raise
    except GatedRepoError as error:
        raise BadCheckpoint(
            f"{name} is gated: accept its terms on the Hub, log in with `hf auth login`, and try "
            "again."
        ) from error
    except RevisionNotFoundError as error:
        raise BadCheckpoint(f"{name} has no revision {revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise BadCheckpoint(
            f"{name} is neither a local folder nor a model on the Hub that you can read; check the "
            "name, and log in with `hf auth login` if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BadCheckpoint(
            f"{wanted} is not in the local cache and the Hub cannot be reached (offline?)."
        ) from error
    except Exception as error:  # whatever an answer of another shape, or a proxy, leads to
        first = hub_words(error)
        raise BadCheckpoint(f"Fetching {wanted} from the Hub failed: {first}") from error


def hub_words(error: Exception) -> str:
    """What the Hub's client raised, in a line that does not repeat the token."""
    from huggingface_hub import get_token

    token = get_token()
    line = first_line(error)
    return line.replace(token, "***") if token else line


def unreachable(error: Exception) -> bool:
    """Whether an exception says that no answer came from the Hub.

    By name, because the HTTP library differs between releases of huggingface_hub.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"ConnectionError", "TransportError", "Timeout"})


def check_downloads(checkpoint: Checkpoint, sha256: Mapping[str, str]) -> None:
    """Refuse a file of the Hub's cache that is not what the Hub said it is.

    The cache names a file after the digest that the Hub stated: sha256 for large files, git's sha1
    for small ones.

    Args:
        checkpoint: What was read.
        sha256: Of its files, by name, as they were read.

    Raises:
        BadCheckpoint: A file has another digest.
    """
    for name, digest in sha256.items():
        blob = (checkpoint.folder / name).resolve()
        if blob.parent.name != "blobs":
            continue
        if len(blob.name) == 40:
            raw = blob.read_bytes()
            digest = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        if len(blob.name) in (40, 64) and blob.name != digest:
            raise BadCheckpoint(
                f"{name} was damaged on its way from the Hub or in the cache; delete {blob} and "
                "run the conversion again."
            )
