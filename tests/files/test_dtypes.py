"""Rounding to a stored format happens once: against every value the format has, in fractions."""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from surgery.files import dtypes

NARROW = ["F16", "BF16", "F8_E4M3", "F8_E5M2"]
# Finite for the format's own reason: E4M3 spends the pattern above its largest value on NaN.
LARGEST = {
    "F16": 65504.0,
    "BF16": 2.0**127 * (2 - 2.0**-7),
    "F8_E4M3": 448.0,
    "F8_E5M2": 57344.0,
    "F32": float(np.finfo(np.float32).max),
}
narrow = pytest.mark.parametrize("name", NARROW)


def unsigned(name: str) -> type:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtypes.FLOATS[name].itemsize]


@cache
def ladder(name: str) -> list[Fraction]:
    """Every value of a narrow format from 0 to one step beyond its largest; index = bit pattern."""
    bits = 8 * dtypes.FLOATS[name].itemsize
    patterns = np.arange(2 ** (bits - 1), dtype=unsigned(name))
    values = patterns.view(dtypes.FLOATS[name])
    with np.errstate(invalid="ignore"):
        finite = [Fraction(float(value)) for value in values[np.isfinite(values)]]
    assert finite[-1] == Fraction(LARGEST[name])
    return [*finite, 2 * finite[-1] - finite[-2]]


def exactly(value: float, name: str) -> float:
    """Nearest value of a format, ties to the even bit pattern, by fractions; inf beyond the end."""
    steps = ladder(name)
    size = Fraction(abs(value))
    if size >= steps[-1]:
        found = len(steps) - 1
    else:
        below = bisect_right(steps, size) - 1
        half = (steps[below] + steps[below + 1]) / 2
        found = below if size < half or (size == half and below % 2 == 0) else below + 1
    nearest = math.inf if found == len(steps) - 1 else float(steps[found])
    return math.copysign(nearest, value)


def check(values: np.ndarray, name: str) -> None:
    rounded = dtypes.round_once(values, name)
    assert rounded.dtype == dtypes.FLOATS[name]
    found = rounded.astype(np.float64)
    expected = np.array([exactly(float(value), name) for value in values])
    beyond = np.isinf(expected)
    # Where a format has no infinity it says NaN; either way the value is refused later.
    assert not np.isfinite(found[beyond]).any()
    np.testing.assert_array_equal(found[~beyond], expected[~beyond])
    np.testing.assert_array_equal(np.signbit(found[~beyond]), np.signbit(expected[~beyond]))


def finite_doubles(largest: float = 1e308) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(
        np.float64, 40, elements=st.floats(-largest, largest, allow_nan=False, allow_infinity=False)
    )


@narrow
@given(values=st.one_of(finite_doubles(), finite_doubles(1e5), finite_doubles(2.0)))
def test_any_double(name: str, values: np.ndarray) -> None:
    check(values, name)


@narrow
@given(data=st.data())
def test_near_midpoints(name: str, data: st.DataObject) -> None:
    """Midpoints of neighbours and values a hair (in float32, often nothing) away from them."""
    steps = ladder(name)
    index = data.draw(st.lists(st.integers(0, len(steps) - 2), min_size=1, max_size=20))
    middle = np.array([float((steps[i] + steps[i + 1]) / 2) for i in index])
    hair = data.draw(st.sampled_from([2.0**-52, 2.0**-40, 2.0**-30, 2.0**-26, 2.0**-20]))
    values = np.concatenate([middle, middle * (1 + hair), middle * (1 - hair)])
    check(np.concatenate([values, -values]), name)


@narrow
def test_every_midpoint_of_the_small_formats(name: str) -> None:
    steps = ladder(name)
    some = range(0, len(steps) - 1, max(1, len(steps) // 500))
    middle = np.array([float((steps[i] + steps[i + 1]) / 2) for i in some])
    check(np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)]), name)


@pytest.mark.parametrize(
    ("value", "correct"),
    [
        (1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-7),  # above a tie that float32 rounds down to
        (1 + 3 * 2.0**-8 - 2.0**-40, 1 + 2.0**-7),  # below a tie that float32 rounds up to
        (-(1 + 2.0**-8 + 2.0**-40), -(1 + 2.0**-7)),
        (1 + 2.0**-8, 1.0),  # a true tie goes to even
        (1 + 3 * 2.0**-8, 1 + 2.0**-6),
        (2.0**-134 + 2.0**-170, 2.0**-133),  # at the smallest subnormal
        (2.0**-134, 0.0),
        (1e-300, 0.0),
    ],
)
def test_double_rounding(value: float, correct: float) -> None:
    values = np.array([value])
    assert float(dtypes.round_once(values, "BF16")[0]) == correct
    check(values, "BF16")


def test_these_ties_are_where_rounding_twice_errs() -> None:
    """Otherwise the test above would show nothing."""
    values = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40])
    twice = values.astype(np.float32).astype(dtypes.FLOATS["BF16"])
    once = dtypes.round_once(values, "BF16")
    assert (twice.astype(float) != once.astype(float)).all()


@given(values=st.one_of(finite_doubles(), finite_doubles(1e30), finite_doubles(1e-38)))
def test_float32(values: np.ndarray) -> None:
    """No other float32 lies nearer."""
    found = dtypes.round_once(values, "F32")
    assert found.dtype == np.float32
    for value, got in zip(values.tolist(), found, strict=True):
        if math.isinf(got):
            assert abs(value) > LARGEST["F32"]
            continue
        error = abs(Fraction(value) - Fraction(float(got)))
        for toward in (-np.inf, np.inf):
            other = float(np.nextafter(got, np.float32(toward)))
            if math.isfinite(other):
                distance = abs(Fraction(value) - Fraction(other))
                even = int(got.view(np.uint32)) % 2 == 0
                assert error < distance or (error == distance and even)


@given(values=finite_doubles())
def test_float64_is_left_alone(values: np.ndarray) -> None:
    assert dtypes.round_once(values, "F64").tobytes() == values.tobytes()


@narrow
def test_stored_values_round_to_themselves(name: str) -> None:
    """Reading and writing a tensor back changes no bit of it."""
    kind = unsigned(name)
    patterns = np.arange(np.iinfo(kind).max + 1, dtype=np.uint32).astype(kind)
    stored = patterns.view(dtypes.FLOATS[name])
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(stored)
    again = dtypes.round_once(stored[finite].astype(np.float64), name).view(kind)
    np.testing.assert_array_equal(again, patterns[finite])


@pytest.mark.parametrize("name", [*NARROW, "F32"])
def test_too_large_is_not_finite(name: str) -> None:
    """Whatever does not fit is caught by asking whether the result is finite."""
    values = np.array([LARGEST[name], LARGEST[name] * 1.5, -LARGEST[name] * 4])
    with np.errstate(all="raise"):  # and without a word from numpy, which the user would see
        found = dtypes.round_once(values, name)
    assert found[0] == LARGEST[name]
    assert not np.isfinite(found[1:]).any()


@pytest.mark.parametrize("name", [*NARROW, "F32", "F64"])
def test_all_finite(name: str) -> None:
    kind = dtypes.FLOATS[name]
    with np.errstate(all="raise"):
        assert dtypes.all_finite(np.array([1.0, -2.0, 0.0], dtype=kind))
        assert not dtypes.all_finite(np.array([1.0, np.nan], dtype=kind))


def test_signalling_nan_is_found_in_silence() -> None:
    stored = np.array([0x3F80, 0x7F81], dtype=np.uint16).view(dtypes.FLOATS["BF16"])
    with np.errstate(all="raise"):
        assert not dtypes.all_finite(stored)


def test_decode() -> None:
    raw = np.arange(6, dtype=np.float32).tobytes()
    assert dtypes.decode(raw, "F32", (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert dtypes.decode(b"\x80\x3f\x00\xc0", "BF16", (2,)).tolist() == [1.0, -2.0]


def test_tables_agree() -> None:
    assert set(dtypes.FLOATS) <= set(dtypes.BITS)
    for name, dtype in dtypes.FLOATS.items():
        assert dtypes.BITS[name] == 8 * dtype.itemsize
        assert dtypes.is_float(name)
    assert not dtypes.is_float("I8")
    assert not dtypes.is_float("F4")
