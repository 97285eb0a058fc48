"""The mask as algebra on weights: pure functions over float64 arrays.

x is the attention input, [tokens, D]; g the effective gain of the norm that makes it; W the weight
of a linear that reads it, [out, D]; S the masked dimensions; γ the strength of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array64 = NDArray[np.float64]


def scale_entries(
    stored: Array64, dimensions: Sequence[int], strength: float, null: float
) -> Array64:
    """A gain or bias whose entries in S count 1 - γ times as much (eq. 5, seen from the norm).

    Args:
        stored: [D], or [D, out] for a linear that is stored that way.
        dimensions: S.
        strength: γ.
        null: the stored value that means zero. In unit-offset norms it is -1: the effective gain
            1 + w is scaled, so that strength 1 stores exactly -1.
    """
    edited = stored.copy()
    chosen = list(dimensions)
    edited[chosen] = null + (stored[chosen] - null) * (1.0 - strength)
    return edited


def scale_columns(weight: Array64, dimensions: Sequence[int], strength: float) -> Array64:
    """A linear [out, D] whose input columns in S count 1 - γ times as much."""
    edited = weight.copy()
    chosen = list(dimensions)
    edited[:, chosen] = 0.0 + edited[:, chosen] * (1.0 - strength)  # 0.0 +: never a negative zero
    return edited


def detector(
    center: Array64, second_moment: Array64, ridge: float, null: Array64 | None = None
) -> Array64:
    """v = Σ⁻¹C (CᵀΣ⁻¹C)⁻¹e₁: answers 1 to the sink token and least to ordinary tokens.

    C is [c] alone, or [c, c₂] for a detector that answers 0 to secondary sinks. The closed form of
    an MVDR beamformer (with c₂, a linearly constrained one), and of ROME's rank-one edit (the edit
    is W ← W − γ (W (m ⊙ c)) vᵀ).

    Args:
        center: c, the sink token's mean attention input, [D].
        second_moment: Σ, the mean of x xᵀ over ordinary tokens, [D, D].
        ridge: share of Σ's mean eigenvalue that is added to its diagonal: there may be fewer tokens
            than dimensions, and then Σ alone has no inverse.
        null: c₂, the mean attention input of secondary sinks, [D]; not parallel to c.
    """
    size = len(center)
    loading = ridge * (np.trace(second_moment) / size or 1.0)  # 1: there were no ordinary tokens
    columns = center[:, None] if null is None else np.stack([center, null], axis=1)
    solved = np.linalg.solve(second_moment + loading * np.eye(size), columns)
    first = np.zeros(columns.shape[1])
    first[0] = 1.0
    found: Array64 = np.asarray(solved @ np.linalg.solve(columns.T @ solved, first))
    return found
