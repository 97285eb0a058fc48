"""Logits on text: the one place where losses, perplexities and KL divergences are computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from surgery.models.observe import pad

logger = logging.getLogger(__name__)

# What a variant of a model runs within: edited weights, hooks, or nothing (`nullcontext`).
Context = Callable[[], AbstractContextManager[Any]]

# Tokens whose distributions are compared at a time.
_ROWS = 16
# Logits of one batch stay below about this many numbers.
LOGITS_BUDGET = 64_000_000


def kl(known: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(known ‖ other) in nats, [...], of log-probabilities [..., vocabulary]."""
    return (known.exp() * (known - other)).sum(-1)


def divergence(known: torch.Tensor, other: torch.Tensor) -> float:
    """KL(known ‖ other) in nats per token, of logits [tokens, vocabulary].

    In float64, which tells rounding from a difference; a few tokens at a time, for the memory.
    """
    rows = [
        kl(one.double().log_softmax(-1), two.double().log_softmax(-1))
        for one, two in zip(known.split(_ROWS), other.split(_ROWS), strict=True)
    ]
    return float(torch.cat(rows).mean())


def perplexity(loss: float) -> float:
    """e to the mean loss (nats); finite however bad the model is."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Batch:
    """Padded sequences on a model's device.

    Attributes:
        ids: token ids, [sequences, longest].
        mask: 1 at tokens, 0 at padding, [sequences, longest].
        real: the same as bool.
        targets: each position's next token, [sequences, longest - 1].
    """

    ids: torch.Tensor
    mask: torch.Tensor
    real: torch.Tensor
    targets: torch.Tensor

    @property
    def positions(self) -> int:
        """Tokens that are not padding."""
        return int(self.real.sum())

    @property
    def predicted(self) -> int:
        """Tokens that some other token predicts."""
        return int(self.real[:, 1:].sum())

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        parts = (self.ids, self.mask, self.real, self.targets)
        return Batch(*(part.to(device) for part in parts))

    def log_probabilities(self, model: Any, vocabulary: int | None = None) -> torch.Tensor:
        """A model's log-probabilities, [sequences, longest, vocabulary].

        In float32 whatever the model computes in: the logarithms of the rarest words differ by
        less than bfloat16 can tell apart.

        Args:
            model: run on the batch as it is, without a cache.
            vocabulary: words beyond this number are left out, where another model has fewer.
        """
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return logits[..., :vocabulary].float().log_softmax(-1)

    def token_losses(self, logs: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each next token, nats, [sequences, longest - 1], float64.

        0 where the next token is padding. Float64, because thousands are summed and variants
        differ little.
        """
        losses = -logs[:, :-1].gather(-1, self.targets.unsqueeze(-1)).squeeze(-1).double()
        return losses.masked_fill(~self.real[:, 1:], 0.0)

    def token_divergences(self, known: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
        """KL(known ‖ logs) at each position, nats, [sequences, longest], float64; 0 at padding."""
        # One sequence at a time: whole batches would need three times their memory here.
        rows = [kl(p, q).double() for p, q in zip(known, logs, strict=True)]
        return torch.stack(rows).masked_fill(~self.real, 0.0)

    def loss(self, logs: torch.Tensor) -> float:
        """Negative log-likelihood of all predicted tokens, nats, summed."""
        return float(self.token_losses(logs)[self.real[:, 1:]].sum())

    def divergence(self, known: torch.Tensor, logs: torch.Tensor) -> float:
        """KL(known ‖ logs) in nats, summed over the positions."""
        if known is logs:
            return 0.0
        rows = zip(self.token_divergences(known, logs), self.real, strict=True)
        return sum(float(row[real].sum()) for row, real in rows)


def make_batches(
    sequences: Sequence[Sequence[int]], vocabulary: int, device: torch.device
) -> Iterator[Batch]:
    """Sequences of similar length together, as many as the logits' memory allows.

    Args:
        sequences: token ids.
        vocabulary: words of the model, which decides how many tokens fit.
        device: where the batches are put.
    """
    budget = max(1, LOGITS_BUDGET // vocabulary)
    waiting: list[Sequence[int]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if waiting and (len(waiting) + 1) * len(waiting[0]) > budget:
            yield _batch(waiting, device)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield _batch(waiting, device)


def _batch(sequences: Sequence[Sequence[int]], device: torch.device) -> Batch:
    ids, mask = (part.to(device) for part in pad(sequences))
    logger.debug("a batch of %d sequences, %d tokens long", *ids.shape)
    return Batch(ids, mask, mask.bool(), ids[:, 1:])
