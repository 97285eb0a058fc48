"""A detector with a null on secondary sinks, where that saves more than it costs."""

from __future__ import annotations

import numpy as np
import pytest

from surgery.folds.calibrate import Answers, Tokens, direction
from surgery.method.algebra import detector

WIDTH, ORDINARY, SECOND = 48, 3000, 40


def tokens(alike: float, second: int = SECOND, seed: int = 0) -> Tokens:
    """Ordinary tokens, and secondary sinks whose cosine to the sink is about `alike`."""
    chance = np.random.default_rng(seed)
    center = chance.normal(size=WIDTH)
    center *= 10 / np.linalg.norm(center)
    other = chance.normal(size=WIDTH)
    other -= center * (other @ center) / (center @ center)
    other *= 10 / np.linalg.norm(other)
    secondary = alike * center + np.sqrt(1 - alike**2) * other
    x = np.concatenate(
        [
            chance.normal(size=(ORDINARY, WIDTH)),
            secondary + 0.2 * chance.normal(size=(second, WIDTH)),
        ]
    )
    order = chance.permutation(len(x))
    kinds = (np.arange(len(x)) >= ORDINARY)[order]
    first = center + 0.01 * chance.normal(size=(20, WIDTH))
    return Tokens(first, x[order], kinds, np.arange(len(x)) % 2048)


@pytest.mark.parametrize("alike", [0.5, 0.9])
def test_a_null_answers_to_no_secondary_sink(alike: float) -> None:
    found, leak = direction(tokens(alike), range(5), nulled=True)
    _, plain = direction(tokens(alike), range(5))
    assert leak.secondary_tokens == plain.secondary_tokens == SECOND
    assert leak.secondary_rms < 0.1
    assert leak.secondary_rms < plain.secondary_rms
    assert leak.ordinary_rms > plain.ordinary_rms  # which is what it costs
    assert leak.sink_smallest == pytest.approx(1, abs=0.02)
    again = Answers.of(tokens(alike), found.detector).leak
    assert again.secondary_rms == leak.secondary_rms


def test_a_few_massive_tokens_make_no_null() -> None:
    few = tokens(0.5, second=3)
    one, other = direction(few, range(5), nulled=True), direction(few, range(5))
    assert (one[0].detector == other[0].detector).all()


def test_the_constraints_hold_to_rounding() -> None:
    found = tokens(0.7)
    center, other = found.first.mean(0), found.others[found.secondary].mean(0)
    moment = found.others.T @ found.others / len(found.others)
    v = detector(center, moment, 1e-3, other)
    assert v @ center == pytest.approx(1, abs=1e-10)
    assert v @ other == pytest.approx(0, abs=1e-10)
    assert detector(center, moment, 1e-3) @ center == pytest.approx(1, abs=1e-10)
