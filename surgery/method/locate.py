"""Finding the Massive Emergence Layer from norms alone: pure numpy, no model.

The rule (paper §3 and Appendix H, made precise):

1. The sink of a prompt is the token with the largest norm before the last two layers.
2. A layer is eligible where the sink's output norm stands out from the other tokens' median and
   lasts to the last of the layers that count.
3. Of the eligible layers the prompt votes for the one that magnifies the sink most: the greatest
   ratio of its output norm to its input norm (`vote`).
4. The layer that most prompts vote for is the Massive Emergence Layer m (`agree`).

Norms are float64 here: they come from float32 sums, and no comparison below should add an error
of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import NoEmergence

# The sink's output norm against the other tokens' median, at the least.
STANDS_OUT = 5.0
# The least factor by which one layer must magnify the sink. Real emergences measure 100 and more;
# slow growth along the residual stream stays near 1.
MAGNIFIES = 5.0
# How much of its norm at emergence the sink must keep afterwards.
LASTS = 0.5
# Many models have a second event in the last two layers (Appendix A), where the sink's norm leaps
# or falls: it never counts, neither as an emergence nor as the end of one.
IGNORED_LAST_LAYERS = 2
# Share of the prompts that must name the same layer.
MAJORITY = 0.6
# Tokens whose norm is at least this share of the sink's are massive too.
AS_MASSIVE = 0.5
# In place of zero in denominators: far below any norm, and quotients stay finite.
_TINY = 1e-30


@dataclass(frozen=True)
class Vote:
    """What one prompt says.

    Attributes:
        layer: where its sink emerges, from 0; None for no emergence.
        position: of the sink.
        tokens: how many the prompt has.
        magnification: the greatest ratio of output norm to input norm among the eligible layers,
            0 when there is none.
        runner_up: the greatest ratio of any other eligible layer, 0 when there is none.
        massive_positions: every token as massive as the sink (norm at least half of the sink's).
    """

    layer: int | None
    position: int
    tokens: int
    magnification: float
    runner_up: float
    massive_positions: tuple[int, ...]


@dataclass(frozen=True)
class LayerRow:
    """One line of the table by layer; all are medians over the prompts.

    Attributes:
        layer: index, from 0.
        sink_input: L2 norm of the sink token before the layer.
        sink_output: the same after the layer.
        magnification: output over input.
        others: median norm of the other tokens' outputs.
        ratio: sink_output over others.
    """

    layer: int
    sink_input: float
    sink_output: float
    magnification: float
    others: float
    ratio: float


@dataclass(frozen=True)
class Emergence:
    """The Massive Emergence Layer and the evidence for it.

    Attributes:
        layer: m, from 0; None when the prompts show none.
        magnification: median over the prompts that name the winner.
        runner_up: likewise, of the next best layer.
        agreement: share of the prompts that name the winner.
        confidence: "high", "medium", "low" or "none"; "given" for a layer that the user names.
        rows: the table by layer.
        votes: one for each prompt.
        found_by: "search" or "given".
    """

    layer: int | None
    magnification: float
    runner_up: float
    agreement: float
    confidence: str
    rows: tuple[LayerRow, ...]
    votes: tuple[Vote, ...]
    found_by: str = "search"

    @property
    def counts(self) -> dict[int | None, int]:
        """Votes by layer, most first."""
        return dict(Counter(vote.layer for vote in self.votes).most_common())

    @property
    def sink_positions(self) -> dict[int, int]:
        """How often each position was the sink."""
        return dict(Counter(vote.position for vote in self.votes).most_common())

    def require(self) -> int:
        """m, or NoEmergence with the reason."""
        if self.layer is not None:
            return self.layer
        strongest = max((vote.magnification for vote in self.votes), default=0.0)
        counts = ", ".join(
            f"{'none' if layer is None else f'layer {layer}'}: {count}"
            for layer, count in self.counts.items()
        )
        raise NoEmergence(
            "no Massive Emergence Layer found: no single layer magnifies a token "
            f"{MAGNIFIES:g} times, lastingly and above the others, in at least "
            f"{MAJORITY:.0%} of the prompts (votes: {counts}; greatest lasting magnification "
            f"{strongest:.3g}); if you know the layer, give it with --layer."
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def vote(
    norms: NDArray[np.floating],
    valid: NDArray[np.bool_] | None = None,
    depth: int | None = None,
) -> Vote:
    """The layer that one prompt names.

    Args:
        norms: L2 norms, [layers + 1, tokens]; row 0 is the input to layer 0 (the embedding),
            row l + 1 the output of layer l.
        valid: [tokens], False at padding.
        depth: number of layers of the model, when the norms stop before its end.
    """
    norms = np.asarray(norms, dtype=np.float64)
    positions = np.arange(norms.shape[1]) if valid is None else np.flatnonzero(valid)
    norms = norms[:, positions]
    outputs = norms[1:]
    whole = len(outputs) if depth is None else depth
    considered = min(len(outputs), max(1, whole - IGNORED_LAST_LAYERS))

    # The sink, its curve over the layers that count, and the other tokens beside it.
    sink = int(np.argmax(outputs[:considered].max(axis=0)))
    curve = outputs[:considered, sink]
    ratios = growth(norms[: considered + 1, sink])
    others = others_median(norms, sink)[1 : considered + 1]

    # Which layers stand out and last, and which of these magnifies most.
    later_minimum = np.minimum.accumulate(curve[::-1])[::-1]
    eligible = np.flatnonzero((curve >= STANDS_OUT * others) & (later_minimum >= LASTS * curve))
    ranked = sorted(eligible, key=lambda layer: -ratios[layer])  # stable: ties to the lower layer
    best, runner_up = ([float(ratios[layer]) for layer in ranked] + [0.0, 0.0])[:2]
    layer = int(ranked[0]) if best >= MAGNIFIES else None
    massive = outputs[layer] >= AS_MASSIVE * outputs[layer, sink] if layer is not None else []
    return Vote(
        layer=layer,
        position=int(positions[sink]),
        tokens=len(positions),
        magnification=best,
        runner_up=runner_up,
        massive_positions=tuple(int(positions[token]) for token in np.flatnonzero(massive)),
    )


def growth(curve: NDArray[np.floating]) -> NDArray[np.float64]:
    """Each norm of a curve over the one before it, [layers + 1] to [layers]."""
    return curve[1:] / np.maximum(curve[:-1], _TINY)


def others_median(norms: NDArray[np.floating], sink: int) -> NDArray[np.float64]:
    """Median over the tokens other than the sink, per row; zeros when there is no other."""
    rest = np.delete(norms, sink, axis=1)
    return np.median(rest, axis=1) if rest.shape[1] else np.zeros(norms.shape[0])


def agree(
    prompts: Sequence[NDArray[np.floating]],
    valid: Sequence[NDArray[np.bool_]] | None = None,
    depth: int | None = None,
) -> Emergence:
    """The emergence that the prompts agree on, with the table by layer.

    Args:
        prompts: one [layers + 1, tokens] array of norms per prompt.
        valid: masks of real tokens, one per prompt.
        depth: number of layers of the model, when the norms stop before its end.
    """
    masks = valid if valid is not None else [np.ones(p.shape[1], dtype=bool) for p in prompts]
    votes = tuple(vote(norms, mask, depth) for norms, mask in zip(prompts, masks, strict=True))
    # Of layers with as many votes the one that the earlier prompt names; none reaches MAJORITY.
    winner, count = Counter(v.layer for v in votes).most_common(1)[0]
    agreement = count / len(votes)
    layer = winner if agreement >= MAJORITY else None
    supporters = [v for v in votes if v.layer == winner]
    magnification = float(np.median([v.magnification for v in supporters]))
    runner_up = float(np.median([v.runner_up for v in supporters]))
    return Emergence(
        layer=layer,
        magnification=magnification,
        runner_up=runner_up,
        agreement=agreement,
        confidence=_confidence(layer, agreement, magnification, runner_up),
        rows=_table(prompts, votes, masks),
        votes=votes,
    )


def _confidence(layer: int | None, agreement: float, best: float, runner_up: float) -> str:
    """In a word: how far the winner is ahead, and how many prompts name it."""
    if layer is None:
        return "none"
    if agreement == 1.0 and best >= 4 * max(runner_up, MAGNIFIES):
        return "high"
    return "medium" if agreement >= 0.8 and best >= 2 * runner_up else "low"


def _table(
    prompts: Sequence[NDArray[np.floating]],
    votes: Sequence[Vote],
    masks: Sequence[NDArray[np.bool_]],
) -> tuple[LayerRow, ...]:
    sinks, others = [], []
    for norms, voted, mask in zip(prompts, votes, masks, strict=True):
        sinks.append(np.asarray(norms, dtype=np.float64)[:, voted.position])
        position = int(np.flatnonzero(np.flatnonzero(mask) == voted.position)[0])
        others.append(others_median(np.asarray(norms, dtype=np.float64)[:, mask], position))
    sink, other = np.median(sinks, axis=0), np.median(others, axis=0)
    steps = np.median([growth(curve) for curve in sinks], axis=0)
    return tuple(
        LayerRow(
            layer=layer,
            sink_input=float(sink[layer]),
            sink_output=float(sink[layer + 1]),
            magnification=float(steps[layer]),
            others=float(other[layer + 1]),
            ratio=float(sink[layer + 1] / max(other[layer + 1], _TINY)),
        )
        for layer in range(len(sink) - 1)
    )
