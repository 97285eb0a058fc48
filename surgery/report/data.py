"""An analysis as plain data: what `analyze --json` prints and the report keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.measure.attention import HEATMAP_TOKENS
from surgery.measure.evidence import Evidence
from surgery.method.locate import Emergence
from surgery.outputs.manifest import clean_numbers
from surgery.report.numbers import rounded, short

if TYPE_CHECKING:
    from surgery.jobs.analyze import Analysis
    from surgery.jobs.side_by_side import Compared

# How many of the sink's largest dimensions the JSON follows through the layers.
DIMENSIONS = 16


def summary(analysis: Analysis) -> dict[str, Any]:
    """What `analyze --json` prints for a model; with "evidence" where it was gathered."""
    emergence = analysis.emergence
    found = {
        "model": analysis.checkpoint.origin.name,
        "commit": analysis.checkpoint.origin.commit,
        "model_type": analysis.anatomy.model_type,
        "anatomy": analysis.anatomy.known_from,
        "depth": analysis.anatomy.depth,
        "hidden_size": analysis.anatomy.hidden_size,
        "emergence": emergence.as_dict(),
        "targets": {scope: list(analysis.targets(scope)) for scope in ("first", "all")},
        "streamed": analysis.streamed.summary() if analysis.streamed is not None else None,
    }
    if analysis.evidence is not None:
        found["evidence"] = evidence_data(analysis.evidence, emergence)
    return found


def evidence_data(found: Evidence, emergence: Emergence) -> dict[str, Any]:
    """The evidence as plain data of moderate size, floats with six significant digits."""
    first = found.traces[0]
    layer = emergence.layer if emergence.layer is not None else len(found.rows) - 1
    largest = np.argsort(-np.abs(first.states[layer + 1]), kind="stable")[:DIMENSIONS]
    data = {
        "share": found.share,
        "notes": list(found.notes),
        "parts": [None if part is None else asdict(part) for part in found.feed_forwards],
        "layers": [asdict(row) for row in found.rows],
        "prompts": [
            {
                "kind": trace.prompt.kind,
                "text": trace.prompt.text,
                "tokens": len(trace.prompt.tokens),
                "sink": trace.sink,
                "layer": vote.layer,
                "magnification": vote.magnification,
                "sink_norms": trace.output[:, trace.sink],
                "weight_norms": trace.weight_norm[:, :HEATMAP_TOKENS],
            }
            for trace, vote in zip(found.traces, emergence.votes, strict=True)
        ],
        "largest_dimensions": {
            "prompt": 0,
            "dimensions": largest,
            "values": first.states[:, largest].astype(np.float64),
        },
        "cosines": found.cosines,
        "knockouts": [vars(knockout) for knockout in found.knockouts],
        "attention": None if found.attention is None else vars(found.attention),
        "mask": None
        if found.mask is None
        else {key: value for key, value in vars(found.mask).items() if key != "inputs"},
    }
    cleaned: dict[str, Any] = clean_numbers(rounded(data))
    return cleaned


def comparison_data(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Per model, what `analyze --json` prints, or its name and an "error"."""
    return [
        summary(one.analysis)
        if one.analysis is not None
        else {"model": one.model, "error": str(one.error)}
        for one in compared
    ]


def comparison_curves(compared: Sequence[Compared]) -> dict[str, tuple[Emergence, int]]:
    """The emergences to overlay and the models' depths, by a name that no two models share."""
    known = [(one.model, one.analysis) for one in compared if one.analysis is not None]
    names = [analysis.checkpoint.origin.name for _, analysis in known]
    return {
        model if names.count(name) > 1 else name: (analysis.emergence, analysis.anatomy.depth)
        for (model, analysis), name in zip(known, names, strict=True)
    }


def table_row(model: str, analysis: Analysis | None) -> dict[str, str]:
    """One line of the paper's Table 8, and what supports it, as text by heading."""
    headings = ("model", "ME Layer", "magnification", "sink position", "layers", "confidence")
    if analysis is None:
        cells = (model, "not analysed", "–", "–", "–", "–")
    else:
        emergence = analysis.emergence
        positions = ", ".join(str(place) for place in emergence.sink_positions)
        name, depth = analysis.checkpoint.origin.name, str(analysis.anatomy.depth)
        if emergence.layer is None:
            cells = (name, "none found", "–", "–", depth, "–")
        else:
            factor = f"×{short(emergence.magnification)}"
            cells = (name, str(emergence.layer), factor, positions, depth, emergence.confidence)
    return dict(zip(headings, cells, strict=True))
