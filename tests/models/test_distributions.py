"""Losses and divergences from blocks of words are those from whole logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.models.distributions import Distributions

WORDS = 40
PAIRS = (("p", "q"), ("q", "p"))


def whole(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    known, other = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (known.exp() * (known - other)).sum(-1)


def by_blocks(p: torch.Tensor, q: torch.Tensor, ends: list[int], targets: torch.Tensor):
    found = Distributions(PAIRS)
    for begin, end in zip([0, *ends], [*ends, WORDS], strict=True):
        found.add({"p": p[..., begin:end], "q": q[..., begin:end]}, begin, targets)
    return found


@given(
    seed=st.integers(0, 2**31),
    ends=st.lists(st.integers(1, WORDS - 1), unique=True).map(sorted),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    apart=st.sampled_from([0.0, 1e-3, 1.0, 20.0]),
)
def test_any_cut(seed: int, ends: list[int], scale: float, apart: float) -> None:
    chance = torch.Generator().manual_seed(seed)
    p = scale * torch.randn(2, 3, WORDS, generator=chance)
    q = p + apart * torch.randn(2, 3, WORDS, generator=chance)
    targets = torch.randint(0, WORDS, (2, 3), generator=chance)
    found = by_blocks(p, q, ends, targets)
    for pair, expected in zip(PAIRS, (whole(p, q), whole(q, p)), strict=True):
        torch.testing.assert_close(found.divergence(pair), expected, rtol=1e-4, atol=2e-6 * scale)
    for name, logits in (("p", p), ("q", q)):
        losses = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(found.loss(name), losses, rtol=1e-5, atol=1e-6 * scale)


def test_logits_that_are_not_finite_show() -> None:
    p = torch.zeros(1, WORDS)
    q = p.clone()
    q[0, 7] = float("nan")
    found = by_blocks(p, q, [5, 20], torch.zeros(1, dtype=torch.long))
    assert not found.divergence(("p", "q")).isfinite().any()
    assert not found.loss("q").isfinite().any()
    assert found.loss("p").item() == pytest.approx(torch.tensor(float(WORDS)).log().item())
