"""The bytes of a checkpoint: which tensor lies where in which file, read from headers alone.

Nothing here loads a tensor that was not asked for, and nothing imports torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files import dtypes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The safetensors reference implementation refuses headers above this size.
LARGEST_HEADER = 100_000_000
LARGEST_TEXT = 64 * 1024 * 1024
# Beyond them, multiplying a stranger's numbers could take for ever.
_LARGEST_NUMBER, _DIMENSIONS = 2**63, 64

# A second copy of the weights in another container would silently stay unedited.
_OTHER_WEIGHTS = re.compile(
    r"(\.(bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|tflite|mlmodel|nemo|safetensors)$)"
    r"|(\.index\.json$)|(^(pytorch_model|consolidated|tf_model|flax_model)\b)"
)
_OTHER_FOLDERS = ("original", "onnx", "openvino", "coreml", "gguf", ".cache", ".git")
# Side files that merely look like weights: training_args.bin and the like hold no weights.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its name, safetensors dtype, shape, and byte range in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from, precise enough to fetch the same bytes again.

    kind: "directory", "hub", "gguf" or "bin"; name: what a person calls it (a Hub id, a folder's
    name); commit: the Hub's commit; typed: the source as the user gave it; sha256: of the file
    behind a GGUF source.
    """

    kind: str
    name: str
    typed: str
    commit: str | None = None
    sha256: str | None = None
    note: str | None = None


class Ranges(Protocol):
    """Byte ranges of weight files, on this disk or elsewhere."""

    def size(self, file: str) -> int: ...

    def read(self, file: str, begin: int, end: int) -> bytes: ...

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, described from its headers.

    folder: where its side files lie, and its weight files too unless they are `remote`.
    modified: when each local file was last changed, in nanoseconds. made_from: the folder or files
    that the user has, where `folder` is a copy of them in another format.
    """

    folder: Path
    origin: Origin
    config: Mapping[str, Any]
    weight_files: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    file_sizes: Mapping[str, int] = field(default_factory=dict)
    modified: Mapping[str, int] = field(default_factory=dict)
    remote: Ranges | None = None
    made_from: tuple[Path, ...] = ()

    @property
    def sources(self) -> tuple[Path, ...]:
        """Folders and files that nothing may be written into."""
        return (self.folder, *self.made_from)

    @property
    def gguf(self) -> Path | None:
        """The .gguf file, or first shard, that all of it was read from."""
        return next((path for path in self.made_from if path.suffix == ".gguf"), None)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.file_sizes[name] for name in self.weight_files)

    def read(self, name: str) -> NDArray:
        """A tensor in its stored format, shape as stored.

        Raises Unsupported for integer and sub-byte formats, BadCheckpoint for a file that is
        shorter than its header says.
        """
        entry = self.tensors[name]
        if not dtypes.is_float(entry.dtype):
            raise Unsupported(
                f"The tensor {name} is stored as {entry.dtype}, which holds quantised values; "
                "convert the unquantised checkpoint instead."
            )
        return dtypes.decode(self.read_bytes(name), entry.dtype, entry.shape)

    def read_bytes(self, name: str) -> bytes:
        """The stored bytes of a tensor."""
        entry = self.tensors[name]
        return self.ranges.read(entry.file, entry.begin, entry.end)

    @property
    def ranges(self) -> Ranges:
        """Where byte ranges of the weight files are read from."""
        return self.remote if self.remote is not None else LocalFiles(self.folder)


class LocalFiles:
    """Byte ranges of the files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, file: str) -> int:
        """Bytes of a file; BadCheckpoint when it is not there."""
        try:
            return (self._folder / file).stat().st_size
        except OSError as error:
            raise BadCheckpoint(
                f"The shard {file} is missing from {self._folder}; fetch it again."
            ) from error

    def read(self, file: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` up to `end`; BadCheckpoint when it is shorter."""
        path = self._folder / file
        try:
            with open(path, "rb") as opened:
                opened.seek(begin)
                raw = opened.read(end - begin)
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error
        if len(raw) != end - begin:
            raise BadCheckpoint(f"{path} ends early; fetch it again.")
        return raw

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges, in the order asked for."""
        return [self.read(*wanted) for wanted in ranges]


def read_text(path: Path) -> str:
    """The text of a file of a usual size; OSError or ValueError, with the reason, otherwise.

    Whatever a stranger's file names is read in this way: never from a device or a pipe, which may
    have no end.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        raw = file.read(LARGEST_TEXT + 1)
    if len(raw) > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT // 2**20} MiB")
    return raw.decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one sentence about why not."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds no JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the name {key!r} appears twice")
        table[key] = value
    return table


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file on disk; see `parse_header`."""
    return parse_header(LocalFiles(path.parent), path.name)


def parse_header(ranges: Ranges, file: str) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, in the order of their bytes.

    Checks all that a header can promise: length, dtypes, shapes against byte ranges, ranges that
    neither overlap nor leave gaps, and a file exactly as long as they say.
    """
    size = ranges.size(file)
    length = struct.unpack("<Q", ranges.read(file, 0, 8))[0] if size >= 8 else -1
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise BadCheckpoint(
            f"{file} has no valid safetensors header; it is truncated or not safetensors."
        )
    try:
        text = ranges.read(file, 8, 8 + length).decode("utf-8")
        raw = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file} has a damaged safetensors header: {error}.") from error
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{file} has a safetensors header that is no JSON object.")
    raw.pop("__metadata__", None)
    entries = [_entry(file, name, fields, 8 + length) for name, fields in raw.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 8 + length
    for entry in entries:
        if entry.begin != position:
            raise BadCheckpoint(f"{file}: the bytes of {entry.name} overlap or leave a gap.")
        position = entry.end
    if position != size:
        raise BadCheckpoint(
            f"{file} has {size} bytes and its header describes {position}; fetch the file again."
        )
    return {entry.name: entry for entry in entries}


def _entry(file: str, name: str, fields: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(type(number) is int and 0 <= number <= _LARGEST_NUMBER for number in numbers):
            raise TypeError
        if len(shape) > _DIMENSIONS:
            raise ValueError
        bits = dtypes.BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{file}: the header's entry for {name!r} is malformed.") from error
    if math.prod(shape) * bits != (end - begin) * 8:
        raise BadCheckpoint(f"{file}: the shape and the byte range of {name} disagree.")
    return TensorEntry(name, dtype, tuple(shape), file, start + begin, start + end)


def open_checkpoint(folder: Path, origin: Origin, remote: Ranges | None = None) -> Checkpoint:
    """Describe the safetensors checkpoint in a folder, or one whose weights are `remote`.

    Raises BadCheckpoint when a file is missing, truncated or disagrees with the index.
    """
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a directory.")
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(
            f"{folder} has no config.json, so it is not a Hugging Face checkpoint; "
            "give a folder or a Hub id that holds one."
        )
    check_links(folder, ("config.json", INDEX))
    config = read_json(folder / "config.json")
    weight_files, weight_map = _weight_files(folder)
    check_links(folder, weight_files)
    if remote is None and weight_map is None and not (folder / SINGLE).is_file():
        raise BadCheckpoint(_missing_weights(folder))
    ranges = remote if remote is not None else LocalFiles(folder)
    tensors: dict[str, TensorEntry] = {}
    sizes: dict[str, int] = {}
    for name in weight_files:
        header = parse_header(ranges, name)
        sizes[name] = ranges.size(name)
        for tensor in header:
            if tensor in tensors:
                first = tensors[tensor].file
                raise BadCheckpoint(f"{tensor} is stored both in {first} and {name}.")
        tensors |= header
    if weight_map is not None:
        _compare_index(weight_map, tensors)
    side_files, left_out = other_files(folder, set(weight_files))
    check_links(folder, side_files)
    for name in side_files:
        path = folder / name
        if not path.is_file():  # reading from a pipe, say, would wait for ever
            raise BadCheckpoint(f"{path} is a broken link or no plain file; remove it.")
        sizes[name] = path.stat().st_size
    local = (*(() if remote is not None else weight_files), *side_files)
    return Checkpoint(
        folder,
        origin,
        config,
        weight_files,
        tensors,
        side_files,
        left_out,
        sizes,
        {name: (folder / name).stat().st_mtime_ns for name in local},
        remote,
    )


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise BadCheckpoint for a file that is a link to somewhere outside its checkpoint.

    A stranger's checkpoint must not make this program read, and publish, a file of its user's.
    The Hub's cache is made of links to blobs beside its snapshots; those belong to it.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for name in names:
        target = (folder / name).resolve()
        if not target.is_relative_to(root) and target.parent != blobs:
            raise BadCheckpoint(
                f"{folder / name} is a link out of its checkpoint, to {target}; put the file "
                "itself there."
            )


def _weight_files(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint(f"{index} has no weight_map.")
        for name in weight_map.values():
            plain = isinstance(name, str) and name.isprintable() and name == os.path.basename(name)
            if not plain or not name:
                raise BadCheckpoint(
                    f"{index} names the file {name!r}, which is not a plain file name beside it."
                )
        return tuple(sorted(set(weight_map.values()))), weight_map
    return (SINGLE,), None


def _missing_weights(folder: Path) -> str:
    if any(folder.glob("model-*-of-*.safetensors")):
        return f"{folder} has shards but no {INDEX}; fetch the index too."
    return f"{folder} holds no {SINGLE} and no {INDEX}."


def _compare_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None:
            raise BadCheckpoint(f"The index places {name} in {file}, whose header lacks it.")
        if entry.file != file:
            raise BadCheckpoint(f"The index places {name} in {file}, but it lies in {entry.file}.")
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise BadCheckpoint(f"{extra} lies in {tensors[extra].file} but the index omits it.")


def other_files(folder: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Side files to carry, and files to leave behind because they repeat the weights."""
    return divided(_walk(folder), weights)


def divided(names: Iterable[str], weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same of names, those of the weight files left aside."""
    kept: list[str] = []
    left: list[str] = []
    for name in names:
        if name in weights:
            continue
        if carried(name):
            kept.append(name)
        elif not (name.startswith(".") and name.split("/", 1)[0] in _OTHER_FOLDERS):
            left.append(name)
    return tuple(kept), tuple(left)


def carried(name: str) -> bool:
    """Whether a file that is no weight file of a checkpoint belongs to it, by its path."""
    if name == INDEX:
        return True
    top, base = name.split("/", 1)[0], name.rsplit("/", 1)[-1]
    if top in _OTHER_FOLDERS and "/" in name:
        return False
    return not _OTHER_WEIGHTS.search(base) or base in _NOT_WEIGHTS


def _walk(folder: Path) -> Iterable[str]:
    for root, directories, files in os.walk(folder):
        directories.sort()
        for name in directories:
            if (Path(root) / name).is_symlink():
                raise BadCheckpoint(
                    f"{Path(root) / name} is a link to a folder; put the folder itself there."
                )
        for file in sorted(files):
            yield (Path(root) / file).relative_to(folder).as_posix()
