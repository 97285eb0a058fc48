"""The quality gate: what a fold does to a model, measured on text before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from surgery.anatomy import Anatomy
from surgery.errors import QualityGate
from surgery.observe import decoder_layers, hooked, pad

# Logits of one batch stay below about this many numbers.
LOGITS_BUDGET = 64_000_000

Variant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Measured:
    """One variant of a model on one text.

    perplexity over all predicted tokens; against_base: perplexity relative to base, minus 1;
    kl_from_reference, kl_from_base: mean KL(reference ‖ variant) and KL(base ‖ variant) in nats
    per position.
    """

    name: str
    perplexity: float
    against_base: float
    kl_from_reference: float
    kl_from_base: float


@dataclass(frozen=True)
class Quality:
    """Base, the paper's reference and folded weights on the same tokens."""

    variants: tuple[Measured, ...]
    tokens: int
    sequences: int

    def __getitem__(self, name: str) -> Measured:
        return next(variant for variant in self.variants if variant.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class SharedPrefix:
    """Layers before `stop` run once per batch; later passes reuse what they gave."""

    def __init__(self, model: Any, anatomy: Anatomy, stop: int) -> None:
        self._layers = decoder_layers(model, anatomy)[:stop]
        self._result: Any = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Remember the last shared layer's output in the forward pass of this block."""

        def keep(_module: Any, _args: Any, result: Any) -> None:
            self._result = result

        handles = [self._layers[-1].register_forward_hook(keep)] if self._layers else []
        with hooked(handles):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Skip the shared layers in the forward passes of this block."""
        try:
            for layer in self._layers:
                layer.forward = lambda *_args, **_kwargs: self._result
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)


def measure(
    model: Any,
    anatomy: Anatomy,
    sequences: Sequence[Sequence[int]],
    first_target: int,
    variants: dict[str, Variant],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> Quality:
    """Perplexity and KL of each variant, the layers before `first_target` shared by all.

    variants: a context manager per name, entered around each batch; "base" and "reference" must be
    among them, in this order, because the others are compared with them.
    """
    totals = {name: [0.0, 0.0, 0.0] for name in variants}
    positions = predicted = 0
    prefix = SharedPrefix(model, anatomy, first_target)
    device = next(model.parameters()).device
    for batch in batches(sequences, model.config.get_text_config().vocab_size):
        ids, mask = pad(batch)
        real = mask.bool().to(device)
        targets = ids[:, 1:].to(device)
        known: dict[str, torch.Tensor] = {}
        for number, (name, variant) in enumerate(variants.items()):
            shared = prefix.record() if number == 0 else prefix.replay()
            with torch.inference_mode(), variant(), shared:
                logits = model(
                    input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                ).logits
            logs = logits.float().log_softmax(-1)
            del logits
            if name in ("base", "reference"):
                known[name] = logs
            totals[name][0] -= float(
                logs[:, :-1].gather(-1, targets.unsqueeze(-1))[real[:, 1:]].double().sum()
            )
            totals[name][1] += _divergence(known.get("reference"), logs, real)
            totals[name][2] += _divergence(known.get("base"), logs, real)
        positions += int(real.sum())
        predicted += int(real[:, 1:].sum())
        progress(int(real.sum()))
    base = totals["base"][0] / predicted
    measured = []
    for name, (loss, from_reference, from_base) in totals.items():
        measured.append(
            Measured(
                name=name,
                perplexity=_exp(loss / predicted),
                against_base=_exp(loss / predicted - base) - 1.0,
                kl_from_reference=from_reference / positions,
                kl_from_base=from_base / positions,
            )
        )
    return Quality(_symmetric(tuple(measured)), positions, len(sequences))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _symmetric(measured: tuple[Measured, ...]) -> tuple[Measured, ...]:
    """KL(reference ‖ base) is not measured: base runs before the reference exists."""
    base = measured[0]
    fixed = Measured(base.name, base.perplexity, 0.0, math.nan, 0.0)
    return (fixed, *measured[1:])


def _divergence(known: torch.Tensor | None, logs: torch.Tensor, real: torch.Tensor) -> float:
    if known is None or known is logs:
        return 0.0
    return float((known.exp() * (known - logs)).sum(-1)[real].double().sum())


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


def unmodified() -> AbstractContextManager[None]:
    """The variant that changes nothing."""
    return nullcontext()


def require_quality(
    quality: Quality, fold: str, limit: float, better: tuple[str, Measured] | None
) -> None:
    """Raise QualityGate when the folded perplexity exceeds base by more than `limit`.

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
