"""One changed tensor: how it is edited, what must be kept to undo that, and how it is undone.

Edits are computed in float64 and rounded once, to the stored format. Matrices are edited in blocks
of rows, so that memory does not depend on their size.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.files import dtypes
from surgery.method.algebra import Array64, scale_columns, scale_entries

# Elements in a block of rows.
BLOCK_ELEMENTS = 4_000_000

ReadRows = Callable[[slice], NDArray]


@dataclass(frozen=True)
class SinkDirection:
    """What the `sink` fold knows about one target layer, float32 (arithmetic is float64).

    Attributes:
        center: the sink token's mean attention input c restricted to S, [k].
        detector: v, [D], with v·c = 1 and little response to ordinary tokens.
    """

    center: NDArray[np.float32]
    detector: NDArray[np.float32]


@dataclass(frozen=True)
class Edit(ABC):
    """One changed tensor.

    Attributes:
        tensor: its name in the checkpoint.
        layer: the target layer, from 0.
        dimensions: S, ascending.
        strength: γ.
        parameter: path of the same numbers in the loaded model; empty where no model is known.
    """

    tensor: str
    layer: int
    dimensions: tuple[int, ...]
    strength: float
    parameter: str = field(default="", kw_only=True, compare=False)

    kind: ClassVar[str]
    # Whether the tensor is small enough for its original bytes to stand in the manifest.
    small: ClassVar[bool] = False
    # Whether it is the weight of a linear, not the gain or bias of a norm.
    linear: ClassVar[bool] = True
    # Its fields besides those of every edit.
    own: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def known(
        cls,
        tensor: str,
        layer: int,
        dimensions: tuple[int, ...],
        strength: float,
        facts: Mapping[str, Any],
        parameter: str = "",
    ) -> Edit:
        """An edit from what a manifest says of it; `facts` has axis, null and sink."""
        own = {name: facts[name] for name in cls.own}
        return cls(tensor, layer, dimensions, strength, parameter=parameter, **own)

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of an edit besides which tensor it is of."""
        return {"axis": getattr(self, "axis", 1), "null": getattr(self, "null", 0.0)}

    def apply(self, stored: NDArray, dtype: str) -> NDArray:
        """The edited tensor in its stored format; `dtype` is the safetensors name of it."""
        result = stored.copy()
        for block, rows in self.blocks(stored.shape, dtype, lambda block: stored[block]):
            result[block] = rows
        return result

    def blocks(
        self, shape: tuple[int, ...], dtype: str, read: ReadRows
    ) -> Iterator[tuple[slice, NDArray]]:
        """The edited tensor in blocks of rows; `read` gives rows of the stored one."""
        before = self._before(shape, read)
        for block in row_blocks(shape):
            rows = read(block)
            if self.strength != 0.0:
                rows = dtypes.round_once(self._edit(rows.astype(np.float64), block, before), dtype)
            yield block, rows

    def _before(self, _shape: tuple[int, ...], _read: ReadRows) -> Any:
        """What the edit of every block needs to know of the whole tensor."""
        return None

    @abstractmethod
    def _edit(self, rows: Array64, block: slice, before: Any) -> Array64:
        """The edited rows of a block, not yet rounded."""

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be edited so."""

    def masked(self, _stored: NDArray) -> Array64:
        """What of a stored tensor counts in S, float64; of most kinds all zero at strength 1."""
        return np.empty(0)

    def kept_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is kept of a tensor to undo the edit: here all of it."""
        return shape

    def kept(self, stored: NDArray) -> NDArray:
        """What is kept of the stored tensor (any element type) to undo the edit."""
        return stored

    def inverse(self, _edited: NDArray, kept: NDArray) -> NDArray:
        """The stored tensor again, from the edited one and what `kept` gave."""
        return kept


class _OfNorm(Edit):
    small = True
    linear = False
    null: float

    def _edit(self, rows: Array64, block: slice, _before: Any) -> Array64:
        return scale_entries(rows, _inside(self.dimensions, block), self.strength, self.null)

    def masked(self, stored: NDArray) -> Array64:
        return stored.astype(np.float64)[list(self.dimensions)] - self.null

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 1 and max(self.dimensions) < shape[0]


@dataclass(frozen=True)
class Gain(_OfNorm):
    """A norm's gain, zero (times 1 - γ) in S.

    Attributes:
        null: the stored gain that multiplies by zero: -1 in unit-offset norms.
    """

    null: float = 0.0
    kind = "gain"
    own = ("null",)


@dataclass(frozen=True)
class Bias(_OfNorm):
    """A norm's bias, zero (times 1 - γ) in S."""

    kind = "bias"
    null: float = field(default=0.0, init=False)


@dataclass(frozen=True)
class Columns(Edit):
    """Input columns of a linear, scaled.

    Attributes:
        axis: the axis of the weight that runs over its input: 1 where it is stored [out, D], 0
            where it is stored [D, out].
    """

    axis: int = 1
    kind = "columns"
    own = ("axis",)

    def _edit(self, rows: Array64, block: slice, _before: Any) -> Array64:
        if self.axis == 1:
            return scale_columns(rows, self.dimensions, self.strength)
        return scale_entries(rows, _inside(self.dimensions, block), self.strength, 0.0)

    def masked(self, stored: NDArray) -> Array64:
        return np.take(stored.astype(np.float64), self.dimensions, axis=self.axis)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and max(self.dimensions) < shape[self.axis]

    def kept_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        kept = list(shape)
        kept[self.axis] = len(self.dimensions)
        return tuple(kept)

    def kept(self, stored: NDArray) -> NDArray:
        return np.take(stored, self.dimensions, axis=self.axis)

    def inverse(self, edited: NDArray, kept: NDArray) -> NDArray:
        restored = edited.copy()
        if self.axis == 1:
            restored[:, list(self.dimensions)] = kept
        else:
            restored[list(self.dimensions)] = kept
        return restored


@dataclass(frozen=True)
class RankOne(Edit):
    """W ← W − γ (W (m ⊙ c)) vᵀ, for a weight W [out, D], m being 1 in S and 0 elsewhere.

    The rounding loses bits that no formula brings back, so that undoing needs the whole tensor.

    Attributes:
        axis: as in `Columns`.
        sink: c and v.
    """

    axis: int = 1
    sink: SinkDirection = field(kw_only=True)
    kind = "rank_one"
    own = ("axis", "sink")

    def _before(self, shape: tuple[int, ...], read: ReadRows) -> Array64 | None:
        """W (m ⊙ c) of a linear stored [D, out], whose rows in S lie in many blocks."""
        if self.axis == 1:
            return None
        response = np.zeros(shape[1])
        center = dict(zip(self.dimensions, self.sink.center.astype(np.float64), strict=True))
        for block in row_blocks(shape):
            inside = [d for d in self.dimensions if block.start <= d < block.stop]
            rows = read(block)[[d - block.start for d in inside]].astype(np.float64)
            response += np.array([center[d] for d in inside]) @ rows
        return response

    def _edit(self, rows: Array64, block: slice, before: Any) -> Array64:
        detector = self.sink.detector.astype(np.float64)
        if before is not None:
            return rows - self.strength * np.outer(detector[block], before)
        center = self.sink.center.astype(np.float64)
        return rows - self.strength * np.outer(rows[:, list(self.dimensions)] @ center, detector)

    def fits(self, shape: tuple[int, ...]) -> bool:
        width = shape[self.axis] if len(shape) == 2 else 0
        return max(self.dimensions) < width and len(self.sink.detector) == width


# By the word that a manifest has for each.
EDITS: dict[str, type[Edit]] = {cls.kind: cls for cls in (Gain, Bias, Columns, RankOne)}


def _inside(dimensions: tuple[int, ...], block: slice) -> tuple[int, ...]:
    """Those of S that lie in a block of rows, counted from its start."""
    return tuple(d - block.start for d in dimensions if block.start <= d < block.stop)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis, each of bounded size."""
    width = max(1, int(np.prod(shape[1:])))
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def pack(values: NDArray[np.float32]) -> str:
    """A float32 vector as base64 of its little-endian bytes, for the manifest."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpack(text: str) -> NDArray[np.float32]:
    """The vector that `pack` wrote; ValueError for anything else."""
    raw = base64.b64decode(text.encode("ascii"), validate=True)
    return np.frombuffer(raw, dtype="<f4").astype(np.float32)
