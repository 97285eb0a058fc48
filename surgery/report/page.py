"""`surgery analyze --report`: one self-contained page, its figures, and all numbers as JSON."""

from __future__ import annotations

import base64
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings
from surgery.files.paths import expanded
from surgery.files.resources import resource_folder
from surgery.files.staging import replacing
from surgery.files.text import write_text
from surgery.measure.evidence import Evidence
from surgery.method.locate import Emergence
from surgery.outputs.figure import plot_layers
from surgery.outputs.manifest import clean_numbers, tool_version, versions
from surgery.outputs.plan import existing_parent
from surgery.report import plots, words
from surgery.report.data import comparison_curves, comparison_data, summary, table_row
from surgery.report.numbers import COLUMNS, short

if TYPE_CHECKING:
    from surgery.jobs.analyze import Analysis
    from surgery.jobs.side_by_side import Compared

logger = logging.getLogger(__name__)

PAGE, DATA, TEMPLATE = "index.html", "report.json", "report.html.jinja"
SCHEMA = 1


@dataclass(frozen=True)
class Section:
    """One piece of evidence on the page.

    Attributes:
        title: of the section.
        source: where the paper has it.
        text: what the evidence says.
        figure: a file in the report's folder.
    """

    title: str
    source: str
    text: str
    figure: str


# The sections after the first: title, where the paper has it, the figure's file, what the evidence
# says (nothing where it is missing), and what draws it.
_Piece = tuple[str, str, str, Callable[[Evidence, Emergence], str], Callable[..., None]]
_PIECES: tuple[_Piece, ...] = (
    (
        "Which part makes it jump",
        "§3.1, Fig. 1 and 2; Appendix H, Fig. 11 to 20",
        "parts.png",
        words.parts,
        plots.plot_parts,
    ),
    (
        "Does the norm's gain favour the sink?",
        "§3.1, eq. 1 and 2; Fig. 3",
        "alignment.png",
        words.alignment,
        plots.plot_alignment,
    ),
    ("What the FFN does to the sink", "§3.1, eq. 3; Fig. 4", "ffn.png", words.ffn, plots.plot_ffn),
    (
        "The same layer whatever the input?",
        "Appendix D; Fig. 5 a and 10",
        "stability.png",
        words.stability,
        plots.plot_stability,
    ),
    (
        "The same direction whatever the input?",
        "§3.2, Fig. 5 b and c",
        "direction.png",
        words.direction,
        plots.plot_direction,
    ),
    (
        "What remains without its parts",
        "Appendix B; Fig. 9",
        "knockouts.png",
        words.knockouts,
        plots.plot_knockouts,
    ),
    ("Attention on the sink", "§6, Fig. 7", "attention.png", words.attention, plots.plot_attention),
    (
        "Attention before and under the mask",
        "§6, Fig. 7 and 8",
        "heatmaps.png",
        words.heatmaps,
        plots.plot_heatmaps,
    ),
    ("What the mask does to the sink", "§4, eq. 4 and 5", "mask.png", words.mask, plots.plot_mask),
)


def sections(analysis: Analysis, folder: Path) -> list[Section]:
    """Draw every figure there is evidence for into a folder, and say what it shows."""
    found, emergence = analysis.evidence, analysis.emergence
    if found is None:
        raise ValueError("the analysis was made without evidence")
    first = "layers.png"
    made = [
        Section("Where the norm jumps", "Fig. 1; Table 8", words.emergence(found, emergence), first)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a row without numbers stays empty in its figure
        plot_layers(emergence, folder / first, title=analysis.checkpoint.origin.name)
        for title, source, figure, say, draw in _PIECES:
            text = say(found, emergence)
            if text:
                draw(found, emergence.layer, folder / figure)
                made.append(Section(title, source, text, figure))
    return made


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
    folder = expanded(folder).absolute()
    with replacing(folder, lambda: check_folder(folder)) as staged:
        made = sections(analysis, staged)
        data = summary(analysis)
        logger.info("%d figures drawn for %s", len(made), folder)
        _finish(
            staged,
            data,
            settings,
            title=analysis.checkpoint.origin.name,
            analysis=analysis,
            table=[table_row(analysis.checkpoint.origin.name, analysis)],
            failures=[],
            sections=made,
            columns=COLUMNS,
            rows=analysis.evidence.rows if analysis.evidence else (),
        )


def write_comparison(
    compared: Sequence[Compared], folder: Path, settings: Mapping[str, Any]
) -> None:
    """Write the report that sets models side by side (Table 8 for the user's list)."""
    folder = expanded(folder).absolute()
    with replacing(folder, lambda: check_folder(folder)) as staged:
        found = comparison_curves(compared)
        made = []
        if found:
            plots.plot_comparison(found, staged / "comparison.png")
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
            table=[table_row(one.model, one.analysis) for one in compared],
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
