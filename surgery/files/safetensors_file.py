"""Writing a safetensors file tensor by tensor, in any stored format.

The safetensors package writes arrays of the libraries it knows, all held in memory at once; here
tensors are stored bytes (bfloat16, float8) and arrive one after another.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

from surgery.files import dtypes

# Headers are padded to this many bytes, so that tensors are aligned in memory maps.
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], bytes | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file that holds `tensors` (safetensors dtype and shape by name), in their order.

    read: the bytes of a tensor, asked for once and in order. Raises ValueError where they are
    not as many as dtype and shape say.
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
