"""The figures of the evidence, of models side by side, and of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from surgery.method.locate import Emergence
from surgery.outputs.figure import OTHERS, SINK, drawing, legend, mark, style, whole_ticks

if TYPE_CHECKING:
    from surgery.measure.evidence import Evidence
    from surgery.measure.traces import PromptTrace

_Found = TypeVar("_Found")


def plot_parts(evidence: Evidence, layer: int | None, path: Path) -> None:
    """Norms after the pre-FFN norm (WeightNorm), the FFN and the layer (Fig. 1, 2, 11 to 20)."""
    panels = (
        ("weight_norm", "WeightNorm\n(norm before the FFN)"),
        ("ffn_output", "FFN output"),
        ("output", "layer output"),
    )
    with drawing(path, 3, 1, figsize=(9, 10), sharex=True) as (figure, all_axes):
        for axes, (name, label) in zip(all_axes, panels, strict=True):
            _sink_and_others(axes, evidence.traces, name)
            axes.set_ylabel(label)
            mark(axes, layer, label=True)
        figure.supylabel("L2 norm, median over the prompts", fontsize=14)
        legend(figure, 2, all_axes[-1])
        whole_ticks(all_axes[-1])


def _sink_and_others(axes: Any, traces: Sequence[PromptTrace], name: str) -> None:
    from surgery.measure.evidence import by_layer

    def curve(reduce: Any) -> Any:
        found = by_layer(traces, lambda trace: reduce(getattr(trace, name), trace.sink))
        return found[1:] if name == "output" else found  # its first row is the embedding

    def rest(values: Any, sink: int) -> Any:
        others = np.delete(values, sink, axis=1)
        return others if others.shape[1] else np.full((len(values), 1), np.nan)

    sink = curve(lambda values, sink: values[:, sink])
    layers = np.arange(len(sink))
    low, middle, high = (
        curve(lambda values, sink, q=q: np.quantile(rest(values, sink), q, axis=1))
        for q in (0.05, 0.5, 0.95)
    )
    if np.isnan(sink).all():
        axes.text(0.5, 0.5, "not present in this model", ha="center", transform=axes.transAxes)
        return
    axes.fill_between(layers, low, high, color=OTHERS, alpha=0.2, label="others, 5 to 95 %")
    axes.semilogy(layers, middle, "s--", color=OTHERS, markersize=4, label="other tokens (median)")
    axes.semilogy(layers, sink, "o-", color=SINK, markersize=5, label="sink token")


def plot_alignment(evidence: Evidence, layer: int | None, path: Path) -> None:
    """ΔFrac and ΔKL of the pre-FFN norm's output by layer (eq. 1 and 2, Fig. 3)."""
    layers = [row.layer for row in evidence.rows]
    with drawing(path, 2, 1, figsize=(9, 7), sharex=True) as (figure, (upper, lower)):
        upper.plot(layers, [row.delta_fraction for row in evidence.rows], "o-", color=SINK)
        upper.set_ylabel(f"ΔFrac\n(top {evidence.share:.0%} of the gains)")
        lower.plot(layers, [row.delta_kl for row in evidence.rows], "s--", color=OTHERS)
        lower.set_ylabel("ΔKL (nats)")
        whole_ticks(lower)
        for axes in (upper, lower):
            axes.axhline(0, color="black", linewidth=1)
            mark(axes, layer, label=axes is upper)
        legend(figure, 1, upper)


def plot_ffn(evidence: Evidence, layer: int | None, path: Path) -> None:
    """Projection concentration after gate, up and down, and amplification (eq. 3, Fig. 4)."""
    layers = [row.layer for row in evidence.rows]
    with drawing(path, 2, 1, figsize=(9, 7), sharex=True) as (figure, (upper, lower)):
        for index, role in enumerate(("gate", "up", "down")):
            values = [getattr(row, role) for row in evidence.rows]
            if not np.isnan(values).all():
                upper.plot(layers, values, label=role, **style(index))
        upper.axhline(0, color="black", linewidth=1)
        upper.set_ylabel("concentration\n(sink − others)")
        lower.bar(layers, [row.amplification for row in evidence.rows], color=SINK)
        lower.set_yscale("log")
        lower.set_ylabel("sink: FFN output / input\n(L2 norms)")
        whole_ticks(lower)
        for axes in (upper, lower):
            mark(axes, layer, label=axes is upper)
        legend(figure, 4, upper)


def plot_stability(evidence: Evidence, layer: int | None, path: Path) -> None:
    """The sink's output norm by layer, one curve per prompt (Appendix D, Fig. 5 a and 10)."""
    with drawing(path, figsize=(9, 7)) as (figure, axes):
        for index, trace in enumerate(evidence.traces):
            curve = trace.output[1:, trace.sink]
            label = f"{trace.prompt.kind}, {len(trace.prompt.tokens)} tokens"
            axes.semilogy(curve, label=label, alpha=0.85, **style(index))
        axes.set_ylabel("L2 norm of the sink's state\nafter the layer")
        whole_ticks(axes)
        mark(axes, layer, label=True)
        legend(figure, 3, axes)


def plot_direction(evidence: Evidence, layer: int | None, path: Path) -> None:
    """The sink's values by dimension and layer, and cosines between inputs (Fig. 5 b and c)."""
    from matplotlib.colors import LogNorm

    states = np.abs(evidence.traces[0].states[1:])
    with drawing(path, 2, 1, figsize=(9, 9)) as (figure, (upper, lower)):
        floor = max(float(np.quantile(states, 0.5)), 1e-9)
        image = upper.pcolormesh(
            np.maximum(states, floor),
            norm=LogNorm(floor, max(float(states.max()), 2 * floor)),
            cmap="cividis",
            rasterized=True,
        )
        figure.colorbar(image, ax=upper, label="|value|")
        upper.set_xlabel("dimension of the sink's state")
        upper.set_ylabel("decoder layer")
        if layer is not None:
            upper.axhline(layer, color=SINK, linestyle=":", linewidth=2.5)
            upper.set_title(f"dotted: before ME Layer {layer}", fontsize=14)
        upper.invert_yaxis()
        against_first = evidence.cosines[1:, 0, :].T
        image = lower.imshow(
            against_first, aspect="auto", cmap="cividis", vmin=min(0.0, against_first.min()), vmax=1
        )
        figure.colorbar(image, ax=lower, label="cosine with the first prompt")
        lower.set_yticks(
            range(len(evidence.traces)), [trace.prompt.kind for trace in evidence.traces]
        )
        whole_ticks(lower)
        if layer is not None:
            lower.axvline(layer - 0.5, color=SINK, linestyle=":", linewidth=2.5)


def plot_knockouts(evidence: Evidence, layer: int | None, path: Path) -> None:
    """The sink's norm without the ME Layer's FFN or the norm before it (Appendix B, Fig. 9)."""
    names = {"ffn": "FFN output removed", "norm": "norm before the FFN bypassed"}
    with drawing(path, figsize=(9, 6)) as (figure, axes):
        axes.semilogy([row.sink for row in evidence.rows], label="intact model", **style(1))
        for index, knockout in zip((0, 3), evidence.knockouts, strict=False):
            axes.semilogy(knockout.norms, label=names[knockout.part], **style(index))
        axes.semilogy(
            [row.others for row in evidence.rows], color="0.5", label="other tokens, intact model"
        )
        axes.set_ylabel("L2 norm of the sink's state\nafter the layer")
        whole_ticks(axes)
        mark(axes, layer, label=True)
        legend(figure, 2, axes)


def plot_attention(evidence: Evidence, layer: int | None, path: Path) -> None:
    """Share of attention on the sink by layer and head (§6)."""
    attention = _present(evidence.attention)
    with drawing(path, figsize=(9, 5.5)) as (figure, axes):
        image = axes.imshow(
            attention.to_sink.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, origin="lower"
        )
        figure.colorbar(image, ax=axes, label="share of attention on the sink")
        axes.set_ylabel("attention head")
        whole_ticks(axes)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if layer is not None:
            axes.axvline(layer + 0.5, color=SINK, linestyle=":", linewidth=2.5)
            axes.set_title(f"dotted: between ME Layer {layer} and layer {layer + 1}", fontsize=14)


def plot_heatmaps(evidence: Evidence, _layer: int | None, path: Path) -> None:
    """One prompt's attention: ME Layer, the layer after, and that layer masked (Fig. 7, 8)."""
    from matplotlib.colors import PowerNorm

    heatmaps = _present(evidence.attention).heatmaps
    count = len(heatmaps)
    with drawing(path, 1, count, figsize=(3.7 * count, 4.2), squeeze=False) as (figure, grid):
        for axes, (title, weights) in zip(grid[0], heatmaps.items(), strict=True):
            future = np.triu(np.ones_like(weights, dtype=bool), 1)
            image = axes.imshow(
                np.ma.masked_array(weights, future), cmap="cividis", norm=PowerNorm(0.5, 0, 1)
            )
            axes.set_title(title)
            axes.set_xlabel("attended token")
        grid[0][0].set_ylabel("query token")
        figure.colorbar(image, ax=grid[0][-1], label="weight, mean over heads", shrink=0.8)


def plot_mask(evidence: Evidence, _layer: int | None, path: Path) -> None:
    """What S holds of the sink's attention input, and attention on the sink before and under the
    mask (§4)."""
    effect, attention = _present(evidence.mask), evidence.attention
    with drawing(path, 2, 1, figsize=(9, 8)) as (_, (upper, lower)):
        order = np.argsort(-effect.inputs, kind="stable")
        chosen = np.isin(order, effect.dimensions)
        ranks = np.arange(len(order))
        sizes = np.maximum(effect.inputs[order], effect.inputs.max() * 1e-6)
        upper.semilogy(ranks[~chosen], sizes[~chosen], ".", color=OTHERS, label="kept")
        upper.semilogy(ranks[chosen], sizes[chosen], "D", color=SINK, ms=5, label="masked (S)")
        upper.set_xlabel("dimension, by size")
        upper.set_ylabel(f"|attention input|\nof the sink, layer {effect.layer}")
        upper.grid(axis="y", alpha=0.3)
        upper.legend(frameon=False)
        if attention is not None:
            lower.plot(np.nanmean(attention.to_sink, axis=1), label="unmasked", **style(0))
            if attention.to_sink_masked is not None:
                label = f"layer {effect.layer} masked"
                lower.plot(np.nanmean(attention.to_sink_masked, axis=1), label=label, **style(1))
            lower.legend(frameon=False)
        lower.set_ylabel("attention on the sink\n(mean over heads)")
        whole_ticks(lower)
        mark(lower, None)


def _present(found: _Found | None) -> _Found:
    """Evidence that is there; a figure is not asked for where it is not."""
    if found is None:
        raise ValueError("this was not measured, so there is nothing to draw")
    return found


def plot_comparison(found: Mapping[str, tuple[Emergence, int]], path: Path) -> None:
    """The sink's norm over the other tokens' by layer, one curve per model (Table 8).

    found: by name, an emergence and the model's number of layers, of which a streamed analysis
    has seen only the first ones.
    """
    with drawing(path, figsize=(9, 5 + 0.3 * len(found))) as (figure, axes):
        for index, (name, (emergence, depth)) in enumerate(found.items()):
            ratios = [row.ratio for row in emergence.rows]
            places = (np.arange(len(ratios)) + 1) / depth
            words = "no ME Layer" if emergence.layer is None else f"ME Layer {emergence.layer}"
            line = style(index)
            axes.semilogy(places, ratios, label=f"{name}: {words}, {depth} layers", **line)
            if emergence.layer is not None:
                ring = {"marker": "o", "markersize": 16, "fillstyle": "none", "markeredgewidth": 2}
                place, ratio = places[emergence.layer], ratios[emergence.layer]
                axes.plot(place, ratio, color=line["color"], **ring)
        axes.set_ylabel("sink / other tokens\n(L2 norms of the layer's output)")
        axes.set_xlabel("depth: layers done / all layers (ring: ME Layer)")
        axes.grid(axis="y", alpha=0.3)
        legend(figure, 1, axes)


_FOLD_COLOURS = {"norm": "#0072B2", "qkv": "#009E73", "sink": "#D55E00"}
_SELECT_LINES = {"weight": ("-", "o"), "activation": ("--", "s"), "random": (":", "^")}
_SCOPES = {"first": "first layer after the ME Layer", "all": "all layers after the ME Layer"}


@dataclass(frozen=True)
class SweptPoint:
    """A point of a sweep that has a score.

    Attributes:
        rate, scope, fold, select, strength: its settings.
        score: lower is better.
        on_front: whether a ring marks it, as a point on the Pareto front.
    """

    rate: float
    scope: str
    fold: str
    select: str
    strength: float
    score: float
    on_front: bool


def plot_sweep(points: Sequence[SweptPoint], path: Path, *, base: float | None, words: str) -> None:
    """Score over rate: a panel per scope and strength, a line per fold and selection.

    Args:
        points: in any order.
        path: of the PNG.
        base: the score of the model as it is; None where that has none.
        words: what the score is, with its unit.
    """
    rows = sorted(points, key=lambda point: point.rate)
    panels = sorted({(row.strength, row.scope) for row in rows}, key=lambda p: (p[0], p[1]))
    panels.sort(key=lambda panel: panel[1] != "first")
    several = len({strength for strength, _ in panels}) > 1
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    shape: dict[str, Any] = {
        "figsize": (7 * columns, 5 * lines + 1.6),
        "sharex": True,
        "squeeze": False,
    }
    with drawing(path, lines, columns, **shape) as (figure, grid):
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for (strength, scope), axes in zip(panels, grid.flat, strict=False):
            if base is not None:
                axes.axhline(base, color="0.5", linewidth=1.5, label="base")
            _sweep_lines(
                axes,
                [row for row in rows if (row.strength, row.scope) == (strength, scope)],
            )
            axes.set_title(_SCOPES[scope] + (f", strength {strength:g}" if several else ""))
            axes.set_xlabel("rate: share of dimensions masked")
            axes.grid(axis="y", alpha=0.3)
        for line in grid:
            line[0].set_ylabel(words)
        legend(figure, 4, grid[0][0])


def _sweep_lines(axes: Any, rows: Sequence[SweptPoint]) -> None:
    """The lines of one panel; rows in the order of their rates."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for fold, colour in _FOLD_COLOURS.items():
        for select, (line, marker) in _SELECT_LINES.items():
            chosen = [row for row in rows if (row.fold, row.select) == (fold, select)]
            if not chosen:
                continue
            axes.plot(
                [row.rate for row in chosen],
                [row.score for row in chosen],
                color=colour,
                linestyle=line,
                marker=marker,
                linewidth=2,
                label=f"{fold}, {select}",
            )
    ringed = [row for row in rows if row.on_front]
    axes.plot(
        [row.rate for row in ringed],
        [row.score for row in ringed],
        linestyle="none",
        marker="o",
        markersize=15,
        fillstyle="none",
        color="black",
        label="on the Pareto front",
    )
    rates = list(dict.fromkeys(row.rate for row in rows))
    shown = rates if len(rates) <= 8 else [rates[0], rates[len(rates) // 2], rates[-1]]
    axes.set_xscale("log")
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    scores = [row.score for row in rows]
    if min(scores) > 0 and max(scores) > 5 * min(scores):
        axes.set_yscale("log")
        wide = max(scores) > 1e4 * min(scores)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.5g}"))
