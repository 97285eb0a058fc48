"""The nouns of a manifest: what was edited, written and measured, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import NotRequired, TypedDict


@dataclass(frozen=True)
class EditRecord:
    """One edited tensor.

    Attributes:
        tensor: its name.
        file: where it lies.
        layer: the target layer, from 0.
        kind: a key of `surgery.folds.edits.EDITS`.
        axis: of a linear's weight, the axis that runs over its input.
        null: of a norm's gain, the stored value that multiplies by zero.
        original: base64 of the source's bytes, for gains and biases.
    """

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
    leak: dict[str, Any]


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint; source_sha256 differs where it was edited."""

    name: str
    size: int
    sha256: str
    source_sha256: str | None = None


# What was measured is kept as data, with keys that readers may rely on; others stand beside them.
class EmergenceRecord(TypedDict):
    """An `Emergence` as data."""

    layer: int | None
    magnification: float | None
    found_by: str
    rows: list[dict[str, Any]]


class VariantRecord(TypedDict):
    """A `Measured` as data."""

    name: str
    perplexity: float
    against_base: float
    kl_from_reference: float | None
    kl_from_base: float | None


class IntervalRecord(TypedDict):
    """An `Interval` as data."""

    difference: float | None
    low: float | None
    high: float | None
    looks: int
    decided: bool


class PositionsRecord(TypedDict):
    """A `Positions` as data."""

    early: float | None
    late: float | None
    largest: float | None
    largest_at: int
    largest_token: str
    longest: int


class QualityRecord(TypedDict):
    """A `Quality` as data; also forced (bool) and leak_text (str)."""

    variants: list[VariantRecord]
    tokens: int
    sequences: int
    # Which earlier versions have not measured.
    interval: NotRequired[IntervalRecord]
    positions: NotRequired[PositionsRecord]


class CheckRecord(TypedDict):
    """A `Check` as data."""

    name: str
    passed: bool
    detail: NotRequired[str]


class VerificationRecord(TypedDict):
    """A `Verification` as data."""

    passed: NotRequired[bool]
    checks: list[CheckRecord]
