"""`surgery analyze --report`: one self-contained page, its figures, and all numbers as JSON."""

from __future__ import annotations

import base64
import gc
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import BadSettings, NoEmergence, SurgeryError
from surgery.files.resources import resource_folder
from surgery.files.staging import replacing
from surgery.files.text import write_text
from surgery.jobs.analyze import Analysis, analyze
from surgery.measure.attention import HEATMAP_TOKENS
from surgery.measure.evidence import Evidence
from surgery.method.locate import IGNORED_LAST_LAYERS, Emergence
from surgery.outputs.manifest import clean_numbers, tool_version, versions
from surgery.outputs.plan import existing_parent
from surgery.report import plots as figures
from surgery.reporter import SILENT, Reporter

PAGE, DATA, TEMPLATE = "index.html", "report.json", "report.html.jinja"
SCHEMA = 1
# How many of the sink's largest dimensions the JSON follows through the layers.
DIMENSIONS = 16
# Digits of a measurement in the JSON.
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


@dataclass(frozen=True)
class Compared:
    """One model of a comparison: its analysis, or why there is none."""

    model: str
    analysis: Analysis | None
    error: SurgeryError | None = None


@dataclass(frozen=True)
class Section:
    """One piece of evidence on the page. figure: a file in the report's folder."""

    title: str
    source: str
    text: str
    figure: str


# --------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------


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


def short(value: float | None) -> str:
    """A measurement with four significant digits; a dash where there is none."""
    if value is None or value != value:
        return "–"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# --------------------------------------------------------------------------------------------
# What the evidence says, in words
# --------------------------------------------------------------------------------------------


def _place(found: Evidence, name: str, layer: int, *, lowest: bool = False) -> str:
    """A figure at the ME Layer and how it ranks among the layers before the last ones.

    The last layers have an event of their own in many models (Appendix A).
    """
    values = np.array([getattr(row, name) for row in found.rows])
    here = values[layer]
    if np.isnan(here):
        return "was not measured"
    counted = values[: max(layer + 1, len(values) - IGNORED_LAST_LAYERS)]
    where = "of all layers" if len(counted) == len(values) else "before the last two layers"
    order = np.argsort(counted if lowest else -counted, kind="stable")
    rank = int(np.flatnonzero(order == layer)[0]) + 1
    word = "lowest" if lowest else "highest"
    if rank == 1:
        return f"is {short(here)}, the {word} {where}"
    best = int(order[0])
    return f"is {short(here)} (rank {rank} {where}; {word}: {short(values[best])}, layer {best})"


def sections(analysis: Analysis, folder: Path) -> list[Section]:
    """Draw every figure there is evidence for into `folder`, and say what it shows."""
    found, emergence = analysis.evidence, analysis.emergence
    if found is None:
        raise ValueError("the analysis was made without evidence")
    layer = emergence.layer
    made: list[Section] = []

    def add(title: str, source: str, text: str, name: str, draw: Callable[[Path], None]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a row without numbers stays empty in its figure
            draw(folder / name)
        made.append(Section(title, source, text, name))

    add(
        "Where the norm jumps",
        "Fig. 1; Table 8",
        _emergence_words(emergence),
        "layers.png",
        lambda path: figures.plot_layers(emergence, path, title=analysis.checkpoint.origin.name),
    )
    add(
        "Which part makes it jump",
        "§3.1, Fig. 1 and 2; Appendix H, Fig. 11 to 20",
        "The sink against the other tokens after the norm in front of the FFN (WeightNorm), after "
        "the FFN, and after the layer."
        + (
            _at(layer, found, "WeightNorm of the sink", "weight_norm_sink")
            if layer is not None
            else ""
        ),
        "parts.png",
        lambda path: figures.plot_parts(found, layer, path),
    )
    if any(not np.isnan(row.delta_fraction) for row in found.rows):
        add(
            "Does the norm's gain favour the sink?",
            "§3.1, eq. 1 and 2; Fig. 3",
            f"ΔFrac: how much more of the sink's energy than of the others' lies in the "
            f"{found.share:.0%} of dimensions with the largest gains. ΔKL: how much further the "
            "sink's distribution of energy is from that of the squared gains. The paper finds a "
            "positive ΔFrac and a negative ΔKL at the ME Layer."
            + (
                f" Here, at layer {layer}, ΔFrac {_place(found, 'delta_fraction', layer)}, and ΔKL "
                f"{_place(found, 'delta_kl', layer, lowest=True)}."
                if layer is not None
                else ""
            ),
            "alignment.png",
            lambda path: figures.plot_alignment(found, layer, path),
        )
    add(
        "What the FFN does to the sink",
        "§3.1, eq. 3; Fig. 4",
        "Projection concentration (1: all energy in one dimension) of the sink less the other "
        "tokens' mean, and the FFN's amplification of the sink. The paper finds all three at "
        "their maximum at the ME Layer." + _ffn_words(found, layer),
        "ffn.png",
        lambda path: figures.plot_ffn(found, layer, path),
    )
    add(
        "The same layer whatever the input?",
        "Appendix D; Fig. 5 a and 10",
        _stability_words(emergence),
        "stability.png",
        lambda path: figures.plot_stability(found, layer, path),
    )
    add(
        "The same direction whatever the input?",
        "§3.2, Fig. 5 b and c",
        _direction_words(found, layer),
        "direction.png",
        lambda path: figures.plot_direction(found, layer, path),
    )
    if found.knockouts and layer is not None:
        add(
            "What remains without its parts",
            "Appendix B; Fig. 9",
            _knockout_words(found, layer),
            "knockouts.png",
            lambda path: figures.plot_knockouts(found, layer, path),
        )
    attention = found.attention
    if attention is not None:
        add(
            "Attention on the sink",
            "§6, Fig. 7",
            "Share of attention on the sink by layer and head, mean over the query tokens after "
            "it." + _attention_words(found, layer),
            "attention.png",
            lambda path: figures.plot_attention(attention, layer, path),
        )
        if attention.heatmaps:
            add(
                "Attention before and under the mask",
                "§6, Fig. 7 and 8",
                f"The first {HEATMAP_TOKENS} tokens of prompt {attention.prompt + 1}: the ME "
                "Layer, the layer after it, and that layer under the mask.",
                "heatmaps.png",
                lambda path: figures.plot_heatmaps(attention, path),
            )
    if found.mask is not None:
        add(
            "What the mask does to the sink",
            "§4, eq. 4 and 5",
            _mask_words(found),
            "mask.png",
            lambda path: figures.plot_mask(found, path),
        )
    return made


def _at(layer: int, found: Evidence, what: str, name: str) -> str:
    return f" At layer {layer} the {what} {_place(found, name, layer)}."


def _emergence_words(emergence: Emergence) -> str:
    if emergence.layer is None:
        try:
            emergence.require()
        except NoEmergence as error:
            return str(error)[0].upper() + str(error)[1:]
    row = emergence.rows[emergence.layer or 0]
    return (
        f"Layer {row.layer} takes the sink from a norm of {short(row.sink_input)} to "
        f"{short(row.sink_output)}, {short(emergence.magnification)} times; the other tokens' "
        f"median is {short(row.others)}. The next best lasting layer magnifies "
        f"{short(emergence.runner_up)} times."
    )


def _ffn_words(found: Evidence, layer: int | None) -> str:
    if layer is None:
        return ""
    parts = [
        f"{role} {_place(found, role, layer)}"
        for role in ("gate", "up", "down")
        if not np.isnan(getattr(found.rows[layer], role))
    ]
    words = f" Here, at layer {layer}: {'; '.join(parts)}." if parts else ""
    return words + f" The amplification {_place(found, 'amplification', layer)}."


def _stability_words(emergence: Emergence) -> str:
    lengths = [vote.tokens for vote in emergence.votes]
    factors = [vote.magnification for vote in emergence.votes if vote.layer == emergence.layer]
    words = (
        f"One curve per prompt, {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens."
    )
    if emergence.layer is None:
        return words
    return (
        f"{words} {len(factors)} of {len(lengths)} name layer {emergence.layer}, magnifying the "
        f"sink {short(min(factors))} to {short(max(factors))} times."
    )


def _direction_words(found: Evidence, layer: int | None) -> str:
    words = (
        "Above: the sink's state in the first prompt, by dimension and layer. Below: its cosine "
        "with the first prompt's, for every prompt."
    )
    if layer is None or len(found.traces) < 2:
        return words
    state = np.square(found.traces[0].states[layer + 1].astype(np.float64))
    three = np.sort(state)[-3:].sum() / state.sum()
    before = float(np.mean(_pairs(found, layer)))
    here = float(np.mean(_pairs(found, layer + 1)))
    last = max(layer + 1, len(found.rows) - IGNORED_LAST_LAYERS)
    least = min(float(_pairs(found, row).min()) for row in range(layer + 1, last + 1))
    return (
        f"{words} Mean cosine between the prompts: {before:.5f} before layer {layer}, {here:.5f} "
        f"after it; no pair falls below {least:.5f} from there to layer {last - 1}. Three "
        f"dimensions hold {three:.1%} of the sink's energy after layer {layer}."
    )


def _pairs(found: Evidence, row: int) -> Any:
    from surgery.method.evidence import pairwise

    return pairwise(found.cosines[row])


def _knockout_words(found: Evidence, layer: int) -> str:
    names = {
        "ffn": f"Without the FFN's output at layer {layer}",
        "norm": "With the norm before that FFN bypassed (its input passed through)",
    }
    words = []
    for knockout in found.knockouts:
        where = (
            "no ME Layer is left"
            if knockout.emergence is None
            else f"the ME Layer is {knockout.emergence}"
        )
        words.append(
            f"{names[knockout.part]}, the sink leaves the layer with "
            f"{short(float(knockout.remaining[layer]))} times its intact norm, and {where}."
        )
    row = found.rows[layer]
    if any(k.part == "norm" and k.remaining[layer] > 1 for k in found.knockouts):
        words.append(
            "In the paper the activation survives without the norm, much reduced. Here it grows: "
            f"the norm scales the sink down, to {short(row.weight_norm_sink)}, before the FFN "
            "reads it."
        )
    return " ".join(words)


def _attention_words(found: Evidence, layer: int | None) -> str:
    if layer is None or layer + 1 >= len(found.rows):
        return ""
    here, after = found.rows[layer].attention, found.rows[layer + 1].attention
    return (
        f" Mean over the heads: {here:.1%} at the ME Layer, {after:.1%} at layer {layer + 1}, the "
        "first that reads the massive activation."
    )


def _mask_words(found: Evidence) -> str:
    effect = found.mask
    if effect is None:
        return ""
    words = [
        f"S, {len(effect.dimensions)} dimensions of layer {effect.layer}, holds "
        f"{effect.energy:.1%} of the energy of the sink's attention input. The mask turns that "
        f"input (cosine {effect.cosine:.4f})."
    ]
    if effect.key is not None and effect.value is not None:
        words.append(
            f"The sink's key changes by {effect.key:.1%} of its norm, its value by "
            f"{effect.value:.1%}."
        )
    if effect.to_sink is not None and effect.entropy is not None:
        words.append(
            f"Attention on the sink at layer {effect.layer} goes from {effect.to_sink[0]:.1%} to "
            f"{effect.to_sink[1]:.1%}, the entropy of attention from {effect.entropy[0]:.3f} to "
            f"{effect.entropy[1]:.3f} nats."
        )
    return " ".join(words)


# --------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise BadSettings unless a report may be written there: nothing, empty, or a report."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadSettings(f"{folder} is not a folder, so no report can be written there.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strange = sorted(n for n in names if n not in (PAGE, DATA) and not n.endswith(".png"))
    if names and (strange or not names.issuperset({PAGE, DATA})):
        holds = strange[0] if strange else "other files"
        raise BadSettings(
            f"{folder} is not an earlier report (it holds {holds}), so it will not be replaced; "
            "choose another folder for --report."
        )
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise BadSettings(f"{parent} is not a directory; choose another folder for --report.")


def write_report(analysis: Analysis, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the report of one model, analysed with evidence.

    settings: what the analysis was made with, shown on the page. Raises BadSettings where the
    folder holds anything but an earlier report.
    """
    folder = Path(folder).absolute()
    with replacing(folder, lambda: check_folder(folder)) as staged:
        made = sections(analysis, staged)
        data = summary(analysis)
        _finish(
            staged,
            data,
            settings,
            title=analysis.checkpoint.origin.name,
            analysis=analysis,
            table=[table_row(Compared(analysis.checkpoint.origin.name, analysis))],
            failures=[],
            sections=made,
            columns=COLUMNS,
            rows=analysis.evidence.rows if analysis.evidence else (),
        )


def write_comparison(
    compared: Sequence[Compared], folder: Path, settings: Mapping[str, Any]
) -> None:
    """Write the report that sets models side by side (Table 8 for the user's list)."""
    folder = Path(folder).absolute()
    with replacing(folder, lambda: check_folder(folder)) as staged:
        found = comparison_curves(compared)
        made = []
        if found:
            figures.plot_comparison(found, staged / "comparison.png")
            text = (
                "The sink's norm over the other tokens' median, after each layer. A ring marks the "
                "ME Layer. A curve that ends early belongs to a model that was read only until "
                "the emergence had lasted."
            )
            made.append(Section("Side by side", "Table 8; Appendix H", text, "comparison.png"))
        _finish(
            staged,
            {"models": comparison_data(compared)},
            settings,
            title=f"{len(compared)} models",
            analysis=None,
            table=[table_row(one) for one in compared],
            failures=[f"{one.model}: {one.error}" for one in compared if one.error is not None],
            sections=made,
            columns=(),
            rows=(),
        )


def _finish(
    folder: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    title: str,
    **context: Any,
) -> None:
    from jinja2.sandbox import SandboxedEnvironment

    about = {
        "schema": SCHEMA,
        "tool": f"wemask-surgery {tool_version()}",
        "versions": versions(),
        "settings": dict(settings),
    }
    text = json.dumps(clean_numbers({**about, **data}), ensure_ascii=True, separators=(",", ":"))
    write_text(folder / DATA, text + "\n")
    images = {
        path.name: base64.b64encode(path.read_bytes()).decode()
        for path in sorted(folder.glob("*.png"))
    }
    environment = SandboxedEnvironment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = short
    template = (resource_folder("hub_cards") / TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title, images=images, about=about, **context
    )
    write_text(folder / PAGE, page)


# --------------------------------------------------------------------------------------------
# Models side by side
# --------------------------------------------------------------------------------------------


def compare(
    models: Sequence[str], *, reporter: Reporter = SILENT, **options: Any
) -> list[Compared]:
    """Analyse models one after another, with no more than one in memory (Table 8).

    options: as for `surgery.analyze`. A model that cannot be analysed becomes a row that says so.
    """
    found = []
    for model in models:
        try:
            found.append(Compared(model, analyze(model, reporter=reporter, **options)))
        except SurgeryError as error:
            found.append(Compared(model, None, error))
        _release()
    return found


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def table_row(one: Compared) -> dict[str, str]:
    """One line of the paper's Table 8, and what supports it, as text by heading."""
    headings = ("model", "ME Layer", "magnification", "sink position", "layers", "confidence")
    if one.analysis is None:
        cells = (one.model, "not analysed", "–", "–", "–", "–")
    else:
        emergence = one.analysis.emergence
        positions = ", ".join(str(place) for place in emergence.sink_positions)
        name, depth = one.analysis.checkpoint.origin.name, str(one.analysis.anatomy.depth)
        if emergence.layer is None:
            cells = (name, "none found", "–", "–", depth, "–")
        else:
            factor = f"×{short(emergence.magnification)}"
            cells = (name, str(emergence.layer), factor, positions, depth, emergence.confidence)
    return dict(zip(headings, cells, strict=True))
