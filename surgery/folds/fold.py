"""The mask as an edit of plain weights: pure functions over arrays, computed in float64.

x is the attention input, [tokens, D]; g the effective gain of the norm that makes it; W the weight
of a linear that reads it, [out, D] (`axis` 1) or [D, out] (`axis` 0). Results are float64; they are
rounded once, to the stored format, by whoever writes them.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.files import dtypes
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy, AttentionInput

# Rows of a weight matrix are edited in blocks of about this many elements, so that memory does
# not depend on the size of the matrix.
BLOCK_ELEMENTS = 4_000_000

Array64 = NDArray[np.float64]
ReadRows = Callable[[slice], NDArray]


@dataclass(frozen=True)
class SinkDirection:
    """What the `sink` fold knows about one target layer, float32 (arithmetic is float64).

    center: the sink token's mean attention input c restricted to S, shape [k].
    detector: v, shape [D], with v·c = 1 and little response to ordinary tokens.
    """

    center: NDArray[np.float32]
    detector: NDArray[np.float32]


@dataclass(frozen=True)
class Edit:
    """One changed tensor.

    kind: "gain" (a norm's gain), "bias" (its bias), "columns" (input columns of a linear scaled)
    or "rank_one" (the sink fold). dimensions: S. null: the stored value that means zero.
    """

    tensor: str
    layer: int
    kind: str
    dimensions: tuple[int, ...]
    strength: float
    null: float = 0.0
    axis: int = 1
    sink: SinkDirection | None = None

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
        response = self._response(shape, read)
        for block in row_blocks(shape):
            rows = read(block)
            if self.strength != 0.0:
                rows = dtypes.round_once(
                    self._edit(rows.astype(np.float64), block, response), dtype
                )
            yield block, rows

    def _response(self, shape: tuple[int, ...], read: ReadRows) -> Array64 | None:
        """c restricted to S through a linear stored [D, out]: its rows lie in many blocks."""
        if self.sink is None or self.axis == 1:
            return None
        response = np.zeros(shape[1])
        center = dict(zip(self.dimensions, self.sink.center.astype(np.float64), strict=True))
        for block in row_blocks(shape):
            inside = [d for d in self.dimensions if block.start <= d < block.stop]
            rows = read(block)[[d - block.start for d in inside]].astype(np.float64)
            response += np.array([center[d] for d in inside]) @ rows
        return response

    def _edit(self, rows: Array64, block: slice, response: Array64 | None) -> Array64:
        if self.sink is not None:
            detector = self.sink.detector.astype(np.float64)
            if response is not None:
                return rows - self.strength * np.outer(detector[block], response)
            center = self.sink.center.astype(np.float64)
            return rows - self.strength * np.outer(
                rows[:, list(self.dimensions)] @ center, detector
            )
        if self.kind == "columns" and self.axis == 1:
            return scale_columns(rows, self.dimensions, self.strength)
        # A gain, a bias, or a linear stored [D, out], whose input columns are rows.
        inside = tuple(d - block.start for d in self.dimensions if block.start <= d < block.stop)
        return scale_entries(rows, inside, self.strength, self.null)


def scale_entries(
    stored: Array64, dimensions: tuple[int, ...], strength: float, null: float
) -> Array64:
    """A gain or bias whose entries in S count 1 - γ times as much.

    stored: [D], or [D, out] for a linear stored that way. In unit-offset norms (null = -1) the
    effective gain 1 + w is scaled, so that strength 1 stores exactly -1.
    """
    edited = stored.copy()
    chosen = list(dimensions)
    edited[chosen] = null + (stored[chosen] - null) * (1.0 - strength)
    return edited


def scale_columns(weight: Array64, dimensions: tuple[int, ...], strength: float) -> Array64:
    """A linear [out, D] whose input columns in S count 1 - γ times as much."""
    edited = weight.copy()
    chosen = list(dimensions)
    edited[:, chosen] = 0.0 + edited[:, chosen] * (1.0 - strength)  # 0.0 +: never a negative zero
    return edited


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis, each of bounded size."""
    width = max(1, int(np.prod(shape[1:])))
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def detector(center: Array64, second_moment: Array64, ridge: float) -> Array64:
    """v = Σ⁻¹c / (cᵀΣ⁻¹c): answers 1 to the sink token and least to ordinary tokens.

    center: c, [D]. second_moment: Σ, mean of x xᵀ over ordinary tokens, [D, D]. ridge: share of
    Σ's mean eigenvalue that is added to its diagonal. The closed form of an MVDR beamformer, and
    of ROME's rank-one edit (the edit is W ← W − γ (W (m ⊙ c)) vᵀ).
    """
    size = len(center)
    loading = ridge * (np.trace(second_moment) / size or 1.0)  # 1: there were no ordinary tokens
    solved = np.linalg.solve(second_moment + loading * np.eye(size), center)
    return solved / (center @ solved)


def make_edits(
    anatomy: Anatomy, mask: Mask, fold: str, sinks: dict[int, SinkDirection] | None = None
) -> tuple[Edit, ...]:
    """The edits that fold a mask into a model; empty at strength 0, which changes no byte.

    Raises Unsupported where the fold would reach more than attention.
    """
    anatomy.require(fold)
    if mask.strength == 0.0:
        return ()
    edits: list[Edit] = []
    for layer in mask.layers:
        sink = sinks[layer] if fold == "sink" and sinks is not None else None
        edits += layer_edits(anatomy, anatomy.at(layer), mask, fold, sink)
    return tuple(edits)


def layer_edits(
    anatomy: Anatomy, found: AttentionInput, mask: Mask, fold: str, sink: SinkDirection | None
) -> list[Edit]:
    """The edits of one target layer."""
    chosen, strength = mask.dimensions[found.layer], mask.strength
    if fold == "norm":
        edits = [Edit(found.gain, found.layer, "gain", chosen, strength, null=anatomy.null_gain)]
        if found.bias:
            edits.append(Edit(found.bias, found.layer, "bias", chosen, strength))
        return edits
    kind = "rank_one" if fold == "sink" else "columns"
    return [
        Edit(name, found.layer, kind, chosen, strength, axis=anatomy.input_axis, sink=sink)
        for name in found.weights
    ]


def pack(values: NDArray[np.float32]) -> str:
    """A float32 vector as base64 of its little-endian bytes, for the manifest."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpack(text: str) -> NDArray[np.float32]:
    """The vector that `pack` wrote; ValueError for anything else."""
    raw = base64.b64decode(text.encode("ascii"), validate=True)
    return np.frombuffer(raw, dtype="<f4").astype(np.float32)
