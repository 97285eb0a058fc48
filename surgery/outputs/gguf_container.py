"""What every .gguf output shares: names of shards, files that appear whole, the manifest inside."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError
from surgery.files.digests import file_sha256
from surgery.files.gguf_file import F32, GgufFile, is_gguf, read_gguf, shard_path, shards_of
from surgery.files.staging import put_each, sync_tree, temporary_sibling
from surgery.folds.edits import EDITS
from surgery.outputs.describe import FileComparison
from surgery.outputs.gguf_names import MANIFEST_KEY
from surgery.outputs.manifest import Manifest, parse_manifest
from surgery.outputs.plan import check_apart, check_parent


def targets_of(output: Path, count: int) -> list[Path]:
    """The files behind an output name: itself, or its shards."""
    return [shard_path(output, number, count) for number in range(1, count + 1)]


def check_gguf_output(
    sources: Sequence[Path], output: Path, count: int, *, overwrite: bool
) -> None:
    """Raise BadSettings unless the output may be created; nothing is touched."""
    check_parent(output)
    for target in targets_of(output, count):
        check_apart(sources, target)
        if not os.path.lexists(target):
            continue
        if not overwrite:
            raise BadSettings(f"{target} exists already; give --overwrite or another --output.")
        if target == targets_of(output, count)[0]:
            try:
                known = target.is_file() and MANIFEST_KEY in read_gguf(target).values
            except SurgeryError:
                known = False
            if not known:
                raise BadSettings(
                    f"{target} was not written by surgery, so it will not be overwritten; choose "
                    "another --output."
                )


@contextmanager
def gguf_staging(
    sources: Sequence[Path], output: Path, count: int, *, overwrite: bool
) -> Iterator[Path]:
    """A folder beside the output, whose files take their names when the block ends well."""
    try:
        with temporary_sibling(output) as folder:
            yield folder
            sync_tree(folder)
            check_gguf_output(sources, output, count, overwrite=overwrite)
            put_each(folder, [target.name for target in targets_of(output, count)])
    except OSError as error:
        raise BadSettings(f"Writing {output} failed: {error.strerror or error}.") from error


def read_embedded(path: Path) -> tuple[Manifest, list[GgufFile]]:
    """The manifest inside a GGUF that surgery wrote, and the files; BadCheckpoint without one."""
    if not is_gguf(path):
        raise BadCheckpoint(f"{path} is no .gguf file, so surgery did not write it.")
    files = [read_gguf(shard) for shard in shards_of(path)]
    text = files[0].values.get(MANIFEST_KEY)
    if not isinstance(text, str):
        raise BadCheckpoint(f"{path} has no {MANIFEST_KEY}, so surgery did not write it.")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"The manifest in {path} is damaged: {error}.") from error
    manifest = parse_manifest(raw, f"The manifest in {path}")
    try:
        _check(manifest, files)
    except ValueError as error:
        raise BadCheckpoint(f"The manifest in {path} is damaged: {error}.") from error
    return manifest, files


@dataclass(frozen=True)
class _Container:
    kind: str
    added: list[str]
    restored: dict[str, int]


def _check(manifest: Manifest, files: Sequence[GgufFile]) -> None:
    """Raise ValueError where a manifest does not fit the files that it is about."""
    if manifest.container is None or manifest.container.get("kind") == "gguf-adapter":
        return
    from pydantic import TypeAdapter, ValidationError

    try:
        text = json.dumps(manifest.container)
        container = TypeAdapter(_Container).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"container: {error.errors()[0]['msg']}") from error
    first = files[0]
    if len(set(container.added)) != len(container.added):
        raise ValueError("it names an addition twice")
    for key, value in container.restored.items():
        if (
            not 0 <= value < 2**32
            or first.places.get(key, first.metadata_end) + 4 > first.metadata_end
        ):
            raise ValueError(f"{key} cannot be restored")
    if len(manifest.files) != len(files):
        raise ValueError(f"it is about {len(manifest.files)} files, not {len(files)}")
    for edit in manifest.edits:
        tensor = next((f.tensors[edit.tensor] for f in files if edit.tensor in f.tensors), None)
        original = base64.b64decode(edit.original or "")
        if (
            tensor is None
            or (tensor.kind, tensor.size) != (F32, len(original))
            or not EDITS[edit.kind].small
            or 4 * max(manifest.dimensions[edit.layer]) >= tensor.size
        ):
            raise ValueError(f"the edit of {edit.tensor} is none")


def repeated_gguf_name(path: Path, manifest: Manifest) -> str:
    """The name that a file names itself by in its manifest, or else its own."""
    return manifest.files[0].name if manifest.files else path.name


def compare_shards(path: Path, again: Path) -> tuple[FileComparison, ...]:
    """The files at hand, whose hashes nothing records, and the same ones made again."""
    pairs = zip(shards_of(path), shards_of(again), strict=True)
    return tuple(FileComparison(a.name, file_sha256(a), file_sha256(b)) for a, b in pairs)
