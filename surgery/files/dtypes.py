"""The number formats of safetensors as numpy arrays, and rounding that happens once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# Bits per element of every format the safetensors specification names; formats without a
# numpy equivalent can be carried (copied) but not edited.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def is_float(name: str) -> bool:
    """Whether a safetensors dtype can be edited here."""
    return name in FLOATS


def decode(raw: bytes | bytearray | memoryview, name: str, shape: tuple[int, ...]) -> NDArray:
    """Bytes of a tensor as a numpy array of the stored format (no copy)."""
    return np.frombuffer(raw, dtype=FLOATS[name]).reshape(shape)


def all_finite(values: NDArray) -> bool:
    """Whether an array of a stored format holds neither infinities nor NaN."""
    with np.errstate(invalid="ignore"):  # signalling NaNs, which this is here to find
        return bool(np.isfinite(values).all())


def round_once(values: NDArray[np.float64], name: str) -> NDArray:
    """Float64 values in the stored format, rounded to nearest-even exactly once.

    bfloat16 and float8 are reached through float32; rounding twice could differ from rounding
    once at ties, so the first step rounds to odd, which keeps the second one exact.
    """
    with np.errstate(over="ignore"):  # the caller asks whether the result is finite
        return _round(values, name)


def _round(values: NDArray[np.float64], name: str) -> NDArray:
    target = FLOATS[name]
    if name in ("F64", "F32", "F16"):
        return values.astype(target)
    nearest = values.astype(np.float32)
    inexact = nearest.astype(np.float64) != values
    even = (nearest.view(np.uint32) & 1) == 0
    step = inexact & even & np.isfinite(nearest)
    if step.any():
        toward = np.where(values > nearest, np.inf, -np.inf).astype(np.float32)
        nearest = np.where(step, np.nextafter(nearest, toward), nearest)
    return nearest.astype(target)
