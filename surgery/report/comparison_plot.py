"""The figure of a comparison: curves by position, and each task's difference with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.outputs.figure import drawing, legend, style

if TYPE_CHECKING:
    from surgery.outputs.comparison import Comparison

# Intervals over few documents can be unbounded; the axis ends here.
_REACH = 1.5


def plot_changes(result: Comparison, path: Path) -> None:
    """Loss and KL by position for every model, and the tasks' differences from base, as a PNG."""
    names = [measure.name for measure in result.text]
    names += [name for row in result.tasks for name in row.variants]
    styles = {name: style(index) for index, name in enumerate(dict.fromkeys(names))}
    height = sum(0.6 + 0.4 * (len(row.variants) - 1) for row in result.tasks)
    heights = ([3.2, 3.2] if result.text else []) + ([max(2.5, height)] if result.tasks else [])
    shape: dict[str, Any] = {
        "figsize": (9, sum(heights) + 1),
        "height_ratios": heights,
        "squeeze": False,
    }
    with drawing(path, len(heights), 1, **shape) as (figure, grid):
        panels = list(grid[:, 0])
        if result.text:
            _curves(panels, result, styles)
        if result.tasks:
            _differences(panels[-1], result, styles)
        legend(figure, 3, *panels)


def _curves(panels: Sequence[Any], result: Comparison, styles: Mapping[str, Any]) -> None:
    upper, lower = panels[:2]
    for measure in result.text:
        line = {"label": measure.name, **styles[measure.name]}
        upper.plot(*_binned(measure.loss_by_position), **line)
        if max(measure.kl_by_position) > 0:
            lower.plot(*_binned(measure.kl_by_position), **line)
    upper.set_ylabel("loss\n(nats per token)")
    lower.set_ylabel("KL(base ‖ ·)\n(nats)")
    lower.set_xlabel("position in the window (the first token is 0)")
    if lower.lines:
        lower.set_yscale("log")
    for axes in (upper, lower):
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlim(-0.2, len(result.text[0].kl_by_position) * 1.1)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(axis="y", alpha=0.3)


def _binned(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over bins that widen with the position: single ones at first, smooth later on."""
    edges = [0, 1, 2, 3, 4, 6, 8]
    while edges[-1] < len(values):
        edges.append(round(edges[-1] * 1.4))
    places, means = [], []
    for start, end in pairwise(edges):
        part = values[start : min(end, len(values))]
        if part:
            places.append(start + (len(part) - 1) / 2)
            means.append(float(np.mean(part)))
    return places, means


def _differences(axes: Any, result: Comparison, styles: Mapping[str, Any]) -> None:
    place, ticks, labels = 0.0, [], []
    for row in result.tasks:
        first = place
        for name, found in row.variants.items():
            difference = found.difference
            if difference is None:
                continue
            middle = difference.difference
            reach = [
                [middle - max(difference.low, -_REACH)],
                [min(difference.high, _REACH) - middle],
            ]
            point = {**styles[name], "linestyle": "none", "markersize": 8}
            axes.errorbar(middle, place, xerr=reach, label=name, capsize=4, **point)
            place += 0.4
        ticks.append((first + place - 0.4) / 2)
        better = "" if row.higher_is_better else "\n(lower is better)"
        labels.append(f"{row.task}\n{row.metric}{better}")
        place += 0.6
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("difference from base, 95 % interval")
