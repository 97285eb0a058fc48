"""Losses and divergences of several logits, of which a block of words exists at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from surgery.models.ground import HeadBlock
from surgery.models.journey import Batch

Pair = tuple[str, str]


class Headed(Protocol):
    """What gives the blocks of a language-model head."""

    def head_blocks(self) -> Iterator[HeadBlock]:
        """Some words at a time."""


class Run(Protocol):
    """Some sequences that have passed a model's last layer."""

    @property
    def ground(self) -> Headed:
        """What their head's blocks come from; one object for runs that share a head."""

    @property
    def batches(self) -> list[Batch]:
        """Which sequences run together."""

    def logits(self, block: HeadBlock) -> Iterator[torch.Tensor]:
        """Of each batch, the logits of a block of words, [B, T, words]."""


class Distributions:
    """Next-token distributions of several variants at the same tokens, word by word.

    For logits l of p and l' of q, KL(p ‖ q) = Σ p (l − l') − log Z + log Z', so that sums over the
    words suffice: Z of every variant and Σ exp(l) (l − l') of every pair, each relative to the
    largest logit so far.
    """

    def __init__(self, pairs: Sequence[Pair], *, greedy: bool = False) -> None:
        """Nothing is known yet.

        Args:
            pairs: of variants p and q whose KL(p ‖ q) is wanted.
            greedy: whether the likeliest words are wanted.
        """
        self._pairs = pairs
        self._likeliest: dict[str, torch.Tensor] | None = {} if greedy else None
        self._largest: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._crossed: dict[Pair, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}

    def add(self, logits: Mapping[str, torch.Tensor], begin: int, targets: torch.Tensor) -> None:
        """Add the logits of some words.

        Args:
            logits: of each variant, [..., words].
            begin: number of the first of these words.
            targets: the word whose probability is wanted, [...].
        """
        wide = {
            name: values.to(torch.promote_types(values.dtype, torch.float32))
            for name, values in logits.items()
        }
        here = targets - begin
        inside = (here >= 0) & (here < next(iter(wide.values())).shape[-1])
        place = here.clamp(0, next(iter(wide.values())).shape[-1] - 1).unsqueeze(-1)
        for name, values in wide.items():
            found = values.gather(-1, place).squeeze(-1).double()
            if name not in self._targets:
                self._targets[name] = torch.zeros_like(found)
            self._targets[name] = torch.where(inside, found, self._targets[name])
            if self._likeliest is not None:
                self._compete(name, values, begin, self._likeliest)
            self._weigh(name, values, wide)

    def _compete(
        self, name: str, values: torch.Tensor, begin: int, likeliest: dict[str, torch.Tensor]
    ) -> None:
        largest, word = values.max(-1)
        if name in likeliest:
            better = largest > self._largest[name]
            word = torch.where(better, word + begin, likeliest[name])
        else:
            word = word + begin
        likeliest[name] = word

    def _weigh(self, name: str, values: torch.Tensor, all_: Mapping[str, torch.Tensor]) -> None:
        largest = values.amax(-1)
        if name in self._largest:
            known = self._largest[name]
            largest = torch.maximum(largest, known)
            scale = (known.double() - largest.double()).exp()
        else:
            scale = torch.zeros_like(largest, dtype=torch.float64)
        self._largest[name] = largest
        weights = (values - largest.unsqueeze(-1)).exp()
        self._sums[name] = self._sums.get(name, 0.0) * scale + weights.sum(-1, dtype=torch.float64)
        for pair in self._pairs:
            if pair[0] == name:
                crossed = (weights * (values - all_[pair[1]])).sum(-1, dtype=torch.float64)
                self._crossed[pair] = self._crossed.get(pair, 0.0) * scale + crossed

    def _normaliser(self, name: str) -> torch.Tensor:
        return self._largest[name].double() + self._sums[name].log()

    def loss(self, name: str) -> torch.Tensor:
        """Negative log-probability of the targets, nats, [...], float64."""
        return self._normaliser(name) - self._targets[name]

    def greedy(self, name: str) -> torch.Tensor:
        """The likeliest next word, [...]; of several the first."""
        assert self._likeliest is not None
        return self._likeliest[name]

    def divergence(self, pair: Pair) -> torch.Tensor:
        """KL(p ‖ q), nats, [...], float64."""
        p, q = pair
        normalisers = self._normaliser(q) - self._normaliser(p)
        return self._crossed[pair] / self._sums[p] + normalisers


def compare_runs(
    runs: Mapping[str, Run], pairs: Sequence[Pair], *, greedy: bool = False
) -> list[Distributions]:
    """Of each batch, the next-token distributions of runs that have passed the last layer.

    Args:
        runs: of the same sequences in the same batches, by name; their heads have as many words.
        pairs: of names whose divergence is wanted.
        greedy: whether the likeliest words are wanted.
    """
    of_batches = next(iter(runs.values())).batches
    found = [Distributions(pairs, greedy=greedy) for _ in of_batches]
    targets = [_targets(batch) for batch in of_batches]
    grounds = list({id(run.ground): run.ground for run in runs.values()}.values())
    for blocks in zip(*(ground.head_blocks() for ground in grounds), strict=True):
        of_ground = {id(ground): block for ground, block in zip(grounds, blocks, strict=True)}
        logits = zip(*(run.logits(of_ground[id(run.ground)]) for run in runs.values()), strict=True)
        for number, of_batch in enumerate(logits):
            some = dict(zip(runs, of_batch, strict=True))
            found[number].add(some, blocks[0].begin, targets[number])
    return found


def _targets(batch: Batch) -> torch.Tensor:
    """Each position's next token; 0 at the last, whose loss nobody asks for."""
    return torch.nn.functional.pad(batch.ids[:, 1:], (0, 1))
