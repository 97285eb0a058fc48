"""The course of a training as a picture: loss, and what the mask took away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.outputs.figure import drawing, style, whole_ticks

# Panels from top to bottom: axis label, and the lines in it as (key in the logs, label).
PANELS = (
    ("loss", (("loss", "training loss"), ("eval_loss", "held-out loss"))),
    ("reward", (("reward", "mean reward"),)),
    ("share", (("mask_energy", "share of the sink's energy masked"),)),
    ("1 − cosine", (("sink_drift", "sink drift since the start"),)),
)
FROM_ZERO = ("share", "1 − cosine")
# Above so many points, markers hide the line.
_MARKED = 30


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draw the logs of a training to a PNG.

    Args:
        history: the trainer's logs, each with its step.
        path: of the PNG.
        title: above it.

    Returns:
        False, and no file, where the logs hold no loss.
    """
    panels = [
        (axis, [(label, points) for key, label in lines if (points := _points(history, key))])
        for axis, lines in PANELS
    ]
    panels = [(axis, lines) for axis, lines in panels if lines]
    if not panels or panels[0][0] != PANELS[0][0]:
        return False
    heights = [4.0, *([2.2] * (len(panels) - 1))]
    shape: dict[str, Any] = {
        "figsize": (9, sum(heights) + 1),
        "height_ratios": heights,
        "squeeze": False,
    }
    with drawing(path, len(panels), 1, sharex=True, **shape) as (_, grid):
        index = 0
        for axes, (name, lines) in zip(grid[:, 0], panels, strict=True):
            for label, points in lines:
                line = style(index)
                if len(points) >= _MARKED:
                    line["marker"] = ""
                axes.plot(*zip(*points, strict=True), label=label, **line)
                index += 1
            axes.set_ylabel(name)
            if name in FROM_ZERO:
                axes.set_ylim(0, max(1e-6, 1.15 * max(axes.get_ylim()[1], 0)))
            axes.legend(frameon=False)
            axes.grid(axis="y", alpha=0.3)
        grid[0, 0].set_title(title)
        whole_ticks(grid[-1, 0], "step")
    return True


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[key])) for row in history if row.get(key) is not None]
