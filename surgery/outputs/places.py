"""What is written down for others names no place of this machine; where things lie is kept here.

Manifest, card, adapter configuration and GGUF metadata are published. A path that a user typed says
nothing elsewhere and much about its user, so that they name a folder or file alone; what `verify`
and `reproduce` need to find the base again lies in this program's cache, by a digest of what was
made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from surgery.errors import SurgeryError
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.generated import GENERATED
from surgery.files.staging import write_whole
from surgery.files.text import read_json
from surgery.outputs.manifest import Manifest
from surgery.patient.cache import cache_folder
from surgery.settings import Settings

_log = logging.getLogger(__name__)


def is_of_this_machine(typed: str) -> bool:
    """Whether a text is an absolute path, one of a home, or one that leads out of the folder."""
    windows = PureWindowsPath(typed)
    return (
        typed.startswith(("/", "~", "\\"))
        or bool(windows.drive and windows.root)
        or typed.startswith("file:")
        or ".." in windows.parts
    )


def shown(typed: str) -> str:
    """A path as it is published: one of this machine by its last part, any other as it is."""
    if not is_of_this_machine(typed):
        return typed
    path = PureWindowsPath(typed) if "\\" in typed else PurePosixPath(typed.rstrip("/"))
    return path.name if path.name not in ("", "..") else "model"


def shown_origin(origin: Origin) -> Origin:
    """An origin as it is published."""
    if origin.kind != "directory" or not is_of_this_machine(origin.typed):
        return replace(origin, typed=shown(origin.typed))
    return replace(origin, typed=origin.name)  # which says more of ".."


def shown_settings(settings: Settings, origin: Origin) -> Settings:
    """Settings as they are published, of a conversion of what came from `origin`."""
    model = shown_origin(origin).typed if settings.model == origin.typed else shown(settings.model)
    calibration = settings.calibration and shown(settings.calibration)
    return replace(settings, model=model, calibration=calibration)


def shown_data(value: Any) -> Any:
    """Plain data as it is published."""
    if isinstance(value, dict):
        return {key: shown_data(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shown_data(part) for part in value]
    if isinstance(value, str) and "\n" not in value:
        return shown(value)
    return value


@dataclass(frozen=True)
class Places:
    """Where on this machine lies what a manifest names.

    Attributes:
        model: the base: its folder or file.
        calibration: the text of the calibration.
    """

    model: str | None = None
    calibration: str | None = None


def remember(manifest: Manifest, checkpoint: Checkpoint, calibration: str | None) -> None:
    """Keep where the base of an output lies, and its calibration text; the cache may refuse."""
    local = checkpoint.origin.kind != "hub" and not checkpoint.origin.note  # nor the demo
    model = (*checkpoint.made_from, checkpoint.folder)[0] if local else None
    places = Places(
        os.path.abspath(model) if model is not None else None,
        os.path.abspath(os.path.expanduser(calibration)) if calibration else None,
    )
    if places == Places():
        return
    for path in _paths(manifest):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(asdict(places)).encode())
        except OSError as error:
            _log.info("%s cannot be written: %s", path, error)


def recalled(manifest: Manifest) -> Places:
    """What `remember` has kept and is still there."""
    path = next((path for path in _paths(manifest) if path.is_file()), None)
    try:
        kept = read_json(path) if path is not None else {}
    except SurgeryError:
        return Places()
    places = {name: kept.get(name) for name in ("model", "calibration")}
    return Places(
        **{name: p for name, p in places.items() if isinstance(p, str) and os.path.exists(p)}
    )


def _paths(manifest: Manifest) -> list[Path]:
    """Named after all that was made, whatever is measured or written about it later.

    And, for an output that was damaged since, after what was asked for; of two bases of one name
    that is the last.
    """
    asked = {"base": asdict(manifest.base), "settings": manifest.settings.recorded()}
    made = {
        **asked,
        "dimensions": manifest.dimensions,
        "edits": [asdict(record) for record in manifest.edits],
        "sinks": {layer: asdict(record) for layer, record in manifest.sinks.items()},
        "files": [
            [record.name, record.sha256]
            for record in manifest.files
            if record.name not in GENERATED
        ],
    }
    digests = (
        hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        for known in (made, asked)
    )
    return [cache_folder() / "places" / f"{digest}.json" for digest in digests]
