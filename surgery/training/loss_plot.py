"""The course of a training as a picture: loss, and what the mask took away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Panels from top to bottom: axis label, and the lines in it as (key in the logs, label, colour).
PANELS = (
    (
        "loss",
        (("loss", "training loss", "#1b6ca8"), ("eval_loss", "held-out loss", "#c8553d")),
    ),
    ("reward", (("reward", "mean reward", "#b07d2b"),)),
    ("share", (("mask_energy", "share of the sink's energy masked", "#4a7c59"),)),
    ("1 − cosine", (("sink_drift", "sink drift since the start", "#8a5a83"),)),
)


FROM_ZERO = ("share", "1 − cosine")


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draw the logs of a training to a PNG; False, and no file, where they hold no loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (label, [(name, color, _points(history, key)) for key, name, color in lines])
        for label, lines in PANELS
    ]
    panels = [(label, [line for line in lines if line[2]]) for label, lines in panels]
    panels = [(label, lines) for label, lines in panels if lines]
    if not panels or panels[0][0] != PANELS[0][0]:
        return False
    heights = [2.2, *([1.0] * (len(panels) - 1))]
    figure = Figure(figsize=(7.5, 1.4 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axis, (label, lines) in zip(axes, panels, strict=True):
        for name, color, points in lines:
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 30 else None
            axis.plot(steps, values, label=name, color=color, marker=marker, markersize=3.5)
        axis.set_ylabel(label, fontsize=9)
        if label in FROM_ZERO:
            axis.set_ylim(0, max(1e-6, 1.15 * max(axis.get_ylim()[1], 0)))
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_title(title, fontsize=11, loc="left")
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[key])) for row in history if row.get(key) is not None]
