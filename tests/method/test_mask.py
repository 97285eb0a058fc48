"""Which dimensions and layers are masked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from surgery.errors import BadSettings
from surgery.method.mask import (
    Mask,
    check_strength,
    largest,
    mask_size,
    random_dimensions,
    target_layers,
)


def test_ties_go_to_the_lower_index() -> None:
    assert largest(np.array([1.0, 3.0, 3.0, 3.0, 2.0]), 2) == (1, 2)
    assert largest(np.zeros(5), 3) == (0, 1, 2)
    assert largest(np.array([2.0, -2.0, 2.0]), 2) == (0, 1)


def test_magnitude_counts_not_sign() -> None:
    assert largest(np.array([1.0, -5.0, 2.0, 4.0]), 2) == (1, 3)
    assert largest(np.array([-np.inf, 1.0, 2.0]), 1) == (0,)


@given(
    scores=hnp.arrays(np.float64, st.integers(1, 40), elements=st.integers(-4, 4).map(float)),
    data=st.data(),
)
def test_largest_is_the_definition(scores: np.ndarray, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(scores)))
    ranked = sorted(range(len(scores)), key=lambda index: (-abs(scores[index]), index))
    assert largest(scores, size) == tuple(sorted(ranked[:size]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_is_refused(dtype: type) -> None:
    with pytest.raises(BadSettings, match="NaN"):
        largest(np.array([1.0, np.nan], dtype=dtype), 1)


@pytest.mark.parametrize(
    ("rate", "hidden_size", "size"),
    [(0.1, 576, 57), (0.1, 2560, 256), (0.5, 3, 1), (0.999, 64, 63), (0.29, 100, 28), (0.1, 10, 1)],
)
def test_size_is_the_integer_part(rate: float, hidden_size: int, size: int) -> None:
    """0.29 * 100 is 28.999… in binary; the definition is int(rate * D), and so it stays."""
    assert mask_size(rate, hidden_size) == int(rate * hidden_size) == size


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_rate_outside(rate: float) -> None:
    with pytest.raises(BadSettings, match="between 0 and 1"):
        mask_size(rate, 64)


@pytest.mark.parametrize(("rate", "hidden_size"), [(0.01, 64), (1e-9, 4096), (0.0156, 64)])
def test_rate_that_masks_nothing(rate: float, hidden_size: int) -> None:
    with pytest.raises(BadSettings, match=f"masks no dimension of a hidden size of {hidden_size}"):
        mask_size(rate, hidden_size)


def test_the_advised_rate_masks_something() -> None:
    for hidden_size in range(2, 20_000, 7):
        with pytest.raises(BadSettings) as refused:
            mask_size(1e-6, hidden_size)
        advised = float(str(refused.value).rsplit(" ", 1)[1].rstrip("."))
        assert mask_size(advised, hidden_size) >= 1


@pytest.mark.parametrize("strength", [-0.01, 1.01, math.nan, math.inf])
def test_strength_outside(strength: float) -> None:
    with pytest.raises(BadSettings, match="--strength"):
        check_strength(strength)


def test_strength_inside() -> None:
    for strength in (0.0, 0.5, 1.0):
        check_strength(strength)


@given(
    seed=st.integers(0, 2**32),
    layer=st.integers(0, 200),
    hidden_size=st.integers(2, 300),
    data=st.data(),
)
def test_random_dimensions(seed: int, layer: int, hidden_size: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, hidden_size))
    found = random_dimensions(hidden_size, size, seed, layer)
    assert found == random_dimensions(hidden_size, size, seed, layer)
    assert len(set(found)) == size
    assert list(found) == sorted(found)
    assert 0 <= min(found) <= max(found) < hidden_size


def test_random_dimensions_depend_on_seed_and_layer() -> None:
    base = random_dimensions(256, 25, 0, 7)
    assert base != random_dimensions(256, 25, 1, 7)
    assert base != random_dimensions(256, 25, 0, 8)
    assert random_dimensions(256, 25, 7, 0) != base  # the pair, not the sum


def test_random_dimensions_are_the_same_everywhere() -> None:
    """A manifest's seed must mean the same on another machine and in another year."""
    assert random_dimensions(64, 6, 0, 4) == (14, 26, 28, 50, 52, 63)


def test_random_dimensions_reach_everything() -> None:
    counts = np.zeros(20)
    for seed in range(400):
        counts[list(random_dimensions(20, 5, seed, 3))] += 1
    assert counts.sum() == 2000
    assert counts.min() > 60
    assert counts.max() < 140


@pytest.mark.parametrize(
    ("emergence", "depth", "first", "every"),
    [(6, 36, (7,), tuple(range(7, 36))), (0, 2, (1,), (1,)), (34, 36, (35,), (35,))],
)
def test_target_layers(
    emergence: int, depth: int, first: tuple[int, ...], every: tuple[int, ...]
) -> None:
    assert target_layers(emergence, depth, "first") == first
    assert target_layers(emergence, depth, "all") == every


@pytest.mark.parametrize(("emergence", "depth"), [(7, 8), (8, 8), (-1, 8), (0, 1)])
def test_no_layer_to_mask(emergence: int, depth: int) -> None:
    for scope in ("first", "all"):
        with pytest.raises(BadSettings, match="no later layer"):
            target_layers(emergence, depth, scope)


def test_layers_of_a_mask_ascend() -> None:
    mask = Mask(8, "weight", 1.0, {9: (0,), 2: (1,), 5: (2,)})
    assert mask.layers == (2, 5, 9)
