"""A safetensors file: its header read and checked, and files written tensor by tensor.

Tensors here are stored bytes in any format (bfloat16, float8) and arrive one after another; the
safetensors package writes arrays of the libraries it knows, all held in memory at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint
from surgery.files import dtypes
from surgery.files.ranges import LocalFiles, Ranges

# Headers are padded to this many bytes, so that tensors are aligned in memory maps.
_ALIGNMENT = 8
# The safetensors reference implementation refuses headers above this size.
LARGEST_HEADER = 100_000_000
# Beyond them, multiplying a stranger's numbers could take for ever.
_LARGEST_NUMBER, _DIMENSIONS = 2**63, 64


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, as a header describes it.

    Attributes:
        name: Its name.
        dtype: Its number format, as safetensors calls it.
        shape: Its shape.
        file: The name of the file that holds it.
        begin: Its first byte, from the start of the file.
        end: The byte after its last one.
    """

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


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file on disk; see `parse_header`."""
    return parse_header(LocalFiles(path.parent), path.name)


def parse_header(ranges: Ranges, file: str) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, in the order of their bytes.

    Checks all that a header can promise: length, dtypes, shapes against byte ranges, ranges that
    neither overlap nor leave gaps, and a file exactly as long as they say.

    Raises:
        BadCheckpoint: The header breaks one of these promises.
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the name {key!r} appears twice")
        table[key] = value
    return table


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
    if prod(shape) * bits != (end - begin) * 8:
        raise BadCheckpoint(f"{file}: the shape and the byte range of {name} disagree.")
    return TensorEntry(name, dtype, tuple(shape), file, start + begin, start + end)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], bytes | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file that holds `tensors`, in their order.

    Args:
        path: Where; nothing may be there.
        tensors: safetensors dtype and shape, by name.
        read: The bytes of a tensor, asked for once and in order.
        metadata: What the header says besides.

    Raises:
        ValueError: A tensor's bytes are not as many as dtype and shape say.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * dtypes.BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, (dtype, shape) in tensors.items():
            values = read(name)
            if len(values) * 8 != prod(shape) * dtypes.BITS[dtype]:
                raise ValueError(f"the bytes of {name} do not fit its shape")
            file.write(values)
