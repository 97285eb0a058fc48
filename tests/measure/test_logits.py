"""Perplexity and KL divergence of whole logits, against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from surgery.measure.logits import divergence, perplexity

TOKENS, WORDS = 40, 7


def test_divergence_is_the_mean_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, TOKENS, WORDS, generator=generator)
    p, q = (table.double().log_softmax(-1).tolist() for table in (one, other))
    by_token = [
        sum(math.exp(a) * (a - b) for a, b in zip(known, found, strict=True))
        for known, found in zip(p, q, strict=True)
    ]
    assert divergence(one, other) == pytest.approx(sum(by_token) / TOKENS, rel=1e-6)
    assert divergence(one, one) == 0.0


def test_perplexity_is_finite() -> None:
    assert perplexity(math.log(3.0)) == pytest.approx(3.0)
    assert math.isfinite(perplexity(1e6))
