"""The figure of a conversion."""

from surgery.report.plots import plot_layers

__all__ = ["plot_layers"]
