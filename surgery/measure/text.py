"""Base, references and edited checkpoints on one text: perplexity, KL, agreement, curves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.measure.attention import ATTENTION_TOKENS, sink_attention
from surgery.measure.edited import BASE, Edited, references_of
from surgery.measure.logits import Batch, Context, make_batches, perplexity
from surgery.measure.statistics import ratio, verdict
from surgery.models.masking import wemask
from surgery.models.observe import device_of
from surgery.patient.patient import Patient

logger = logging.getLogger(__name__)

# Sequences on which attention weights are looked at: they are large.
ATTENTION_SEQUENCES = 4


@dataclass(frozen=True)
class LossDifference:
    """Mean loss of a variant minus base, in nats per token, with its 95 % confidence interval.

    The interval is over sequences (`statistics.ratio`).

    Attributes:
        difference: mean over all predicted tokens.
        standard_error: of the mean; None without scipy, like all that follow.
        low: lower bound of the interval.
        high: upper bound.
        verdict: what the interval shows.
    """

    difference: float
    standard_error: float | None
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class TextMeasure:
    """One model on the text.

    Attributes:
        name: of the model.
        perplexity: over all predicted tokens.
        against_base: its ratio to base's, minus 1.
        kl_from_base: mean KL(base ‖ ·), nats per position.
        kl_from_reference: mean KL(reference ‖ ·), likewise; None where there is no reference.
        agreement: share of positions with base's greedy next token.
        loss_by_position: mean loss (nats) by position in the window, the first token being 0.
        kl_by_position: mean KL(base ‖ ·) by position.
        loss: its difference from base's; None for the base.
        sink_attention: mean attention probability that later tokens give the first one, over heads
            and the layers from the first masked one on; None where the model gives no weights.
        sink_attention_by_layer: the same for every layer.
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


@dataclass(frozen=True)
class Shown:
    """A model that is shown the text.

    Attributes:
        name: of the measure.
        model: of transformers.
        context: within which it runs.
    """

    name: str
    model: Any
    context: Context = nullcontext


class _Totals:
    """Sums of one model over the batches.

    Attributes:
        loss: by position of the token that predicts, nats, [longest].
        from_base: KL(base ‖ ·) by position, nats, [longest].
        from_reference: KL(reference ‖ ·) over all positions, nats; None without a reference.
        agreeing: positions with base's greedy next token.
        by_sequence: each sequence's summed loss.
    """

    def __init__(self, longest: int) -> None:
        self.loss, self.from_base = np.zeros(longest), np.zeros(longest)
        self.from_reference: float | None = None
        self.agreeing = 0
        self.by_sequence: list[float] = []

    def add(
        self,
        batch: Batch,
        logs: torch.Tensor,
        base: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> None:
        """Add a batch's log-probabilities, held against those of base and reference."""
        losses, width = batch.token_losses(logs), batch.real.shape[1]
        self.loss[: width - 1] += losses.sum(0).cpu().numpy()
        self.by_sequence += losses.sum(1).tolist()
        base = base.to(logs.device)
        self.agreeing += int(((logs.argmax(-1) == base.argmax(-1)) & batch.real).sum())
        if base is not logs:
            self.from_base[:width] += batch.token_divergences(base, logs).sum(0).cpu().numpy()
        if reference is not None:
            distance = batch.divergence(reference.to(logs.device), logs)
            self.from_reference = (self.from_reference or 0.0) + distance


def measure_text(
    models: Sequence[Shown],
    sequences: Sequence[Sequence[int]],
    reference: str | None = None,
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> tuple[TextMeasure, ...]:
    """Perplexity, KL, greedy agreement and curves by position of several models on one text.

    Args:
        models: the first is the base.
        sequences: token ids.
        reference: the name of the model that KL(reference ‖ ·) refers to; later ones are measured
            against it.
        progress: called with the tokens done.
    """
    longest = max(len(sequence) for sequence in sequences)
    totals = {shown.name: _Totals(longest) for shown in models}
    present = np.zeros(longest)  # tokens by position
    sizes: list[int] = []  # predicted tokens by sequence
    vocabulary = models[0].model.config.get_text_config().vocab_size
    for batch in make_batches(sequences, vocabulary, torch.device("cpu")):
        present[: batch.real.shape[1]] += batch.real.sum(0).numpy()
        sizes += batch.real[:, 1:].sum(1).tolist()
        base = paper = None
        for shown in models:
            here = batch.to(device_of(shown.model))
            with torch.inference_mode(), shown.context():
                logs = here.log_probabilities(
                    shown.model, base.shape[-1] if base is not None else None
                )
            base = logs if base is None else base
            paper = logs if shown.name == reference else paper
            totals[shown.name].add(here, logs, base, paper)
        progress(batch.positions)
    return tuple(_measures(totals, present, sizes))


def _measures(
    totals: dict[str, _Totals], present: NDArray[np.float64], sizes: list[int]
) -> Iterator[TextMeasure]:
    base = next(iter(totals.values()))
    predicted, seen = sum(sizes), float(present.sum())
    predictions = np.append(present[1:], 0.0)  # by position of the token that predicts
    base_loss = float(base.loss.sum() / predicted)
    for name, one in totals.items():
        loss = float(one.loss.sum() / predicted)
        curve = one.loss / np.maximum(predictions, 1)
        yield TextMeasure(
            name=name,
            perplexity=perplexity(loss),
            against_base=perplexity(loss - base_loss) - 1.0,
            kl_from_base=float(one.from_base.sum() / seen),
            kl_from_reference=one.from_reference / seen if one.from_reference is not None else None,
            agreement=one.agreeing / seen,
            loss_by_position=tuple(curve[predictions > 0]),
            kl_by_position=tuple(one.from_base / np.maximum(present, 1)),
            loss=None if one is base else _loss_difference(base, one, sizes),
        )


def _loss_difference(base: _Totals, one: _Totals, sizes: Sequence[int]) -> LossDifference:
    before, after = base.by_sequence, one.by_sequence
    if find_spec("scipy") is None:
        mean = (sum(after) - sum(before)) / sum(sizes)
        return LossDifference(mean, None, None, None, None)
    mean, error, low, high = ratio(before, after, sizes)
    return LossDifference(mean, error, low, high, verdict(low, high, higher_is_better=False))


def measure_beside(
    base: Patient,
    edited: Sequence[Edited],
    sequences: Sequence[Sequence[int]],
    *,
    attention: bool,
) -> tuple[TextMeasure, ...]:
    """Each edited checkpoint beside the base and its reference, two models in memory at a time.

    Args:
        base: what the others are compared with.
        edited: of the same architecture.
        sequences: token ids.
        attention: whether to look at attention on the first token, which needs base's anatomy.

    Returns:
        The measures of base, references and edited checkpoints, in this order.
    """
    references = references_of(edited)
    start = min((min(mask.layers) for mask in references.values()), default=0)
    short = [list(sequence[:ATTENTION_TOKENS]) for sequence in sequences[:ATTENTION_SEQUENCES]]
    total = sum(len(sequence) for sequence in sequences)
    found: dict[str, TextMeasure] = {}
    for other in edited:
        models = _models(base, other)
        logger.info("measuring %s on %d tokens", other.name, total)
        with base.reporter.bar(f"Measuring {other.name}", total) as advance:
            measured = measure_text(models, sequences, other.reference, progress=advance)
        for one, shown in zip(measured, models, strict=True):
            if one.name in found:
                continue
            if attention:
                shares = sink_attention(shown.model, base.anatomy, short, shown.context)
                one = _with_attention(one, shares, start)
            found[one.name] = one
        del models, shown
        other.patient.release()
    order = [BASE, *references, *(other.name for other in edited)]
    return tuple(found[name] for name in order)


def _models(base: Patient, other: Edited) -> list[Shown]:
    found = [Shown(BASE, base.model)]
    if other.reference is not None and other.mask is not None:
        hooks = partial(wemask, base.model, other.mask, anatomy=base.anatomy)
        found.append(Shown(other.reference, base.model, hooks))
    return [*found, Shown(other.name, other.patient.model)]


def _with_attention(
    measure: TextMeasure, shares: tuple[float | None, ...] | None, start: int
) -> TextMeasure:
    later = [share for share in (shares or ())[start:] if share is not None]
    return replace(
        measure,
        sink_attention=sum(later) / len(later) if later else None,
        sink_attention_by_layer=shares,
    )
