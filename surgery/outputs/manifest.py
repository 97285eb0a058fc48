"""surgery.json: what was done to a checkpoint, complete enough to check, undo and repeat it."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.generated import GENERATED, MANIFEST
from surgery.files.staging import write_whole
from surgery.files.text import read_json
from surgery.folds.fold import Edit, SinkDirection, pack, unpack
from surgery.method.mask import check_strength
from surgery.models.anatomy import Anatomy
from surgery.models.loading import AutoClass
from surgery.outputs.undo import unpack_file

SCHEMA = 1


@dataclass(frozen=True)
class EditRecord:
    """One edited tensor. original: base64 of the source's bytes, for gains and biases."""

    tensor: str
    file: str
    layer: int
    kind: str
    axis: int = 1
    null: float = 0.0
    original: str | None = None


@dataclass(frozen=True)
class SinkRecord:
    """A sink direction: base64 of little-endian float32 vectors, and its leak."""

    center: str
    detector: str
    leak: dict[str, int | float]


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint; source_sha256 differs where it was edited."""

    name: str
    size: int
    sha256: str
    source_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that went into a converted checkpoint.

    settings: the arguments of `convert`. dimensions: S by target layer. replaced: files of the base
    in whose place generated ones came, as `undo.pack_file` packs them. emergence, quality and
    verification are what was measured, None where it was skipped; results are those of `compare`,
    None until `card --results` puts them there. container: what a container other than a folder of
    safetensors needs for being undone. training: how the weights were trained, None for an edit of
    the base alone. auto_class: the class of transformers that loads the model.
    """

    tool: str
    base: Origin
    model_type: str
    hidden_size: int
    depth: int
    anatomy: str
    settings: dict[str, Any]
    strength: float
    dimensions: dict[int, list[int]]
    edits: list[EditRecord]
    sinks: dict[int, SinkRecord]
    files: list[FileRecord]
    versions: dict[str, str]
    left_out: list[str] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    emergence: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    results: dict[str, Any] | None = None
    container: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    auto_class: AutoClass = "AutoModelForCausalLM"
    schema_version: int = SCHEMA

    def rebuilt_edits(self) -> tuple[Edit, ...]:
        """The edits, from the manifest alone."""
        sinks = {
            layer: SinkDirection(unpack(record.center), unpack(record.detector))
            for layer, record in self.sinks.items()
        }
        return tuple(
            Edit(
                tensor=record.tensor,
                layer=record.layer,
                kind=record.kind,
                dimensions=tuple(self.dimensions[record.layer]),
                strength=self.strength,
                null=record.null,
                axis=record.axis,
                sink=sinks.get(record.layer) if record.kind == "rank_one" else None,
            )
            for record in self.edits
        )


def records(checkpoint: Checkpoint, edits: Sequence[Edit]) -> list[EditRecord]:
    """Edits as they are written down."""
    found = []
    for edit in edits:
        entry = checkpoint.tensors[edit.tensor]
        small = edit.kind in ("gain", "bias")
        raw = checkpoint.read_bytes(edit.tensor) if small else None
        found.append(
            EditRecord(
                tensor=edit.tensor,
                file=entry.file,
                layer=edit.layer,
                kind=edit.kind,
                axis=edit.axis,
                null=edit.null,
                original=base64.b64encode(raw).decode("ascii") if raw is not None else None,
            )
        )
    return found


def sink_records(
    sinks: Mapping[int, SinkDirection], leaks: Mapping[int, Any]
) -> dict[int, SinkRecord]:
    """Sink directions as they are written down."""
    return {
        layer: SinkRecord(pack(sink.center), pack(sink.detector), asdict(leaks[layer]))
        for layer, sink in sinks.items()
    }


def anatomy_summary(anatomy: Anatomy) -> str:
    """How the anatomy is known, for the manifest."""
    return anatomy.known_from


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
    return json.dumps(asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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
    from pydantic import TypeAdapter, ValidationError

    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise BadCheckpoint(f"{path} has schema version {version!r}; this program reads {SCHEMA}.")
    try:
        # As JSON and strictly, or a number could come as text and fail where it is used.
        text = json.dumps(raw, allow_nan=False)
        manifest: Manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
        _check(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadCheckpoint(f"{path} is damaged at {where}: {first['msg']}.") from error
    except (ValueError, RecursionError, SurgeryError) as error:
        raise BadCheckpoint(f"{path} is damaged: {str(error).rstrip('.')}.") from error
    return manifest


@dataclass(frozen=True)
class _Emergence:
    layer: int | None
    magnification: float | None
    found_by: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Variant:
    name: str
    perplexity: float
    against_base: float
    kl_from_reference: float | None
    kl_from_base: float | None


@dataclass(frozen=True)
class _Quality:
    variants: list[_Variant]
    tokens: int
    sequences: int
    forced: bool = False
    leak_text: str = ""


@dataclass(frozen=True)
class _Check:
    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class _Verification:
    checks: list[_Check]


@dataclass(frozen=True)
class _Recipe:
    name: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class _Dataset:
    path: str


@dataclass(frozen=True)
class _Training:
    recipe: _Recipe
    steps: int
    rows: int
    processes: int
    trainable: int
    changed: list[str]
    versions: dict[str, str]
    first_loss: float | None = None
    last_loss: float | None = None
    held_out_loss: float | None = None


def _check(manifest: Manifest) -> None:
    """Raise ValueError or SurgeryError for what the commands that read a manifest stumble over."""
    from pydantic import TypeAdapter

    from surgery.settings import Settings

    def shaped(kind: Any, value: Any) -> None:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)

    missing = {"model", "rate", "scope", "fold", "select"} - set(manifest.settings)
    if missing:
        raise ValueError(f"settings lack {min(missing)}")
    shaped(Settings, manifest.settings)
    shaped(_Emergence | None, manifest.emergence)
    shaped(_Quality | None, manifest.quality)
    shaped(_Verification | None, manifest.verification)
    if manifest.results is not None:
        from surgery.outputs.results import check_results

        check_results(manifest.results)
    if manifest.training is not None:
        from surgery.training.recipe import BLOCK, Treatment

        shaped(_Training, manifest.training)
        keys = manifest.training["recipe"]["keys"]
        shaped(Treatment, keys.get(BLOCK))
        # All of them, as a recipe is recorded: the card says what they are.
        lacking = set(Treatment.__dataclass_fields__) - set(keys[BLOCK])
        if lacking:
            raise ValueError(f"the recipe's block {BLOCK} lacks {min(lacking)}")
        shaped(list[_Dataset] | None, keys.get("datasets"))
    check_strength(manifest.strength)
    if not manifest.dimensions:
        raise ValueError("it names no layer")
    for layer, chosen in manifest.dimensions.items():
        if not 0 <= layer < manifest.depth:
            raise ValueError(f"layer {layer} does not exist")
        if not chosen or not 0 <= min(chosen) <= max(chosen) < manifest.hidden_size:
            raise ValueError(f"the dimensions of layer {layer} do not exist")
    for record in manifest.files:
        if Path(record.name).is_absolute() or ".." in Path(record.name).parts:
            raise ValueError(f"it names a file outside its folder: {record.name!r}")
    for edit in manifest.edits:
        if edit.layer not in manifest.dimensions or edit.axis not in (0, 1):
            raise ValueError(f"the edit of {edit.tensor} is none")
        if edit.kind not in ("gain", "bias", "columns", "rank_one"):
            raise ValueError(f"the edit of {edit.tensor} is of the unknown kind {edit.kind!r}")
        if edit.kind == "rank_one" and edit.layer not in manifest.sinks:
            raise ValueError(f"the edit of {edit.tensor} has no sink direction")
        base64.b64decode((edit.original or "").encode(), validate=True)
    for name, packed in manifest.replaced.items():
        if name not in GENERATED:
            raise ValueError(f"it replaces a file that is never generated: {name!r}")
        unpack_file(packed)
    for layer, sink in manifest.sinks.items():
        sizes = len(unpack(sink.center)), len(unpack(sink.detector))
        if sizes != (len(manifest.dimensions.get(layer, ())), manifest.hidden_size):
            raise ValueError(f"the sink direction of layer {layer} has another size than the mask")
        lacking = {"ordinary_rms", "ordinary_largest", "sink_smallest"} - set(sink.leak)
        if lacking:
            raise ValueError(f"the leak of layer {layer} lacks {min(lacking)}")


def clean_numbers(value: Any) -> Any:
    """Data without NaN and infinities, which JSON has not: they become None."""
    if isinstance(value, dict):
        return {key: clean_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [clean_numbers(part) for part in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
