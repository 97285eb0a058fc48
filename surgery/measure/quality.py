"""The quality gate: what a fold does to a model, measured on text before anything is written."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from surgery.errors import QualityGate
from surgery.folds.base import Fold
from surgery.folds.calibrate import EARLY
from surgery.measure.logits import perplexity
from surgery.measure.stopping import Look
from surgery.measure.trial import VARIANTS, Array64, Sequenced, Trial

logger = logging.getLogger(__name__)

# A fold that is not exact leaves at most this share of the base's distance from its reference.
CLOSED = 0.5
# Nats per token that rounding alone leaves, where the mask itself changes next to nothing.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Measured:
    """One variant of a model on one text.

    Attributes:
        name: "base", "reference" or "folded".
        perplexity: over all predicted tokens.
        against_base: perplexity relative to base, minus 1.
        kl_from_reference: mean KL(reference ‖ variant), nats per position.
        kl_from_base: mean KL(base ‖ variant), likewise.
    """

    name: str
    perplexity: float
    against_base: float
    kl_from_reference: float
    kl_from_base: float


@dataclass(frozen=True)
class Interval:
    """The fold's mean loss minus base's, nats per token.

    Attributes:
        difference: over all predicted tokens.
        low: lower bound of a 95 % interval that holds at every look (`measure.stopping`); None
            where there are too few tokens for one.
        high: upper bound, likewise.
        looks: how often the measurement could have ended.
        decided: whether it ended because the interval lies on one side of the limit.
    """

    difference: float
    low: float | None
    high: float | None
    looks: int
    decided: bool


@dataclass(frozen=True)
class Positions:
    """KL(reference ‖ folded) by position in the sequence, nats.

    Attributes:
        early: mean over the first 256 positions.
        late: mean over the others; None where there are none.
        largest: of any token.
        largest_at: its position.
        largest_token: the token itself.
        longest: tokens of the longest sequence.
    """

    early: float
    late: float | None
    largest: float
    largest_at: int
    largest_token: str
    longest: int


@dataclass(frozen=True)
class Quality:
    """Base, the paper's reference and folded weights on the same tokens.

    Attributes:
        variants: in this order.
        tokens: in all.
        sequences: of these tokens.
        interval: of the difference that the gate judges.
        positions: where the fold differs from the reference.
    """

    variants: tuple[Measured, ...]
    tokens: int
    sequences: int
    interval: Interval
    positions: Positions

    def __getitem__(self, name: str) -> Measured:
        return next(variant for variant in self.variants if variant.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def summary(trial: Trial, found: Look, of: int, limit: float | None, tokenizer: Any) -> Quality:
    """The figures of a trial.

    Args:
        trial: what was measured.
        found: the last look at it.
        of: how many looks there could have been.
        limit: the allowed difference in loss, nats; None where none was asked about.
        tokenizer: the model's own, to name a token.
    """
    sequences = trial.sequences
    tokens = sum(len(one.ids) for one in sequences)
    predicted = tokens - len(sequences)

    def total(values: Iterable[Array64]) -> float:
        return float(sum(one.sum() for one in values))

    def loss(name: str) -> float:
        return total(one.losses[name] for one in sequences)

    def kl(known: str, name: str) -> float:
        if known == name:
            return 0.0
        return total(one.divergences[known, name] for one in sequences) / tokens

    base = loss("base")
    bounds = [value if math.isfinite(value) else None for value in (found.low, found.high)]
    return Quality(
        tuple(
            measured(name, loss(name), base, predicted, kl("reference", name), kl("base", name))
            for name in VARIANTS
        ),
        tokens,
        len(sequences),
        Interval(found.mean, bounds[0], bounds[1], of, limit is not None and found.decides(limit)),
        _positions(sequences, tokenizer),
    )


def _positions(sequences: Sequence[Sequenced], tokenizer: Any) -> Positions:
    found = [one.divergences["reference", "folded"] for one in sequences]
    early = np.concatenate([one[:EARLY] for one in found])
    late = np.concatenate([one[EARLY:] for one in found])
    place = max(range(len(found)), key=lambda number: float(np.nan_to_num(found[number]).max()))
    at = int(np.nan_to_num(found[place]).argmax())
    return Positions(
        float(early.mean()),
        float(late.mean()) if late.size else None,
        float(found[place][at]),
        at,
        tokenizer.decode([sequences[place].ids[at]]),
        max(len(one.ids) for one in sequences),
    )


def measured(
    name: str,
    loss: float,
    base: float,
    predicted: int,
    kl_from_reference: float,
    kl_from_base: float,
) -> Measured:
    """A variant's figures.

    Args:
        name: of the variant.
        loss: of the variant, nats, summed over the predicted tokens.
        base: of the base, likewise.
        predicted: how many tokens these are.
        kl_from_reference: nats per position.
        kl_from_base: nats per position.
    """
    return Measured(
        name=name,
        perplexity=perplexity(loss / predicted),
        against_base=perplexity((loss - base) / predicted) - 1.0,
        kl_from_reference=kl_from_reference,
        kl_from_base=kl_from_base,
    )


def require_quality(
    quality: Quality, fold: Fold, limit: float, better: tuple[str, Measured] | None
) -> None:
    """Raise QualityGate for a fold that is worse than allowed, or is not what it promises.

    Args:
        quality: what was measured.
        fold: that was made.
        limit: the allowed rise of perplexity over base, as a share.
        better: another fold's name and measurement, when it would have passed or done better.
    """
    folded, base, reference = quality["folded"], quality["base"], quality["reference"]
    if not (math.isfinite(folded.perplexity) and folded.against_base <= limit):
        advice = "reduce --rate or --strength, or choose --scope first"
        if better is not None and better[1].perplexity < folded.perplexity:
            name, found = better
            advice = (
                f"--fold {name} measures {found.perplexity:.4g} ({found.against_base:+.1%}) on the "
                "same text"
            )
        raise QualityGate(
            f"the {fold.name} fold raises perplexity from {base.perplexity:.4g} to "
            f"{folded.perplexity:.4g} ({folded.against_base:+.1%}, allowed {limit:+.1%}; the "
            f"paper's reference measures {reference.perplexity:.4g}); nothing was written: "
            f"{advice}, or write it all the same with --force."
        )
    left, gap = folded.kl_from_reference, base.kl_from_reference
    if not fold.exact and not left <= max(CLOSED * gap, ROUNDING):
        raise QualityGate(
            f"the {fold.name} fold is not near the mask that it stands for: it leaves "
            f"KL(reference ‖ folded) at {left:.2g} nats per token, where the base's is {gap:.2g} "
            f"(allowed {CLOSED:.0%} of that); nothing was written: give more --calibration-tokens, "
            "or text like the model's own with --calibration, or write it all the same with "
            "--force."
        )
