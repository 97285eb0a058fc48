"""Numbers as people and as JSON read them, and the columns of the table by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Significant digits of a measurement in the JSON.
DIGITS = 6

# The table by layer: heading, field of LayerEvidence, what it is.
COLUMNS = (
    ("sink", "sink", "L2 norm of the sink after the layer"),
    ("others", "others", "the same, median of the other tokens"),
    ("× layer before", "magnification", "sink: output over the layer before (Table 8)"),
    ("FFN, sink", "ffn_sink", "L2 norm of the FFN's output for the sink"),
    ("FFN, others", "ffn_others", "the same, median of the other tokens"),
    ("WeightNorm, sink", "weight_norm_sink", "L2 norm after the norm before the FFN (Fig. 2)"),
    ("WeightNorm, others", "weight_norm_others", "the same, median of the other tokens"),
    ("ΔFrac", "delta_fraction", "eq. 1"),
    ("ΔKL, nats", "delta_kl", "eq. 2"),
    ("C gate", "gate", "projection concentration, sink − others (eq. 3)"),
    ("C up", "up", "the same after up"),
    ("C down", "down", "the same after down"),
    ("FFN ×", "amplification", "sink: FFN output over FFN input (Fig. 4)"),
    ("cosine", "cosine", "between the inputs' sink states, mean over pairs (Fig. 5 c)"),
    ("attention", "attention", "share on the sink, mean over heads (Fig. 7)"),
    ("no FFN", "without_ffn", "share of the sink's norm left without the ME Layer's FFN (Fig. 9)"),
    ("no norm", "without_norm", "the same without the norm before that FFN"),
)


def rounded(value: Any) -> Any:
    """Plain data for JSON: arrays as lists, floats with six significant digits."""
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return value


def short(value: float | None) -> str:
    """A measurement with four significant digits; a dash where there is none."""
    if value is None or value != value:
        return "–"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
