"""The quality gate: what a fold does to a model, measured on text before anything is written."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from surgery.errors import QualityGate
from surgery.measure.logits import Context, make_batches, perplexity
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import decoder_layers
from surgery.models.observe import device_of, hooked, standing_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One variant of a model on one text.

    Attributes:
        name: "base", "reference" or "folded".
        perplexity: over all predicted tokens.
        against_base: perplexity relative to base, minus 1.
        kl_from_reference: mean KL(reference ‖ variant), nats per position; NaN for the base.
        kl_from_base: mean KL(base ‖ variant), likewise.
    """

    name: str
    perplexity: float
    against_base: float
    kl_from_reference: float
    kl_from_base: float


@dataclass(frozen=True)
class Quality:
    """Base, the paper's reference and folded weights on the same tokens.

    Attributes:
        variants: in this order.
        tokens: in all.
        sequences: of these tokens.
    """

    variants: tuple[Measured, ...]
    tokens: int
    sequences: int

    def __getitem__(self, name: str) -> Measured:
        return next(variant for variant in self.variants if variant.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class SharedPrefix:
    """Layers before `stop` run once per batch; later passes reuse what they gave.

    What they gave is kept by batch number: tokens × hidden size numbers for each batch recorded.
    Nothing is shared where later layers also read the keys and values of earlier ones.
    """

    def __init__(self, model: Any, anatomy: Anatomy, stop: int) -> None:
        reused = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
        self._layers = [] if reused else decoder_layers(model, anatomy)[:stop]
        self._results: dict[int, Any] = {}

    @contextmanager
    def record(self, batch: int = 0) -> Iterator[None]:
        """Remember the last shared layer's output in the forward pass of this block."""

        def keep(_module: Any, _args: Any, result: Any) -> None:
            self._results[batch] = result

        handles = [self._layers[-1].register_forward_hook(keep)] if self._layers else []
        with hooked(handles):
            yield

    def replay(self, batch: int = 0) -> AbstractContextManager[None]:
        """Skip the shared layers in the forward passes of this block."""
        result = self._results.get(batch)
        return standing_in(self._layers, [lambda *_args, **_kwargs: result] * len(self._layers))


def measure(
    model: Any,
    anatomy: Anatomy,
    sequences: Sequence[Sequence[int]],
    first_target: int,
    variants: Mapping[str, Context],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> Quality:
    """Perplexity and KL of each variant, the layers before `first_target` shared by all.

    Args:
        model: in memory whole.
        anatomy: of its checkpoint.
        sequences: token ids.
        first_target: the first layer that a variant changes.
        variants: what the model runs within, by name; "base" and "reference" must be among them,
            in this order, because the others are compared with them.
        progress: called with the tokens done.
    """
    totals = {name: [0.0, 0.0, 0.0] for name in variants}
    positions = predicted = 0
    prefix = SharedPrefix(model, anatomy, first_target)
    vocabulary = model.config.get_text_config().vocab_size
    for batch in make_batches(sequences, vocabulary, device_of(model)):
        known: dict[str, torch.Tensor] = {}
        for number, (name, variant) in enumerate(variants.items()):
            shared = prefix.record() if number == 0 else prefix.replay()
            with torch.inference_mode(), variant(), shared:
                logs = batch.log_probabilities(model)
            if name in ("base", "reference"):
                known[name] = logs
            totals[name][0] += batch.loss(logs)
            for column, other in enumerate(("reference", "base"), 1):
                if other in known:
                    totals[name][column] += batch.divergence(known[other], logs)
        positions += batch.positions
        predicted += batch.predicted
        progress(batch.positions)
    logger.info("%d variants on %d tokens", len(variants), positions)
    base = totals["base"][0]
    return Quality(
        tuple(
            measured(name, loss, base, predicted, from_reference / positions, from_base / positions)
            for name, (loss, from_reference, from_base) in totals.items()
        ),
        positions,
        len(sequences),
    )


def measured(
    name: str,
    loss: float,
    base: float,
    predicted: int,
    kl_from_reference: float,
    kl_from_base: float,
) -> Measured:
    """A variant's figures.

    Args:
        name: of the variant.
        loss: of the variant, nats, summed over the predicted tokens.
        base: of the base, likewise.
        predicted: how many tokens these are.
        kl_from_reference: nats per position.
        kl_from_base: nats per position.
    """
    if name == "base":
        # KL(reference ‖ base) is not measured: base runs before the reference exists.
        return Measured(name, perplexity(base / predicted), 0.0, math.nan, 0.0)
    return Measured(
        name=name,
        perplexity=perplexity(loss / predicted),
        against_base=perplexity((loss - base) / predicted) - 1.0,
        kl_from_reference=kl_from_reference,
        kl_from_base=kl_from_base,
    )


def require_quality(
    quality: Quality, fold: str, limit: float, better: tuple[str, Measured] | None
) -> None:
    """Raise QualityGate when the folded perplexity exceeds base by more than a limit.

    Args:
        quality: what was measured.
        fold: its name.
        limit: the allowed rise, as a share.
        better: another fold's name and measurement, when it would have passed or done better.
    """
    folded, base = quality["folded"], quality["base"]
    if math.isfinite(folded.perplexity) and folded.against_base <= limit:
        return
    advice = "reduce --rate or --strength, or choose --scope first"
    if better is not None and better[1].perplexity < folded.perplexity:
        name, found = better
        advice = (
            f"--fold {name} measures {found.perplexity:.4g} ({found.against_base:+.1%}) on the "
            "same text"
        )
    raise QualityGate(
        f"the {fold} fold raises perplexity from {base.perplexity:.4g} to "
        f"{folded.perplexity:.4g} ({folded.against_base:+.1%}, allowed {limit:+.1%}; the paper's "
        f"reference measures {quality['reference'].perplexity:.4g}); nothing was written: "
        f"{advice}, or write it all the same with --force."
    )
