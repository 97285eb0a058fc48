"""The bytes of a patched GGUF file: norm gains in place, provenance added, everything else kept.

llama.cpp stores norm gains in float32 whatever the quantisation, and those of unit-offset norms
with the one added, so zero means zero. The manifest travels inside the file, as metadata, and is
enough to restore the base from the file alone.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.digests import file_sha256
from surgery.files.gguf_file import F32, GgufFile, read_gguf, shards_of, tensor_type, values_of
from surgery.files.safetensors_file import TensorEntry
from surgery.files.weights import Weights
from surgery.folds.edits import Bias, Edit, Gain
from surgery.method.mask import Mask
from surgery.models.anatomy import effective_gain
from surgery.outputs.checks import Check, checked
from surgery.outputs.gguf_container import read_embedded, targets_of
from surgery.outputs.gguf_names import MANIFEST_KEY, base_model, gguf_name
from surgery.outputs.manifest import Manifest, manifest_text
from surgery.outputs.plan import Plan
from surgery.outputs.records import FileRecord
from surgery.patient.patient import Patient

_COUNT_KEY = "general.base_model.count"
_STEP = 4 * 1024 * 1024


def open_gguf(path: Path, origin: Origin, config: Any) -> tuple[Checkpoint, list[GgufFile]]:
    """A GGUF model, all its shards, as a checkpoint whose tensors have llama.cpp's names."""
    files = [read_gguf(shard) for shard in shards_of(path)]
    tensors = {
        tensor.name: TensorEntry(
            tensor.name,
            tensor_type(tensor.kind),
            tensor.shape,
            file.path.name,
            tensor.begin,
            tensor.end,
        )
        for file in files
        for tensor in file.tensors.values()
    }
    names = tuple(file.path.name for file in files)
    checkpoint = Checkpoint(
        folder=path.parent,
        origin=origin,
        config=config,
        weights=Weights(names[0], names, None),
        tensors=tensors,
        side_files=(),
        file_sizes={file.path.name: file.size for file in files},
    )
    return checkpoint, files


def gguf_edits(files: Sequence[GgufFile], patient: Patient, mask: Mask) -> tuple[Edit, ...]:
    """The norm fold in llama.cpp's names and storage.

    Args:
        files: the shards of the GGUF.
        patient: the same model, dequantised.
        mask: what is folded in.

    Raises:
        Unsupported: where the GGUF's gains are not the effective gains of that model, so that zero
            would not mean zero, or are not stored as float32.
    """
    architecture = str(files[0].values.get("general.architecture"))
    anatomy, edits = patient.anatomy, list[Edit]()
    if mask.strength == 0.0:
        return ()
    for layer in mask.layers:
        found, chosen = anatomy.at(layer), mask.dimensions[layer]
        name = gguf_name(architecture, anatomy.depth, found.gain)
        stored = _values(files, name)
        expected = effective_gain(anatomy, patient.plain, layer)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-5):
            raise Unsupported(f"{name} of the GGUF does not hold the gain of {found.gain}.")
        edits.append(Gain(name, layer, chosen, mask.strength))
        if found.bias:
            bias = gguf_name(architecture, anatomy.depth, found.bias)
            _values(files, bias)
            edits.append(Bias(bias, layer, chosen, mask.strength))
    return tuple(edits)


def require_editable_gains(files: Sequence[GgufFile]) -> None:
    """Raise Unsupported where no layer's gain is stored so that it can be edited.

    Known from the headers; what a target layer's gain holds is compared once it is known.
    """
    gains = [
        (name, tensor.kind)
        for file in files
        for name, tensor in file.tensors.items()
        if name.endswith(".attn_norm.weight")
    ]
    if gains and all(kind != F32 for _, kind in gains):
        raise _not_f32(*gains[0])


def _not_f32(name: str, kind: int) -> Unsupported:
    return Unsupported(
        f"{name} of the GGUF is stored as {tensor_type(kind)}, and only norms stored as F32, as "
        "llama.cpp's converter does, are edited."
    )


def _values(files: Sequence[GgufFile], name: str) -> Any:
    for file in files:
        if name in file.tensors:
            kind = file.tensors[name].kind
            if kind != F32:
                raise _not_f32(name, kind)
            return values_of(file, file.tensors[name])
    raise BadCheckpoint(f"The GGUF has no tensor {name}.")


def provenance(first: GgufFile, origin: Origin) -> tuple[dict[str, str | int], dict[str, int]]:
    """Metadata to add, by GGUF's naming conventions, and entries whose number changes.

    The base is the (last) one of `general.base_model`; what the file already says stays.
    """
    added: dict[str, str | int] = {}
    changed: dict[str, int] = {}
    number = first.values.get(_COUNT_KEY, 0)
    if _COUNT_KEY in first.values:
        changed[_COUNT_KEY] = number + 1
    else:
        added[_COUNT_KEY] = 1
    described = {**base_model(origin), **_described(first)}
    for key, value in described.items():
        added[f"general.base_model.{number}.{key}"] = value
    if "general.finetune" not in first.values:
        added["general.finetune"] = "WeMask"
    return {key: value for key, value in added.items() if key not in first.values}, changed


def _described(first: GgufFile) -> dict[str, str]:
    """How the base names itself."""
    fields = {"name": "name", "organization": "organization", "version": "version"}
    return {
        field: str(first.values[f"general.{key}"])
        for key, field in fields.items()
        if f"general.{key}" in first.values
    }


def write_gguf(
    plan: Plan, files: Sequence[GgufFile], manifest: Manifest, folder: Path
) -> tuple[Manifest, list[Path]]:
    """Write the patched files into a folder; returns the completed manifest inside them."""
    origin = plan.checkpoint.origin
    added, changed = provenance(files[0], origin)
    targets = targets_of(folder / plan.output.name, len(files))
    names = {file.path.name: target.name for file, target in zip(files, targets, strict=True)}
    manifest = replace(
        manifest,
        # Not by the base's name, which is another wherever it was copied to.
        edits=[replace(record, file=names[record.file]) for record in manifest.edits],
        # A file cannot hold its own hash: these are the base's, to which it must be restorable.
        files=[
            FileRecord(target.name, file.size, file_sha256(file.path))
            for target, file in zip(targets, files, strict=True)
        ],
        container={
            "kind": "gguf",
            "added": [*added, MANIFEST_KEY],
            "restored": {key: int(files[0].values[key]) for key in changed},
        },
    )
    added[MANIFEST_KEY] = manifest_text(manifest)
    for number, (file, target) in enumerate(zip(files, targets, strict=True)):
        head = file.head(added, changed) if number == 0 else file.head()
        with open(file.path, "rb") as source, open(target, "xb+") as written:
            written.write(head)
            source.seek(file.data)
            while block := source.read(_STEP):
                written.write(block)
            for edit in plan.files[number].edits:
                tensor = file.tensors[edit.tensor]
                values = np.frombuffer(file.read(tensor), "<f4")
                written.seek(tensor.begin - file.data + len(head))
                written.write(edit.apply(values, "F32").tobytes())
    return manifest, targets


def restored(files: Sequence[GgufFile], number: int, manifest: Manifest) -> Iterator[bytes]:
    """The bytes of one file of the base, from the converted one and its manifest alone."""
    file = files[number]
    container = manifest.container or {}
    if number == 0:
        keys = [key for key in container.get("added", []) if key in file.places]
        if not keys or MANIFEST_KEY not in keys:
            raise BadCheckpoint(f"The manifest in {file.path} does not say what it added.")
        begin = min(file.places[key] - 12 - len(key.encode()) for key in keys)
        yield file.head(
            changed=container.get("restored", {}), without=len(keys), metadata_end=begin
        )
    else:
        yield file.head()
    originals = sorted(
        (file.tensors[record.tensor].begin, base64.b64decode(record.original))
        for record in manifest.edits
        if record.tensor in file.tensors and record.original is not None
    )
    with open(file.path, "rb") as opened:
        opened.seek(file.data)
        for begin, raw in originals:
            yield from _until(opened, begin)
            yield raw
            opened.seek(len(raw), os.SEEK_CUR)
        yield from _until(opened, file.size)


def _until(opened: Any, end: int) -> Iterator[bytes]:
    while (left := end - opened.tell()) > 0:
        block = opened.read(min(_STEP, left))
        if not block:
            raise BadCheckpoint("A GGUF file became shorter while it was read.")
        yield block


def restore_gguf(path: Path, target: Path) -> int:
    """Write the base of a converted GGUF into the folder of `target`; returns how many files.

    Raises BadCheckpoint where a restored file has not the recorded sha256.
    """
    manifest, files = read_embedded(path)
    for number, out in enumerate(targets_of(target, len(files))):
        with open(out, "xb") as written:
            for block in restored(files, number, manifest):
                written.write(block)
        if file_sha256(out) != manifest.files[number].sha256:
            raise BadCheckpoint(
                f"{path} does not come out as its base (another sha256): it is damaged; nothing "
                "was written."
            )
    return len(files)


def verify_gguf_bytes(path: Path) -> list[Check]:
    """That a written GGUF differs from its base by the edit and the added metadata alone."""
    manifest, files = read_embedded(path)

    def undone() -> str:
        for number, record in enumerate(manifest.files):
            digest = hashlib.sha256()
            for block in restored(files, number, manifest):
                digest.update(block)
            if digest.hexdigest() != record.sha256:
                raise BadCheckpoint(f"{files[number].path.name} is not the base with the edit")
        return f"{sum(record.size for record in manifest.files) / 1e6:.1f} MB"

    def edited() -> str:
        for edit, record in zip(manifest.rebuilt_edits(), manifest.edits, strict=True):
            original = np.frombuffer(base64.b64decode(record.original or ""), "<f4")
            expected = edit.apply(original, "F32").tobytes()
            file = next((f for f in files if edit.tensor in f.tensors), None)
            if file is None or file.read(file.tensors[edit.tensor]) != expected:
                raise BadCheckpoint(f"{edit.tensor} is not what the edit gives")
        return f"{len(manifest.edits)} tensors recomputed"

    return [
        checked("with the edit and the added metadata undone, every byte is the base's", undone),
        checked("every edited tensor equals the edit recomputed from the original", edited),
    ]
