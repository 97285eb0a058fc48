"""Several models on one text: perplexity, KL, agreement, curves by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.measure.logits import Batch, make_batches, perplexity
from surgery.measure.statistics import ratio, verdict
from surgery.models.observe import device_of

REFERENCE = "reference"
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class LossDifference:
    """Mean loss of a variant minus base, in nats per token, with its 95 % confidence interval.

    The interval is over sequences (`statistics.ratio`); None without scipy.
    """

    difference: float
    standard_error: float | None
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class TextMeasure:
    """One model on the text.

    perplexity over all predicted tokens; against_base: its ratio to base, minus 1. kl_from_base,
    kl_from_reference: mean KL(base ‖ ·) and KL(reference ‖ ·) in nats per position, None where
    there is no such model. agreement: share of positions with base's greedy next token.
    loss_by_position, kl_by_position: mean loss (nats) and KL(base ‖ ·) by position in the window,
    the first token being 0. sink_attention: mean attention probability that later tokens give the
    first one, over heads and the layers from the first masked one on; sink_attention_by_layer: the
    same for every layer; None where the model gives no attention weights.
    """

    name: str
    perplexity: float
    against_base: float
    kl_from_base: float | None
    kl_from_reference: float | None
    agreement: float
    loss_by_position: tuple[float, ...]
    kl_by_position: tuple[float, ...]
    loss: LossDifference | None = None
    sink_attention: float | None = None
    sink_attention_by_layer: tuple[float | None, ...] | None = None


class _Totals:
    """Sums of one variant over the batches."""

    def __init__(self, longest: int) -> None:
        self.loss = np.zeros(longest)
        self.from_base = np.zeros(longest)
        self.from_reference = 0.0
        self.agreeing = 0
        self.by_sequence: list[tuple[float, int]] = []


def measure_text(
    models: Sequence[tuple[str, Any, Context]],
    sequences: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> tuple[TextMeasure, ...]:
    """Perplexity, KL, greedy agreement and curves by position of several models on one text.

    models: name, model and a context manager to run it under; the first is the base, and the one
    named "reference", if any, is what KL(reference ‖ ·) refers to and must come before the others.
    """
    longest = max(len(sequence) for sequence in sequences)
    totals = {name: _Totals(longest) for name, _, _ in models}
    predictions, positions = np.zeros(longest), np.zeros(longest)
    vocabulary = models[0][1].config.get_text_config().vocab_size
    for batch in make_batches(sequences, vocabulary, torch.device("cpu")):
        width = batch.real.shape[1]
        positions[:width] += batch.real.sum(0).numpy()
        predictions[: width - 1] += batch.real[:, 1:].sum(0).numpy()
        base = reference = None
        for name, model, context in models:
            here = batch.to(device_of(model))
            with torch.inference_mode(), context():
                logs = here.log_probabilities(model, base.shape[-1] if base is not None else None)
                if base is None:
                    base = logs
                elif name == REFERENCE:
                    reference = logs
                _add(totals[name], here, logs, base, reference)
        progress(batch.positions)
    return _measures(totals, predictions, positions)


def _add(
    totals: _Totals,
    batch: Batch,
    logs: torch.Tensor,
    base: torch.Tensor,
    reference: torch.Tensor | None,
) -> None:
    real, width = batch.real, batch.real.shape[1]
    losses = batch.token_losses(logs).double().masked_fill(~real[:, 1:], 0.0)
    totals.loss[: width - 1] += losses.sum(0).cpu().numpy()
    counts = real[:, 1:].sum(1)
    totals.by_sequence += zip(losses.sum(1).tolist(), counts.tolist(), strict=True)
    same = logs.argmax(-1) == base.to(logs.device).argmax(-1)
    totals.agreeing += int((same & real).sum())
    if base is not logs:
        apart = batch.divergence_by_position(base.to(logs.device), logs)
        totals.from_base[:width] += apart.cpu().numpy()
    if reference is not None and reference is not logs:
        apart = batch.divergence_by_position(reference.to(logs.device), logs)
        totals.from_reference += float(apart.cpu().numpy().sum())


def _measures(
    totals: dict[str, _Totals],
    predictions: NDArray[np.float64],
    positions: NDArray[np.float64],
) -> tuple[TextMeasure, ...]:
    names = list(totals)
    base = totals[names[0]]
    predicted, seen = predictions.sum(), positions.sum()
    with_targets = predictions > 0
    base_loss = float(base.loss.sum() / predicted)
    found = []
    for name, one in totals.items():
        loss = float(one.loss.sum() / predicted)
        referred = REFERENCE in names and names.index(name) >= names.index(REFERENCE)
        found.append(
            TextMeasure(
                name=name,
                perplexity=perplexity(loss),
                against_base=perplexity(loss - base_loss) - 1.0,
                kl_from_base=float(one.from_base.sum() / seen),
                kl_from_reference=one.from_reference / seen if referred else None,
                agreement=one.agreeing / float(seen),
                loss_by_position=tuple((one.loss / np.maximum(predictions, 1))[with_targets]),
                kl_by_position=tuple(one.from_base / np.maximum(positions, 1)),
                loss=None if one is base else _loss_difference(base, one),
            )
        )
    return tuple(found)


def _loss_difference(base: _Totals, one: _Totals) -> LossDifference:
    before = [loss for loss, _ in base.by_sequence]
    after = [loss for loss, _ in one.by_sequence]
    sizes = [count for _, count in base.by_sequence]
    if find_spec("scipy") is None:
        mean = (sum(after) - sum(before)) / sum(sizes)
        return LossDifference(mean, None, None, None, None)
    mean, error, low, high = ratio(before, after, sizes)
    return LossDifference(mean, error, low, high, verdict(low, high, higher_is_better=False))
