"""Figures: drawn without a display, readable at half size and by colour-blind eyes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.method.locate import Emergence

if TYPE_CHECKING:
    from surgery.measure.attention import AttentionEvidence
    from surgery.measure.evidence import Evidence
    from surgery.measure.traces import PromptTrace

# Okabe and Ito's palette.
SINK, OTHERS, MARK = "#D55E00", "#0072B2", "#009E73"
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", "-.", ":")
_STYLE = {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False}
_LAYER = "decoder layer (counted from 0)"


@contextmanager
def _drawing(path: Path, *shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, by pyplot.subplots; written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
        try:
            yield figure, axes
            # No date or version in the file: the same input gives the same bytes.
            figure.savefig(path, dpi=110, metadata={"Software": None})
        finally:
            pyplot.close(figure)


def _mark(axes: Any, layer: int | None, *, label: bool = False) -> None:
    """A line at the ME Layer, and a light grid."""
    axes.grid(axis="y", alpha=0.3)
    if layer is not None:
        axes.axvline(
            layer,
            color=MARK,
            linestyle=":",
            linewidth=2.5,
            label=f"ME Layer {layer}" if label else None,
        )


def _style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th curve; no two of the first eight are alike."""
    return {
        "color": _PALETTE[index % len(_PALETTE)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markersize": 5,
    }


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """A legend above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def _whole_ticks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_layers(emergence: Emergence, path: Path, *, title: str) -> None:
    """Sink and other tokens' output norms by layer, and the sink's magnification, as a PNG."""
    rows = emergence.rows
    layers = [row.layer for row in rows]
    with _drawing(path, 2, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 1)) as (figure, both):
        upper, lower = both
        upper.semilogy(
            layers, [row.sink_output for row in rows], "o-", color=SINK, label="sink token"
        )
        upper.semilogy(
            layers, [row.others for row in rows], "s--", color=OTHERS, label="other tokens (median)"
        )
        upper.set_ylabel("L2 norm of the layer's output")
        upper.set_title(title)
        lower.bar(layers, [row.magnification for row in rows], color=SINK)
        lower.set_yscale("log")
        lower.set_ylabel("sink: output / input")
        lower.set_xlabel(_LAYER)
        _whole_ticks(lower)
        for axes in (upper, lower):
            _mark(axes, emergence.layer, label=axes is upper)
        _legend(figure, upper, 3)


def plot_parts(evidence: Evidence, layer: int | None, path: Path) -> None:
    """Norms after the pre-FFN norm (WeightNorm), the FFN and the layer (Fig. 1, 2, 11 to 20)."""
    panels = (
        ("weight_norm", "WeightNorm\n(norm before the FFN)"),
        ("ffn_output", "FFN output"),
        ("output", "layer output"),
    )
    with _drawing(path, 3, 1, figsize=(9, 10), sharex=True) as (figure, all_axes):
        for axes, (name, label) in zip(all_axes, panels, strict=True):
            _sink_and_others(axes, evidence.traces, name)
            axes.set_ylabel(label)
            _mark(axes, layer, label=True)
        figure.supylabel("L2 norm, median over the prompts", fontsize=14)
        _legend(figure, all_axes[-1], 2)
        all_axes[-1].set_xlabel(_LAYER)
        _whole_ticks(all_axes[-1])


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
    with _drawing(path, 2, 1, figsize=(9, 7), sharex=True) as (figure, (upper, lower)):
        upper.plot(layers, [row.delta_fraction for row in evidence.rows], "o-", color=SINK)
        upper.set_ylabel(f"ΔFrac\n(top {evidence.share:.0%} of the gains)")
        lower.plot(layers, [row.delta_kl for row in evidence.rows], "s--", color=OTHERS)
        lower.set_ylabel("ΔKL (nats)")
        lower.set_xlabel(_LAYER)
        _whole_ticks(lower)
        for axes in (upper, lower):
            axes.axhline(0, color="black", linewidth=1)
            _mark(axes, layer, label=axes is upper)
        _legend(figure, upper, 1)


def plot_ffn(evidence: Evidence, layer: int | None, path: Path) -> None:
    """Projection concentration after gate, up and down, and amplification (eq. 3, Fig. 4)."""
    layers = [row.layer for row in evidence.rows]
    with _drawing(path, 2, 1, figsize=(9, 7), sharex=True) as (figure, (upper, lower)):
        for index, role in enumerate(("gate", "up", "down")):
            values = [getattr(row, role) for row in evidence.rows]
            if not np.isnan(values).all():
                upper.plot(layers, values, label=role, **_style(index))
        upper.axhline(0, color="black", linewidth=1)
        upper.set_ylabel("concentration\n(sink − others)")
        lower.bar(layers, [row.amplification for row in evidence.rows], color=SINK)
        lower.set_yscale("log")
        lower.set_ylabel("sink: FFN output / input\n(L2 norms)")
        lower.set_xlabel(_LAYER)
        _whole_ticks(lower)
        for axes in (upper, lower):
            _mark(axes, layer, label=axes is upper)
        _legend(figure, upper, 4)


def plot_stability(evidence: Evidence, layer: int | None, path: Path) -> None:
    """The sink's output norm by layer, one curve per prompt (Appendix D, Fig. 5 a and 10)."""
    with _drawing(path, figsize=(9, 7)) as (figure, axes):
        for index, trace in enumerate(evidence.traces):
            curve = trace.output[1:, trace.sink]
            label = f"{trace.prompt.kind}, {len(trace.prompt.tokens)} tokens"
            axes.semilogy(curve, label=label, alpha=0.85, **_style(index))
        axes.set_ylabel("L2 norm of the sink's state\nafter the layer")
        axes.set_xlabel(_LAYER)
        _whole_ticks(axes)
        _mark(axes, layer, label=True)
        _legend(figure, axes, 3)


def plot_direction(evidence: Evidence, layer: int | None, path: Path) -> None:
    """The sink's values by dimension and layer, and cosines between inputs (Fig. 5 b and c)."""
    from matplotlib.colors import LogNorm

    states = np.abs(evidence.traces[0].states[1:])
    with _drawing(path, 2, 1, figsize=(9, 9)) as (figure, (upper, lower)):
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
        lower.set_xlabel(_LAYER)
        _whole_ticks(lower)
        if layer is not None:
            lower.axvline(layer - 0.5, color=SINK, linestyle=":", linewidth=2.5)


def plot_knockouts(evidence: Evidence, layer: int, path: Path) -> None:
    """The sink's norm without the ME Layer's FFN or the norm before it (Appendix B, Fig. 9)."""
    names = {"ffn": "FFN output removed", "norm": "norm before the FFN bypassed"}
    with _drawing(path, figsize=(9, 6)) as (figure, axes):
        axes.semilogy([row.sink for row in evidence.rows], label="intact model", **_style(1))
        for index, knockout in zip((0, 3), evidence.knockouts, strict=False):
            axes.semilogy(knockout.norms, label=names[knockout.part], **_style(index))
        axes.semilogy(
            [row.others for row in evidence.rows], color="0.5", label="other tokens, intact model"
        )
        axes.set_ylabel("L2 norm of the sink's state\nafter the layer")
        axes.set_xlabel(_LAYER)
        _whole_ticks(axes)
        _mark(axes, layer, label=True)
        _legend(figure, axes, 2)


def plot_attention(attention: AttentionEvidence, layer: int | None, path: Path) -> None:
    """Share of attention on the sink by layer and head (§6)."""
    with _drawing(path, figsize=(9, 5.5)) as (figure, axes):
        image = axes.imshow(
            attention.to_sink.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, origin="lower"
        )
        figure.colorbar(image, ax=axes, label="share of attention on the sink")
        axes.set_xlabel(_LAYER)
        axes.set_ylabel("attention head")
        _whole_ticks(axes)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if layer is not None:
            axes.axvline(layer + 0.5, color=SINK, linestyle=":", linewidth=2.5)
            axes.set_title(f"dotted: between ME Layer {layer} and layer {layer + 1}", fontsize=14)


def plot_heatmaps(attention: AttentionEvidence, path: Path) -> None:
    """One prompt's attention: ME Layer, the layer after, and that layer masked (Fig. 7, 8)."""
    from matplotlib.colors import PowerNorm

    count = len(attention.heatmaps)
    with _drawing(path, 1, count, figsize=(3.7 * count, 4.2), squeeze=False) as (figure, grid):
        for axes, (title, weights) in zip(grid[0], attention.heatmaps.items(), strict=True):
            future = np.triu(np.ones_like(weights, dtype=bool), 1)
            image = axes.imshow(
                np.ma.masked_array(weights, future), cmap="cividis", norm=PowerNorm(0.5, 0, 1)
            )
            axes.set_title(title)
            axes.set_xlabel("attended token")
        grid[0][0].set_ylabel("query token")
        figure.colorbar(image, ax=grid[0][-1], label="weight, mean over heads", shrink=0.8)


def plot_mask(evidence: Evidence, path: Path) -> None:
    """What S holds of the sink's attention input, and attention on the sink before and under the
    mask (§4)."""
    effect, attention = evidence.mask, evidence.attention
    if effect is None:
        raise ValueError("there is no mask to draw")
    with _drawing(path, 2, 1, figsize=(9, 8)) as (_, (upper, lower)):
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
            lower.plot(np.nanmean(attention.to_sink, axis=1), label="unmasked", **_style(0))
            if attention.to_sink_masked is not None:
                label = f"layer {effect.layer} masked"
                lower.plot(np.nanmean(attention.to_sink_masked, axis=1), label=label, **_style(1))
            lower.legend(frameon=False)
        lower.set_ylabel("attention on the sink\n(mean over heads)")
        lower.set_xlabel(_LAYER)
        _whole_ticks(lower)
        _mark(lower, None)


def plot_comparison(found: Mapping[str, tuple[Emergence, int]], path: Path) -> None:
    """The sink's norm over the other tokens' by layer, one curve per model (Table 8).

    found: by name, an emergence and the model's number of layers, of which a streamed analysis
    has seen only the first ones.
    """
    with _drawing(path, figsize=(9, 5 + 0.3 * len(found))) as (figure, axes):
        for index, (name, (emergence, depth)) in enumerate(found.items()):
            ratios = [row.ratio for row in emergence.rows]
            places = (np.arange(len(ratios)) + 1) / depth
            words = "no ME Layer" if emergence.layer is None else f"ME Layer {emergence.layer}"
            style = _style(index)
            axes.semilogy(places, ratios, label=f"{name}: {words}, {depth} layers", **style)
            if emergence.layer is not None:
                place, ratio = places[emergence.layer], ratios[emergence.layer]
                axes.plot(
                    place,
                    ratio,
                    marker="o",
                    markersize=16,
                    fillstyle="none",
                    color=style["color"],
                    markeredgewidth=2,
                )
        axes.set_ylabel("sink / other tokens\n(L2 norms of the layer's output)")
        axes.set_xlabel("depth: layers done / all layers (ring: ME Layer)")
        axes.grid(axis="y", alpha=0.3)
        _legend(figure, axes, 1)


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
    shape = {"figsize": (7 * columns, 5 * lines + 1.6), "sharex": True, "squeeze": False}
    with _drawing(path, lines, columns, **shape) as (figure, grid):
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
        _legend(figure, grid[0][0], 4)


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
