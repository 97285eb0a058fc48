"""Paired statistics: what a difference between two models on the same documents is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from surgery.errors import BadSettings

LEVEL = 0.95
BETTER, WORSE, NONE = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Score:
    """A mean over documents.

    Attributes:
        mean: of their scores.
        standard_error: NaN for a single document.
        n: documents.
    """

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Variant minus base, paired by document.

    Attributes:
        n: documents.
        difference: mean of the documents' differences.
        standard_error: of that mean.
        low: lower bound of its 95 % confidence interval, by Student's t.
        high: upper bound.
        gained: documents on which the variant scores above the base.
        lost: documents on which it scores below.
        p_discordant: exact two-sided binomial probability of so uneven a split, which for 0/1
            scores is McNemar's exact test.
        verdict: "better", "worse" or "no difference shown".
    """

    n: int
    difference: float
    standard_error: float
    low: float
    high: float
    gained: int
    lost: int
    p_discordant: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def score(values: Sequence[float]) -> Score:
    """Mean of per-document scores with its standard error, s / sqrt(n)."""
    found = np.asarray(values, dtype=np.float64)
    spread = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return Score(float(found.mean()), float(spread), len(found))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: p that `gained` of the discordant pairs are so by chance.

    1 where no pair is discordant.
    """
    from scipy.stats import binomtest  # an extra

    discordant = gained + lost
    return float(binomtest(gained, discordant, 0.5).pvalue) if discordant else 1.0


def paired(
    base: Sequence[float], variant: Sequence[float], *, higher_is_better: bool = True
) -> Difference:
    """The difference of two models' scores on the same documents, in the same order.

    The verdict needs the confidence interval to leave out 0 and, where all scores are 0 or 1, the
    exact test to agree: with few discordant documents the interval alone claims too much.

    Args:
        base: a score per document.
        variant: likewise.
        higher_is_better: whether these are scores, not errors.

    Raises:
        BadSettings: for lists that cannot be paired.
    """
    if len(base) != len(variant) or not len(base):
        raise BadSettings("Scores can be paired only over the same documents, at least one.")
    before, after = np.asarray(base, dtype=np.float64), np.asarray(variant, dtype=np.float64)
    differences = after - before
    mean, n = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    low, high = interval(mean, error, n - 1)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    chance = mcnemar(gained, lost)
    binary = set(np.unique(before)) | set(np.unique(after)) <= {0.0, 1.0}
    shown = not binary or chance < 1 - LEVEL
    return Difference(
        n, mean, error, low, high, gained, lost, chance,
        verdict(low, high, higher_is_better) if shown else NONE,
    )  # fmt: skip


def ratio(
    base: Sequence[float],
    variant: Sequence[float],
    sizes: Sequence[int],
    level: float = LEVEL,
) -> tuple[float, float, float, float]:
    """Difference per unit of totals over clusters.

    Tokens of one sequence are not independent, so the sequences are what is sampled: a ratio
    estimator with the usual linearised variance, which is the paired t-interval when all sequences
    are of one size.

    Args:
        base: each sequence's summed loss, nats.
        variant: likewise.
        sizes: each sequence's number of tokens.
        level: of confidence.

    Returns:
        Mean and standard error, nats per token, and the interval's bounds.
    """
    differences = np.asarray(variant, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    counts, n = np.asarray(sizes, dtype=np.float64), len(sizes)
    mean = float(differences.sum() / counts.sum())
    error = math.nan
    if n > 1:
        residuals = differences - mean * counts
        error = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(counts.sum())
    return mean, error, *interval(mean, error, n - 1, level)


def interval(mean: float, error: float, freedom: int, level: float = LEVEL) -> tuple[float, float]:
    """Student's t confidence interval; unbounded where the error is not known.

    What `scipy.stats.ttest_rel` gives, which has no interval for a ratio, and for a single document
    NaN and warnings in place of an interval that says nothing.
    """
    from scipy.stats import t  # takes half a second

    if not math.isfinite(error) or freedom < 1:
        return -math.inf, math.inf
    reach = float(t.ppf(0.5 + level / 2, freedom)) * error
    return mean - reach, mean + reach


def verdict(low: float, high: float, higher_is_better: bool) -> str:
    """One word about an interval of differences: does it leave out 0, and on which side?"""
    if low <= 0.0 <= high:
        return NONE
    return BETTER if (low > 0.0) == higher_is_better else WORSE


def over_seeds(means: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) of a task's score over seeds; no deviation for one."""
    found = np.asarray(means, dtype=np.float64)
    return float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None
