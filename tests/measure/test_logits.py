"""The one place for losses and divergences: against loops over tokens, and with padding."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from surgery.measure.logits import Batch, divergence, make_batches, perplexity

WORDS = 7
SEQUENCES = [[1, 2, 3, 4, 5], [6, 0, 2], [3, 3, 3, 1]]


class Table(torch.nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self, seed: int, words: int = WORDS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(WORDS, words, generator=generator)

    def forward(self, input_ids: torch.Tensor, **_options: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def batch() -> Batch:
    (found,) = make_batches(SEQUENCES, WORDS, torch.device("cpu"))
    return found


def by_hand(table: Table) -> list[list[float]]:
    return table.table.double().log_softmax(-1).tolist()


def test_loss_is_the_sum_over_next_tokens(batch: Batch) -> None:
    model = Table(0)
    logs = by_hand(model)
    expected = sum(-logs[a][b] for one in SEQUENCES for a, b in pairwise(one))
    found = batch.log_probabilities(model)
    assert batch.loss(found) == pytest.approx(expected, rel=1e-6)
    assert float(batch.token_losses(found).sum()) == pytest.approx(expected, rel=1e-6)
    assert (batch.positions, batch.predicted) == (12, 9)


def test_divergence_is_the_sum_over_tokens(batch: Batch) -> None:
    one, other = Table(0), Table(1)
    p, q = by_hand(one), by_hand(other)
    expected = sum(
        math.exp(p[token][word]) * (p[token][word] - q[token][word])
        for sequence in SEQUENCES
        for token in sequence
        for word in range(WORDS)
    )
    known, found = batch.log_probabilities(one), batch.log_probabilities(other)
    assert batch.divergence(known, found) == pytest.approx(expected, rel=1e-5)
    by_token = batch.token_divergences(known, found)
    assert not by_token[~batch.real].any()
    assert float(by_token.sum()) == pytest.approx(expected, rel=1e-5)
    assert batch.divergence(known, known) == 0.0
    real = batch.real
    logits = [table(batch.ids).logits[real] for table in (one, other)]
    assert divergence(*logits) == pytest.approx(expected / batch.positions, rel=1e-5)


def test_words_that_another_model_lacks_are_left_out(batch: Batch) -> None:
    wide, narrow = Table(0, WORDS + 3), Table(0)
    narrow.table = wide.table[:, :WORDS]
    torch.testing.assert_close(
        batch.log_probabilities(wide, WORDS), batch.log_probabilities(narrow)
    )


def test_batches_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.measure.logits.LOGITS_BUDGET", 8 * WORDS)
    found = list(make_batches(SEQUENCES, WORDS, torch.device("cpu")))
    assert [tuple(one.ids.shape) for one in found] == [(1, 5), (2, 4)]
    assert sum(one.positions for one in found) == 12


def test_perplexity_is_finite() -> None:
    assert perplexity(math.log(3.0)) == pytest.approx(3.0)
    assert math.isfinite(perplexity(1e6))
