"""The gate ends when it is clear on which side of the limit a fold lies, and is rarely wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from surgery.measure.stopping import RUN, Look, look, looks

LIMIT = math.log(1.1)
Array64 = NDArray[np.float64]


def test_looks() -> None:
    assert looks([256] * 16) == [3, 5, 8, 12, 16]
    assert looks([2048, *[256] * 8]) == [1, 5, 9]
    assert looks([100]) == [1]
    assert looks([300, 300]) == [2]
    # Before a long text that costs as much as all before it.
    assert looks([*[256] * 4, 2048]) == [3, 4, 5]


def sequences(
    chance: np.random.Generator, mean: float, number: int, kind: str
) -> tuple[list[Array64], list[Array64]]:
    """Losses of base and fold: what differs is heavy-tailed, and alike within a sequence."""
    before, after = [], []
    for _ in range(number):
        base = chance.gamma(1.2, 2.5, 255)
        if kind == "normal":
            change = chance.normal(0, 0.4, 255)
        elif kind == "heavy":
            change = 0.25 * chance.standard_t(3, 255)
        elif kind == "alike":  # a sequence has a difference of its own
            change = chance.normal(0, 0.4, 255) + chance.normal(0, 0.04)
        else:  # few tokens suffer, and much
            change = np.where(chance.random(255) < 0.02, chance.exponential(2.0, 255), 0.0) - 0.04
        before.append(base)
        after.append(base + mean + change)
    return before, after


def verdict(before: list[Array64], after: list[Array64]) -> tuple[int, int]:
    """-1 for a pass, 1 for a refusal, 0 where no look decides; and the sequences it took."""
    ends = looks([len(one) + 1 for one in before])
    for end in ends:
        found = look(before[:end], after[:end], len(ends))
        if found.decides(LIMIT):
            return (1 if found.low > LIMIT else -1), end
    return 0, ends[-1]


@pytest.mark.parametrize("kind", ["normal", "heavy", "alike", "few"])
def test_at_the_limit_few_verdicts(kind: str) -> None:
    """A fold exactly at the limit: at most 5 % of all runs end with a verdict, of either kind."""
    chance = np.random.default_rng(3)
    decided = [verdict(*sequences(chance, LIMIT, 16, kind))[0] for _ in range(600)]
    # Three standard deviations of a share of 5 % among 600.
    assert np.mean([one != 0 for one in decided]) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


@pytest.mark.parametrize(("mean", "expected"), [(0.0, -1), (0.3, 1)])
def test_clear_cases_end_early_and_rightly(mean: float, expected: int) -> None:
    chance = np.random.default_rng(4)
    found = [verdict(*sequences(chance, mean, 16, "normal")) for _ in range(200)]
    assert all(side == expected for side, _ in found)
    assert np.mean([taken for _, taken in found]) < 8


def test_looking_again_and_again_at_plain_intervals_would_be_wrong() -> None:
    """What the levels are for: with 95 % at every look, more than 5 % end with a verdict."""
    chance = np.random.default_rng(5)

    def plain() -> bool:
        before, after = sequences(chance, LIMIT, 16, "normal")
        ends = looks([256] * 16)
        return any(look(before[:end], after[:end], 1).decides(LIMIT) for end in ends)

    assert np.mean([plain() for _ in range(600)]) > 0.08


def test_without_an_interval_nothing_is_decided() -> None:
    few = look([np.zeros(RUN)], [np.ones(RUN)], 1)
    assert (few.mean, few.low, few.high) == (1.0, -math.inf, math.inf)
    assert not few.decides(LIMIT)
    broken = look([np.zeros(2 * RUN)], [np.full(2 * RUN, math.nan)], 1)
    assert not broken.decides(LIMIT)
    assert Look(0.0, -0.1, LIMIT).decides(LIMIT)
    assert not Look(LIMIT, LIMIT - 0.01, LIMIT + 0.01).decides(LIMIT)
