"""Logits on text: the one place where losses, perplexities and KL divergences are computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.models.observe import pad

# Logits of one batch stay below about this many numbers.
LOGITS_BUDGET = 64_000_000


def kl(known: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(known ‖ other) in nats, of log-probabilities [..., vocabulary]."""
    return (known.exp() * (known - other)).sum(-1)


def divergence(known: torch.Tensor, other: torch.Tensor) -> float:
    """KL(known ‖ other) in nats per token, of logits [tokens, vocabulary]; at least in float32."""
    dtype = torch.promote_types(known.dtype, torch.float32)
    return float(
        kl(known.to(dtype).log_softmax(-1), other.to(dtype).log_softmax(-1)).double().mean()
    )


def perplexity(loss: float) -> float:
    """e to the mean loss (nats); finite however bad the model is."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Batch:
    """Padded sequences on the model's device. real: bool, False at padding. targets: next tokens.

    All are [sequences, longest], the targets one token shorter.
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
        """The model's log-probabilities in float32, [sequences, longest, vocabulary].

        vocabulary: words to leave out beyond, where another model has fewer.
        """
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return logits[..., :vocabulary].float().log_softmax(-1)

    def token_losses(self, logs: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each next token, nats, [sequences, longest - 1]."""
        return -logs[:, :-1].gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)

    def loss(self, logs: torch.Tensor) -> float:
        """Negative log-likelihood of all predicted tokens, nats, summed in float64."""
        return float(self.token_losses(logs)[self.real[:, 1:]].double().sum())

    def divergence(self, known: torch.Tensor, logs: torch.Tensor) -> float:
        """KL(known ‖ logs) in nats, summed over the positions in float64."""
        if known is logs:
            return 0.0
        # One sequence at a time: whole batches would need three times their memory here.
        return sum(
            float(kl(p, q)[real].double().sum())
            for p, q, real in zip(known, logs, self.real, strict=True)
        )

    def divergence_by_position(self, known: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
        """KL(known ‖ logs) in nats, summed over the sequences, [longest], float64."""
        return sum(
            kl(p, q).double().masked_fill(~real, 0.0)
            for p, q, real in zip(known, logs, self.real, strict=True)
        )


def make_batches(
    sequences: Sequence[Sequence[int]], vocabulary: int, device: torch.device
) -> Iterator[Batch]:
    """Sequences of similar length together, on a device."""
    for batch in batches(sequences, vocabulary):
        ids, mask = (part.to(device) for part in pad(batch))
        yield Batch(ids, mask, mask.bool(), ids[:, 1:])


def batches(sequences: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[Sequence[int]]]:
    """Sequences of similar length together, as many as the logits' memory allows."""
    budget = max(1, LOGITS_BUDGET // vocabulary)
    batch: list[Sequence[int]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
