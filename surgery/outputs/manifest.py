"""surgery.json: what was done to a checkpoint, complete enough to check, undo and repeat it."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.generated import GENERATED, MANIFEST
from surgery.files.staging import write_whole
from surgery.files.text import read_json
from surgery.folds.base import Calibration, Leak
from surgery.folds.edits import EDITS, Edit, SinkDirection, pack, unpack
from surgery.method.mask import Mask, check_strength
from surgery.models.loading import AutoClass
from surgery.outputs.records import (
    EditRecord,
    EmergenceRecord,
    FileRecord,
    QualityRecord,
    SinkRecord,
    VerificationRecord,
)
from surgery.outputs.results import check_results
from surgery.outputs.training_record import TrainingRecord, check_training
from surgery.outputs.undo import unpack_file
from surgery.settings import Settings

SCHEMA = 1
# Fields that are data, whose shape is checked.
_MEASURED = ("emergence", "quality", "verification", "training")
# Settings that every manifest has had from the beginning.
_REQUIRED = ("model", "rate", "scope", "fold", "select")


@dataclass(frozen=True)
class Manifest:
    """Everything that went into a converted checkpoint.

    Attributes:
        tool: this program and its version.
        base: where the base came from.
        model_type: of the text decoder.
        hidden_size: D.
        depth: number of decoder layers.
        anatomy: how the anatomy was known.
        settings: the arguments of `convert`.
        strength: γ.
        dimensions: S by target layer.
        edits: every changed tensor.
        sinks: sink directions by target layer.
        files: every file but the manifest itself.
        versions: of what can influence a result.
        left_out: files of the base that are not carried.
        replaced: files of the base in whose place generated ones came, as `undo.pack_file` packs.
        emergence: what was located; None where target layers were given.
        quality: what the gate measured; None where it was skipped.
        verification: what was proven; None where nothing was.
        results: of `compare`; None until `card --results` puts them there.
        container: what a container other than a folder needs for being undone.
        training: how the weights were trained; None for an edit of the base alone.
        auto_class: the class of transformers that loads the model.
        schema_version: of this file.
    """

    tool: str
    base: Origin
    model_type: str
    hidden_size: int
    depth: int
    anatomy: str
    settings: Settings
    strength: float
    dimensions: dict[int, list[int]]
    edits: list[EditRecord]
    sinks: dict[int, SinkRecord]
    files: list[FileRecord]
    versions: dict[str, str]
    left_out: list[str] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    emergence: EmergenceRecord | None = None
    quality: QualityRecord | None = None
    verification: VerificationRecord | None = None
    results: dict[str, Any] | None = None
    container: dict[str, Any] | None = None
    training: TrainingRecord | None = None
    auto_class: AutoClass = "AutoModelForCausalLM"
    schema_version: int = SCHEMA

    def mask(self) -> Mask:
        """The mask that was folded in."""
        chosen = {layer: tuple(dimensions) for layer, dimensions in self.dimensions.items()}
        return Mask(self.hidden_size, self.settings.select, self.strength, chosen)

    def calibration(self) -> Calibration:
        """What the fold had measured before."""
        return Calibration(
            {
                layer: SinkDirection(unpack(record.center), unpack(record.detector))
                for layer, record in self.sinks.items()
            }
        )

    def rebuilt_edits(self) -> tuple[Edit, ...]:
        """The edits, from the manifest alone; of no loaded model."""
        sinks = self.calibration().directions
        return tuple(
            EDITS[record.kind].known(
                record.tensor,
                record.layer,
                tuple(self.dimensions[record.layer]),
                self.strength,
                {"axis": record.axis, "null": record.null, "sink": sinks.get(record.layer)},
            )
            for record in self.edits
        )

    def originals(self) -> dict[str, bytes]:
        """The source's bytes of the small tensors that were edited."""
        return {
            record.tensor: base64.b64decode(record.original)
            for record in self.edits
            if record.original is not None
        }


def records(checkpoint: Checkpoint, edits: Sequence[Edit]) -> list[EditRecord]:
    """Edits as they are written down."""
    found = []
    for edit in edits:
        raw = checkpoint.read_bytes(edit.tensor) if edit.small else None
        found.append(
            EditRecord(
                tensor=edit.tensor,
                file=checkpoint.tensors[edit.tensor].file,
                layer=edit.layer,
                kind=edit.kind,
                **edit.facts,
                original=base64.b64encode(raw).decode("ascii") if raw is not None else None,
            )
        )
    return found


def sink_records(
    directions: Mapping[int, SinkDirection], leaks: Mapping[int, Leak]
) -> dict[int, SinkRecord]:
    """Sink directions as they are written down."""
    return {
        layer: SinkRecord(pack(sink.center), pack(sink.detector), asdict(leaks[layer]))
        for layer, sink in directions.items()
    }


def tool_version() -> str:
    """This package's version."""
    try:
        return metadata.version("wemask-surgery")
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions that can influence a result."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "torch", "transformers", "safetensors", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def manifest_text(manifest: Manifest) -> str:
    """A manifest as JSON."""
    data = {**asdict(manifest), "settings": manifest.settings.recorded()}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write surgery.json into a folder, replacing an earlier one in one step."""
    write_whole(folder / MANIFEST, manifest_text(manifest).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder; BadCheckpoint when there is none or it makes no sense."""
    path = folder / MANIFEST
    if not folder.exists():
        raise BadCheckpoint(f"{folder} does not exist; give what surgery convert has written.")
    if not path.is_file():
        raise BadCheckpoint(f"{folder} has no {MANIFEST}, so surgery did not write it.")
    return parse_manifest(read_json(path), str(path))


def parse_manifest(raw: dict[str, Any], path: str) -> Manifest:
    """The manifest in a JSON object; BadCheckpoint, naming `path`, when it makes no sense."""
    from pydantic import TypeAdapter, ValidationError  # takes a while

    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise BadCheckpoint(f"{path} has schema version {version!r}; this program reads {SCHEMA}.")
    try:
        settings = raw.get("settings")
        missing = set(_REQUIRED) - set(settings if isinstance(settings, dict) else _REQUIRED)
        if missing:
            raise ValueError(f"settings lack {min(missing)}")
        # As JSON and strictly, or a number could come as text and fail where it is used.
        text = json.dumps(raw, allow_nan=False)
        manifest: Manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
        # What was measured stays as it stands there, in its order and with what is added to it.
        measured: dict[str, Any] = {name: raw.get(name) for name in _MEASURED}
        manifest = replace(manifest, **measured)
        _check(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadCheckpoint(f"{path} is damaged at {where}: {first['msg']}.") from error
    except (ValueError, RecursionError, SurgeryError) as error:
        raise BadCheckpoint(f"{path} is damaged: {str(error).rstrip('.')}.") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError or SurgeryError for what the commands that read a manifest stumble over."""
    if manifest.results is not None:
        check_results(manifest.results)
    if manifest.training is not None:
        check_training(manifest.training)
    check_strength(manifest.strength)
    _check_dimensions(manifest)
    _check_edits(manifest)
    for record in manifest.files:
        if Path(record.name).is_absolute() or ".." in Path(record.name).parts:
            raise ValueError(f"it names a file outside its folder: {record.name!r}")
    for name, packed in manifest.replaced.items():
        if name not in GENERATED:
            raise ValueError(f"it replaces a file that is never generated: {name!r}")
        unpack_file(packed)


def _check_dimensions(manifest: Manifest) -> None:
    if not manifest.dimensions:
        raise ValueError("it names no layer")
    for layer, chosen in manifest.dimensions.items():
        if not 0 <= layer < manifest.depth:
            raise ValueError(f"layer {layer} does not exist")
        if not chosen or not 0 <= min(chosen) <= max(chosen) < manifest.hidden_size:
            raise ValueError(f"the dimensions of layer {layer} do not exist")
    for layer, sink in manifest.sinks.items():
        sizes = len(unpack(sink.center)), len(unpack(sink.detector))
        if sizes != (len(manifest.dimensions.get(layer, ())), manifest.hidden_size):
            raise ValueError(f"the sink direction of layer {layer} has another size than the mask")
        lacking = {"ordinary_rms", "ordinary_largest", "sink_smallest"} - set(sink.leak)
        if lacking:
            raise ValueError(f"the leak of layer {layer} lacks {min(lacking)}")


def _check_edits(manifest: Manifest) -> None:
    for edit in manifest.edits:
        if edit.layer not in manifest.dimensions or edit.axis not in (0, 1):
            raise ValueError(f"the edit of {edit.tensor} is none")
        kind = EDITS.get(edit.kind)
        if kind is None:
            raise ValueError(f"the edit of {edit.tensor} is of the unknown kind {edit.kind!r}")
        if "sink" in kind.own and edit.layer not in manifest.sinks:
            raise ValueError(f"the edit of {edit.tensor} has no sink direction")
        base64.b64decode((edit.original or "").encode(), validate=True)


def clean_numbers(value: Any) -> Any:
    """Data without NaN and infinities, which JSON has not: they become None."""
    if isinstance(value, dict):
        return {key: clean_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [clean_numbers(part) for part in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
