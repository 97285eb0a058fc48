"""Base, references and edited checkpoints on one text: perplexity, KL, agreement, curves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import Unsupported
from surgery.measure.attention import ATTENTION_TOKENS, sink_attention
from surgery.measure.edited import BASE, Edited, references_of
from surgery.measure.logits import Context, perplexity
from surgery.measure.statistics import ratio, verdict
from surgery.models.distributions import Distributions, Run, compare_runs
from surgery.models.ground import HeadBlock
from surgery.models.journey import Batch, Stream, batches
from surgery.models.masking import step_masked, wemask
from surgery.models.observe import device_of
from surgery.patient.patient import Patient

logger = logging.getLogger(__name__)

# Sequences on which attention weights are looked at: they are large.
ATTENTION_SEQUENCES = 4
# Logits of one batch, of a model that is called whole, stay below about this many numbers.
LOGITS_BUDGET = 64_000_000
# Tokens whose residual streams are held at a time.
_PORTION = 8192

Array64 = NDArray[np.float64]


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


class _Totals:
    """Sums of one model over the sequences.

    Attributes:
        loss: by position of the token that predicts, nats, [longest].
        from_base: KL(base ‖ ·) by position, nats, [longest].
        from_reference: KL(reference ‖ ·) over all positions, nats; None without a reference.
        agreeing: positions with base's greedy next token.
        by_sequence: each sequence's summed loss.
    """

    def __init__(self, sequences: int, longest: int) -> None:
        self.loss, self.from_base = np.zeros(longest), np.zeros(longest)
        self.from_reference: float | None = None
        self.agreeing = 0
        self.by_sequence = np.zeros(sequences)

    def add(
        self,
        place: int,
        losses: Array64,
        from_base: Array64,
        from_reference: Array64,
        agreeing: int,
    ) -> None:
        """Add a sequence: losses by predicted token, divergences by position, both in nats."""
        self.loss[: len(losses)] += losses
        self.by_sequence[place] = losses.sum()
        self.from_base[: len(from_base)] += from_base
        if self.from_reference is not None:
            self.from_reference += float(from_reference.sum())
        self.agreeing += agreeing


class WholeRun:
    """Sequences in a model that is called as it is, where its layers cannot be entered alone."""

    def __init__(
        self, model: Any, sequences: Sequence[Sequence[int]], context: Context = nullcontext
    ) -> None:
        """Nothing runs yet.

        Args:
            model: of transformers.
            sequences: token ids.
            context: within which it runs.
        """
        self._model, self._context = model, context
        self._words = model.config.get_text_config().vocab_size
        limit = max(1, LOGITS_BUDGET // self._words)
        self._batches = list(batches(sequences, device_of(model), limit))

    @property
    def ground(self) -> WholeRun:
        """What the head's blocks come from."""
        return self

    @property
    def batches(self) -> list[Batch]:
        """Which sequences run together."""
        return self._batches

    def head_blocks(self) -> Iterator[HeadBlock]:
        """All words at once."""
        yield HeadBlock(0, self._words)

    def logits(self, block: HeadBlock) -> Iterator[torch.Tensor]:
        """Of each batch, [B, T, words]."""
        for batch in self._batches:
            with torch.inference_mode(), self._context():
                found = self._model(
                    input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
                ).logits
            yield found[..., : block.end]


def measure_text(
    base: Patient,
    other: Edited,
    sequences: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> tuple[TextMeasure, ...]:
    """Perplexity, KL, greedy agreement and curves by position of several models on one text.

    Args:
        base: what the other is compared with.
        other: of the same architecture, with its reference if it has one.
        sequences: token ids.
        progress: called with the tokens done.

    Returns:
        The measures of base, the reference where there is one, and the other.
    """
    reference = other.reference if other.mask is not None else None
    names = [name for name in (BASE, reference, other.name) if name is not None]
    known = [name for name in (BASE, reference) if name is not None]
    pairs = [(one, name) for one, name in product(known, names) if one != name]
    longest = max(len(sequence) for sequence in sequences)
    totals = {name: _Totals(len(sequences), longest) for name in names}
    for name in names[1:] if reference is not None else ():
        totals[name].from_reference = 0.0
    done = 0
    for some in _portions(sequences):
        runs = _side_by_side(base, other, some)
        found = compare_runs(runs, pairs, greedy=True)
        for batch, one in zip(runs[BASE].batches, found, strict=True):
            for name, total in totals.items():
                _add(total, name, reference, batch, one, done)
        done += len(some)
        progress(sum(len(sequence) for sequence in some))
    present = np.zeros(longest)  # tokens by position
    for sequence in sequences:
        present[: len(sequence)] += 1
    return tuple(_measures(totals, present, [len(sequence) - 1 for sequence in sequences]))


def _portions(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """So many sequences that the memory of their residual streams is bounded."""
    portion: list[Sequence[int]] = []
    for sequence in sequences:
        if portion and sum(map(len, portion)) + len(sequence) > _PORTION:
            yield portion
            portion = []
        portion.append(sequence)
    yield portion


def _add(
    total: _Totals,
    name: str,
    reference: str | None,
    batch: Batch,
    found: Distributions,
    before: int,
) -> None:
    """What a batch adds to a model's sums; the batch's places begin after `before` sequences."""
    losses = found.loss(name).cpu().numpy()
    agree = (found.greedy(name) == found.greedy(BASE)).cpu().numpy()

    def distance(known: str | None) -> Array64:
        if known is None or known == name:
            return np.zeros(agree.shape)
        values: Array64 = found.divergence((known, name)).cpu().numpy()
        return values

    from_base, from_reference = distance(BASE), distance(reference if name != BASE else None)
    for row, (place, length) in enumerate(zip(batch.places, batch.lengths, strict=True)):
        total.add(
            before + place,
            losses[row, : length - 1],
            from_base[row, :length],
            from_reference[row, :length],
            int(agree[row, :length].sum()),
        )


def _side_by_side(
    base: Patient, other: Edited, sequences: Sequence[Sequence[int]]
) -> Mapping[str, Run]:
    """Base, reference and the other after their last layers."""
    if other.steps:
        try:
            return _journey(base, other, sequences)
        except Unsupported:
            if base.streams or other.patient.streams:
                raise
    runs = {BASE: WholeRun(base.model, sequences)}
    if other.reference is not None and other.mask is not None:
        hooks = partial(wemask, base.model, other.mask, anatomy=base.anatomy)
        runs[other.reference] = WholeRun(base.model, sequences, hooks)
    return {**runs, other.name: WholeRun(other.patient.model, sequences)}


def _journey(base: Patient, other: Edited, sequences: Sequence[Sequence[int]]) -> dict[str, Stream]:
    """The same, each layer of both checkpoints entered once."""
    ours, theirs = base.ground, other.patient.ground
    ours.prepare(sequences)
    theirs.prepare(sequences)
    plain, edited = Stream.board(ours, sequences), Stream.board(theirs, sequences)
    masked: Stream | None = None
    for index in range(base.anatomy.depth):
        if other.mask is not None and index == other.mask.layers[0]:
            masked = plain.fork()
        with ours.layer(index) as layer:
            plain.step(index, layer)
            if masked is not None and other.mask is not None:
                step_masked(ours, other.mask, masked, index, layer)
        with theirs.layer(index) as layer:
            edited.step(index, layer)
    streams = {BASE: plain}
    if masked is not None and other.reference is not None:
        streams[other.reference] = masked
    return {**streams, other.name: edited}


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
    before, after = base.by_sequence.tolist(), one.by_sequence.tolist()
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
    """Each edited checkpoint beside the base and its reference, two models open at a time.

    Each is loaded where it fits comfortably; else its layers are read when their turn comes.

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
        logger.info("measuring %s on %d tokens", other.name, total)
        with base.reporter.bar(f"Measuring {other.name}", total) as advance:
            measured = measure_text(base, other, sequences, progress=advance)
        for one in measured:
            if one.name in found:
                continue
            if attention:
                one = _with_attention(one, _shares(one.name, base, other, short), start)
            found[one.name] = one
        other.patient.release()
    order = [BASE, *references, *(other.name for other in edited)]
    return tuple(found[name] for name in order)


def _shares(
    name: str, base: Patient, other: Edited, short: Sequence[Sequence[int]]
) -> tuple[float | None, ...] | None:
    """Attention on the first token by layer, of base, the reference or the other."""
    model = (other.patient if name == other.name else base).passable(short)
    hooks: Context = nullcontext
    if name == other.reference and other.mask is not None:
        hooks = partial(wemask, model, other.mask, anatomy=base.anatomy)
    return sink_attention(model, base.anatomy, short, hooks)


def _with_attention(
    measure: TextMeasure, shares: tuple[float | None, ...] | None, start: int
) -> TextMeasure:
    later = [share for share in (shares or ())[start:] if share is not None]
    return replace(
        measure,
        sink_attention=sum(later) / len(later) if later else None,
        sink_attention_by_layer=shares,
    )
