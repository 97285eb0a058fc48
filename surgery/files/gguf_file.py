"""The bytes of a GGUF file: metadata, tensor table and data, read from the head alone.

What is not understood is carried as it is, which is why this does not go through a library that
reads a file into values and writes them anew. Layout: magic, version, number of tensors, number of
metadata entries, the entries, one record per tensor, padding, data.
"""

from __future__ import annotations

import logging
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported

F32 = 0  # ggml's number for the type
_MAGIC = b"GGUF"
_START = 24
_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT = "general.alignment", 32
# GGUF's numbers for types, as struct calls them.
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SHARD = re.compile(
    r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)$", re.IGNORECASE
)
# More dimensions than ggml knows, and longer arrays than any vocabulary, are damage.
_DIMENSIONS, _LONGEST = 4, 2**31
# Padding is made in memory.
_LARGEST_ALIGNMENT = 2**20
# Metadata that are the length of some tensor's axis, or less.
_SIZES = (
    "vocab_size",
    "embedding_length",
    "feed_forward_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
)

_log = logging.getLogger(__name__)


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF, which its first bytes say, whatever it is called."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False


def names_gguf(path: Path) -> bool:
    """Whether the name of an output asks for a GGUF, in capitals or not."""
    return path.suffix.lower() == ".gguf"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        name: Its name.
        kind: ggml's number for its type.
        shape: As numpy has it: the last axis varies fastest.
        begin: Its first byte, from the start of the file.
        size: Its bytes.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.begin + self.size


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, described from its head. All positions are bytes from the start of the file.

    Attributes:
        path: Where it lies.
        size: Its bytes.
        entries: How many metadata it has.
        values: Scalars and strings of the metadata; arrays are left out.
        places: Where each of these values lies.
        tensors: Its tensors by name.
        alignment: What the position of every tensor is a multiple of.
        metadata_end: Where the metadata end.
        table_end: Where the tensor table ends.
        data: Where tensor data begins.
    """

    path: Path
    size: int
    entries: int
    values: Mapping[str, Any]
    places: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    metadata_end: int
    table_end: int
    data: int

    def read(self, tensor: GgufTensor) -> bytes:
        """The stored bytes of a tensor."""
        with open(self.path, "rb") as file:
            file.seek(tensor.begin)
            return file.read(tensor.size)

    def head(
        self,
        added: Mapping[str, str | int] | None = None,
        changed: Mapping[str, int] | None = None,
        *,
        without: int = 0,
        metadata_end: int | None = None,
    ) -> bytes:
        """Everything before the data, with metadata added at its end, or taken away again.

        Args:
            added: Strings and unsigned 32-bit numbers to add.
            changed: New values of entries that are unsigned 32-bit numbers already.
            without: How many entries to take away.
            metadata_end: Where the first of these begins.
        """
        with open(self.path, "rb") as file:
            raw = bytearray(file.read(self.table_end))
        for key, number in (changed or {}).items():
            struct.pack_into("<I", raw, self.places[key], number)
        metadata = bytes(raw[_START : metadata_end or self.metadata_end])
        metadata += b"".join(_entry(key, value) for key, value in (added or {}).items())
        count = self.entries + len(added or {}) - without
        start = bytes(raw[:16]) + struct.pack("<Q", count)
        head = start + metadata + bytes(raw[self.metadata_end :])
        return head + b"\0" * (-len(head) % self.alignment)


def _entry(key: str, value: str | int) -> bytes:
    if isinstance(value, int):
        return _string(key) + struct.pack("<II", _UINT32, value)
    return _string(key) + struct.pack("<I", _STRING) + _string(value)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


class _Reader:
    """Values one after another from a memory map; struct.error past its end."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view, self.position = view, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.view, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.view):
            raise struct.error("a value is longer than the file")

    def string(self) -> str:
        length = self.take("Q")
        begin = self.position
        self.skip(length)
        return self.view[begin : self.position].decode("utf-8")

    def skip_array(self) -> None:
        kind, count = self.take("I"), self.take("Q")
        if count > _LONGEST:
            raise struct.error("an array is longer than any can be")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
        elif kind == _ARRAY:
            for _ in range(count):
                self.skip_array()
        else:
            raise struct.error(f"an array has elements of the unknown type {kind}")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        raise struct.error(f"a value has the unknown type {kind}")


def read_gguf(path: Path) -> GgufFile:
    """Describe a GGUF file.

    Raises:
        BadCheckpoint: It is damaged, truncated or something else.
        Unsupported: It is GGUF version 1, or big-endian.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC or size < _START:
                raise BadCheckpoint(f"{path} is not a GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _read(path, size, _Reader(view))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error
    except (struct.error, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is damaged or truncated: {error}.") from error


def _read(path: Path, size: int, reader: _Reader) -> GgufFile:
    reader.position = 4
    version = reader.take("I")
    if version not in (2, 3):
        raise Unsupported(
            f"{path} is GGUF version {version}, or big-endian; only little-endian versions 2 and 3 "
            "are read."
        )
    count, entries = reader.take("Q"), reader.take("Q")
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    for _ in range(entries):
        key, kind = reader.string(), reader.take("I")
        if kind == _ARRAY:
            reader.skip_array()
            continue
        places[key] = reader.position
        values[key] = reader.value(kind)
    metadata_end = reader.position
    records = [_record(reader) for _ in range(count)]
    alignment = values.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    known = isinstance(alignment, int) and 8 <= alignment <= _LARGEST_ALIGNMENT
    if not known or alignment % 8:
        raise BadCheckpoint(f"{path} has an alignment of {alignment!r}.")
    data = reader.position + -reader.position % alignment
    tensors = {}
    for name, kind, shape, offset in records:
        tensor = GgufTensor(name, kind, shape, data + offset, tensor_size(kind, shape))
        if tensor.end > size or name in tensors:
            raise BadCheckpoint(f"{path} is damaged or truncated at the tensor {name}.")
        tensors[name] = tensor
    _log.debug("%s: %d tensors, %d metadata", path, len(tensors), entries)
    return GgufFile(
        path, size, entries, values, places, tensors, alignment, metadata_end, reader.position, data
    )


def _record(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = reader.string(), reader.take("I")
    if dimensions > _DIMENSIONS:
        raise struct.error(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.take("Q") for _ in range(dimensions))
    return name, reader.take("I"), shape[::-1], reader.take("Q")


def check_sizes(file: GgufFile) -> None:
    """Raise BadCheckpoint where the metadata describe a larger model than there are tensors for."""
    longest = max((axis for tensor in file.tensors.values() for axis in tensor.shape), default=0)
    architecture = file.values.get("general.architecture")
    for name in ("block_count", *_SIZES):
        key = f"{architecture}.{name}"
        largest = len(file.tensors) if name == "block_count" else longest
        value = file.values.get(key, 0)
        if not isinstance(value, int) or value > largest:
            raise BadCheckpoint(
                f"{file.path} says that {key} is {value!r}, but its tensors allow at most "
                f"{largest}."
            )


def tensor_type(kind: int) -> str:
    """The name of one of ggml's types, such as F32 or Q4_K."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def tensor_size(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of one of ggml's types; BadCheckpoint for a type nobody knows."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise BadCheckpoint(f"A tensor has the unknown ggml type {kind}.") from error
    return prod(shape) // block * width


def values_of(file: GgufFile, tensor: GgufTensor) -> NDArray[np.float32]:
    """A tensor as float32, dequantised; shape as `GgufTensor.shape`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.frombuffer(file.read(tensor), dtype=np.uint8)
    if tensor.kind == F32:
        return raw.view("<f4").reshape(tensor.shape)
    rows = raw.reshape(*tensor.shape[:-1], -1)
    kind = GGMLQuantizationType(tensor.kind)
    if kind == GGMLQuantizationType.F16:
        return rows.view("<f2").astype(np.float32)
    return np.asarray(dequantize(rows, kind).reshape(tensor.shape))


def shards_of(path: Path) -> list[Path]:
    """All files of a GGUF model, given any of them; BadCheckpoint where a shard is missing."""
    match = _SHARD.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    found = [shard_path(path, n, count) for n in range(1, count + 1)]
    for shard in found:
        if not shard.is_file():
            raise BadCheckpoint(f"The shard {shard} is missing; fetch it again.")
    return found


def shard_path(stem: Path, number: int, count: int) -> Path:
    """Where llama.cpp looks for a shard, counted from 1; the stem itself for a single file."""
    name, suffix = (stem.stem, stem.suffix) if names_gguf(stem) else (stem.name, ".gguf")
    if (match := _SHARD.match(stem.name)) is not None:
        name, suffix = match["stem"], match["suffix"]
    if count == 1:
        return stem.with_name(f"{name}{suffix}")
    return stem.with_name(f"{name}-{number:05d}-of-{count:05d}{suffix}")


def merge(shards: Iterable[Path], target: Path) -> None:
    """One file from shards: the first one's metadata and everybody's tensors."""
    files = [read_gguf(shard) for shard in shards]
    first = files[0]
    with open(first.path, "rb") as file:
        metadata = file.read(first.metadata_end)[_START:]
    tensors = [(file, tensor) for file in files for tensor in file.tensors.values()]
    table, position = b"", 0
    for _, tensor in tensors:
        table += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        table += b"".join(struct.pack("<Q", size) for size in tensor.shape[::-1])
        table += struct.pack("<IQ", tensor.kind, position)
        position += tensor.size + -tensor.size % first.alignment
    head = _MAGIC + struct.pack("<IQQ", 3, len(tensors), first.entries) + metadata + table
    with open(target, "xb") as written:
        written.write(head + b"\0" * (-len(head) % first.alignment))
        for shard, tensor in tensors:
            written.write(shard.read(tensor) + b"\0" * (-tensor.size % first.alignment))
