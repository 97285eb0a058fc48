"""Figures: drawn without a display, readable at half size and by colour-blind eyes."""

from __future__ import annotations

from pathlib import Path

from surgery.locate import Emergence

# Okabe and Ito's palette.
SINK, OTHERS, MARK = "#D55E00", "#0072B2", "#009E73"


def plot_layers(emergence: Emergence, path: Path, *, title: str) -> None:
    """Sink and other tokens' output norms by layer, and the sink's magnification, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = emergence.rows
    layers = [row.layer for row in rows]
    with pyplot.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
        )
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
        lower.set_xlabel("decoder layer (counted from 0)")
        for axes in (upper, lower):
            axes.grid(axis="y", alpha=0.3)
            if emergence.layer is not None:
                axes.axvline(
                    emergence.layer,
                    color=MARK,
                    linestyle=":",
                    linewidth=2.5,
                    label=f"ME Layer {emergence.layer}" if axes is upper else None,
                )
        upper.legend(frameon=False)
        # No date or version in the file: the same conversion gives the same bytes.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
