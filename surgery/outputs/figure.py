"""The style that all figures share, and the figure of a conversion: norms by layer.

Figures are drawn without a display, readable at half size and by colour-blind eyes, and the same
input gives the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.method.locate import Emergence

logger = logging.getLogger(__name__)

# Okabe and Ito's palette.
SINK, OTHERS, MARK = "#D55E00", "#0072B2", "#009E73"
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", "-.", ":")
_STYLE = {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False}
LAYER_AXIS = "decoder layer (counted from 0)"


@contextmanager
def drawing(
    path: Path, *shape: int, figsize: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, written as a PNG at the end.

    Args:
        path: of the PNG.
        shape: rows and columns of axes.
        figsize: width and height in inches.
        options: of matplotlib's `Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        # Not by pyplot, which would change the backend of whoever calls this in a notebook.
        figure = Figure(layout="constrained", figsize=figsize)
        yield figure, figure.subplots(*shape, **options)
        # No date or version in the file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        logger.debug("drew %s", path)


def mark(axes: Any, layer: int | None, *, label: bool = False) -> None:
    """A line at the ME Layer, and a light grid."""
    axes.grid(axis="y", alpha=0.3)
    if layer is not None:
        words = f"ME Layer {layer}" if label else None
        axes.axvline(layer, color=MARK, linestyle=":", linewidth=2.5, label=words)


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th curve; no two of the first eight are alike."""
    return {
        "color": _PALETTE[index % len(_PALETTE)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markersize": 5,
    }


def legend(figure: Any, columns: int, *panels: Any) -> None:
    """One legend above all panels, where it hides nothing; a label that recurs appears once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        place = "outside upper center"
        figure.legend(handles.values(), handles, loc=place, ncols=columns, frameon=False)


def whole_ticks(axes: Any, words: str = LAYER_AXIS) -> None:
    """A horizontal axis of whole numbers, such as layers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(words)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_layers(emergence: Emergence, path: Path, *, title: str) -> None:
    """Sink and other tokens' output norms by layer, and the sink's magnification, as a PNG."""
    rows = emergence.rows
    layers = [row.layer for row in rows]
    with drawing(path, 2, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 1)) as (figure, both):
        upper, lower = both
        sink, others = [row.sink_output for row in rows], [row.others for row in rows]
        upper.semilogy(layers, sink, "o-", color=SINK, label="sink token")
        upper.semilogy(layers, others, "s--", color=OTHERS, label="other tokens (median)")
        upper.set_ylabel("L2 norm of the layer's output")
        upper.set_title(title)
        lower.bar(layers, [row.magnification for row in rows], color=SINK)
        lower.set_yscale("log")
        lower.set_ylabel("sink: output / input")
        whole_ticks(lower)
        for axes in both:
            mark(axes, emergence.layer, label=axes is upper)
        legend(figure, 3, upper)
