"""When enough text has been measured to say on which side of a limit a fold lies.

The mean difference in loss between fold and base is looked at after about 768 tokens, then each
time that half as many have come in addition, and before a long text that costs as much as all
before it. Student's t intervals at every look, each at the level 1 - α / looks, all hold together
with probability 1 - α (Bonferroni's inequality; a group-sequential design as in Jennison and
Turnbull, Group Sequential Methods, 2000, with equal shares of α). So a measurement may end at the
first look whose interval lies wholly on one side of the limit, which looking at plain 95 %
intervals again and again would not allow. Few looks, known beforehand, make this tighter than
sequences that hold at every token.

What is counted as one observation is a sequence, or a run of `RUN` tokens of a longer one: losses
within a text are alike. (SmolLM2 under the norm fold: runs of 64 tokens of one window correlate
with 0.26, which would make intervals a third too short.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from surgery.measure.statistics import LEVEL, ratio

# Tokens before the first look, at least: two or three observations give no usable interval.
FEWEST = 768
# Tokens at a look, of those at the look before.
_GROWTH = 1.5
# Predicted tokens in one observation.
RUN = 256


@dataclass(frozen=True)
class Look:
    """The mean difference in loss so far, nats per token, with its interval.

    Attributes:
        mean: fold minus base.
        low: lower bound of an interval that holds at every look.
        high: upper bound.
    """

    mean: float
    low: float
    high: float

    def decides(self, limit: float) -> bool:
        """Whether the interval lies on one side of a limit, nats; not where it is not finite."""
        return self.high <= limit or self.low > limit


def looks(lengths: Sequence[int], fewest: int = FEWEST) -> list[int]:
    """How many sequences have been measured at each look, the last being all of them.

    Args:
        lengths: of the sequences, in tokens, in the order in which they are measured.
        fewest: tokens before the first look, at least; each later one has half as many more, or
            stands before a sequence as long as all before it.
    """
    found, total, wanted = [], 0, float(fewest)
    for count, (length, following) in enumerate(pairwise(lengths), 1):
        total += length
        if total >= wanted or (total >= fewest and following >= total):
            found.append(count)
            wanted = _GROWTH * total
    return [*found, len(lengths)]


def look(
    base: Sequence[NDArray[np.float64]], folded: Sequence[NDArray[np.float64]], of: int
) -> Look:
    """The mean difference of all that has been measured.

    Args:
        base: losses of each sequence, nats by predicted token.
        folded: likewise.
        of: how many looks there are to be.
    """
    before, after = list(_runs(base)), list(_runs(folded))
    level = 1 - (1 - LEVEL) / of
    sums = [float(run.sum()) for run in before], [float(run.sum()) for run in after]
    if not all(map(math.isfinite, (*sums[0], *sums[1]))):
        return Look(math.nan, -math.inf, math.inf)
    mean, _, low, high = ratio(*sums, [len(run) for run in before], level)
    return Look(mean, low, high)


def _runs(sequences: Sequence[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
    for losses in sequences:
        for begin in range(0, len(losses), RUN):
            yield losses[begin : begin + RUN]
