"""Which dimensions of the attention input are masked: the mask set S of each target layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadSettings

SELECTIONS = ("weight", "activation", "random")
SCOPES = ("first", "all")
TOKENS = ("first", "every")


@dataclass(frozen=True)
class Selection:
    """How S is chosen in each target layer.

    Attributes:
        rate: share of the hidden size that is masked, in (0, 1).
        select: "weight" (the largest norm gains, the paper's), "activation" (the sink token's
            largest inputs) or "random".
        strength: γ in x[S] *= 1 - γ.
        seed: of the random choice.
    """

    rate: float = 0.1
    select: str = "weight"
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise BadSettings for values that make no sense whatever the model is."""
        if self.select not in SELECTIONS:
            raise BadSettings(
                f"--select must be one of {', '.join(SELECTIONS)}; not {self.select!r}."
            )
        check_strength(self.strength)
        check_rate(self.rate)
        if self.seed < 0:
            raise BadSettings("--seed must not be negative.")


@dataclass(frozen=True)
class Mask:
    """The mask of the paper's eq. 4 and 5, by target layer.

    dimensions: layer index to the ascending indices of S. strength: γ in x[S] *= 1 - γ.
    """

    hidden_size: int
    select: str
    strength: float
    dimensions: Mapping[int, tuple[int, ...]]

    @property
    def layers(self) -> tuple[int, ...]:
        """Target layers, ascending."""
        return tuple(sorted(self.dimensions))


def check_rate(rate: float) -> None:
    """Raise BadSettings unless 0 < rate < 1."""
    if not 0.0 < rate < 1.0:
        raise BadSettings(f"--rate must lie between 0 and 1 (both excluded); {rate} does not.")


def mask_size(rate: float, hidden_size: int) -> int:
    """k = int(rate * D).

    Raises BadSettings for a rate outside (0, 1) and for one that masks nothing.
    """
    check_rate(rate)
    size = int(rate * hidden_size)
    if size == 0:
        least = math.ceil(1e5 / hidden_size) / 1e5  # rounded up, or it would mask none either
        raise BadSettings(
            f"--rate {rate} masks no dimension of a hidden size of {hidden_size}; "
            f"use at least {least:g}."
        )
    return size


def check_strength(strength: float) -> None:
    """Raise BadSettings unless 0 <= strength <= 1."""
    if not 0.0 <= strength <= 1.0:
        raise BadSettings(f"--strength must lie between 0 and 1; {strength} does not.")


def largest(scores: NDArray[np.floating], size: int) -> tuple[int, ...]:
    """Ascending indices of the `size` largest of |scores|; ties go to the lower index.

    Raises BadSettings where a score is not a number.
    """
    magnitude = np.abs(np.asarray(scores, dtype=np.float64))
    if np.isnan(magnitude).any():
        raise BadSettings("The scores to select dimensions by contain NaN.")
    order = np.argsort(-magnitude, kind="stable")[:size]
    return tuple(sorted(int(index) for index in order))


def random_dimensions(hidden_size: int, size: int, seed: int, layer: int) -> tuple[int, ...]:
    """Ascending indices of a random S (Appendix E's control), fixed by seed and layer alone."""
    generator = np.random.Generator(np.random.PCG64([seed, layer]))
    return tuple(sorted(int(i) for i in generator.choice(hidden_size, size, replace=False)))


def attention_targets(emergence_layer: int, attends: Sequence[bool], scope: str) -> tuple[int, ...]:
    """Target layers of a model in which only some layers attend: the others are skipped.

    attends: per layer, whether it has an attention input. The first target is then the first
    attention that reads the massive activation. Raises BadSettings where none follows.
    """
    after = target_layers(emergence_layer, len(attends), "all")
    attending = tuple(layer for layer in after if attends[layer])
    if not attending:
        raise BadSettings(
            f"No layer after the emergence layer {emergence_layer} has attention, so there is none "
            "to mask."
        )
    return attending if scope == "all" else attending[:1]


def target_layers(emergence_layer: int, depth: int, scope: str) -> tuple[int, ...]:
    """Layers whose attention reads the massive activation: m + 1 alone, or all from m + 1 on.

    Raises BadSettings when no layer follows the emergence layer.
    """
    if not 0 <= emergence_layer < depth - 1:
        raise BadSettings(
            f"The emergence layer {emergence_layer} leaves no later layer to mask in a model with "
            f"layers 0 to {depth - 1}."
        )
    last = depth if scope == "all" else emergence_layer + 2
    return tuple(range(emergence_layer + 1, last))
