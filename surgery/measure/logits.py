"""Whole logits: perplexity and KL divergence.

What exists a block of words at a time is in `surgery.models.distributions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

# What a variant of a model runs within: edited weights, hooks, or nothing (`nullcontext`).
Context = Callable[[], AbstractContextManager[Any]]

# Tokens whose distributions are compared at a time.
_ROWS = 16


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
