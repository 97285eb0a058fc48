"""What a sweep found: its rows, best first, and the Pareto front."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.checkpoint import Origin
from surgery.files.text import read_json
from surgery.outputs.card import command_line
from surgery.outputs.manifest import clean_numbers
from surgery.outputs.plan import check_apart
from surgery.settings import Settings
from surgery.sweeping.plan import SCORES, Plan, Point
from surgery.sweeping.queue import SharedStudy

STUDY, RESULTS, FIGURE = "study.db", "results.json", "sweep.png"


class Converted(Protocol):
    """A conversion, of which a sweep tells the place."""

    @property
    def output(self) -> Path:
        """The folder."""


@dataclass(frozen=True)
class Row:
    """A point and what it measured, or why it could not be measured.

    Attributes:
        point: the settings.
        score: what is minimised; None where it could not be measured.
        on_front: on the Pareto front of the score against KL(reference ‖ folded), and of that
            against perplexity where it is the score itself.
        figures: see `surgery.measure.scoring.Figures`.
        error: why there are none.
        command: makes this checkpoint.
    """

    point: Point
    score: float | None
    on_front: bool
    figures: Mapping[str, Any] | None
    error: str | None
    command: str


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        output: folder of the results.
        model: as the user named it.
        commit: of a Hub model.
        score: what was minimised, by its name in `SCORES`.
        layer: the ME Layer.
        settings: what the study is about.
        rows: best first, points that could not be measured last.
        converted: with the best settings, where that was asked for.
    """

    output: Path
    model: str
    commit: str | None
    score: str
    layer: int | None
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    converted: Converted | None = None

    @property
    def best(self) -> Row | None:
        """The point with the lowest score; None where none could be measured."""
        return self.rows[0] if self.rows and self.rows[0].figures is not None else None

    @property
    def base_perplexity(self) -> float | None:
        """Of the model as it is."""
        return self._of_base("base_perplexity")

    @property
    def base_score(self) -> float | None:
        """The score of the model as it is; None for KL, which is the distance from another."""
        return self._of_base(SCORES[self.score].base)

    def _of_base(self, figure: str | None) -> float | None:
        best = self.best
        return best.figures.get(figure) if figure and best and best.figures else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        best = self.best
        return {
            "output": str(self.output),
            "model": self.model,
            "commit": self.commit,
            "score": self.score,
            "emergence_layer": self.layer,
            "base_perplexity": self.base_perplexity,
            "base_score": self.base_score,
            "settings": dict(self.settings),
            "best": best.command if best else None,
            "points": [
                {
                    **asdict(row.point),
                    "score": row.score,
                    "on_front": row.on_front,
                    **(row.figures or {}),
                    "error": row.error,
                    "command": row.command,
                }
                for row in self.rows
            ],
            "converted": str(self.converted.output) if self.converted else None,
        }

    def as_json(self) -> str:
        """The text of results.json."""
        return json.dumps(clean_numbers(self.as_dict()), indent=2) + "\n"


def for_convert(common: Settings) -> Settings:
    """The gate of `convert` measures as much as it does by default, not as much as a sweep."""
    return replace(common, check_tokens=Settings.check_tokens)


def front(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each place is on the Pareto front: no other is as small in both and smaller in one.

    Args:
        places: two figures of each, both better when smaller.
    """
    return [
        not any(
            other[0] <= place[0] and other[1] <= place[1] and other != place for other in places
        )
        for place in places
    ]


def collect(plan: Plan, shared: SharedStudy, origin: Origin, folder: Path) -> Sweep:
    """What a study has found so far.

    Args:
        plan: the sweep.
        shared: its study.
        origin: of the model.
        folder: where the results go.
    """
    ended, price = shared.look().ended, SCORES[plan.score].price
    places = [
        (end.score, float((end.figures or {})[price])) for end in ended if end.score is not None
    ]
    marks = iter(front(places))
    rows = []
    for end in ended:
        point = plan.point(end.parameters)
        command = command_line(point.settings(for_convert(plan.common)))
        marked = end.score is not None and next(marks)
        rows.append(Row(point, end.score, marked, end.figures, end.error, command))
    rows.sort(key=lambda row: math.inf if row.score is None else row.score)
    rows.sort(key=lambda row: row.figures is None)
    layer = plan.common.layer
    return Sweep(
        output=folder,
        model=origin.name,
        commit=origin.commit,
        score=plan.score,
        layer=shared.fact("emergence layer") if layer is None else layer,
        settings=plan.facts(origin),
        rows=tuple(rows),
    )


def make_folder(folder: Path, sources: Iterable[Path]) -> None:
    """Raise BadSettings for a folder that is the model's, or holds something else than a sweep."""
    check_apart(sources, folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and not any(name.startswith(STUDY) for name in names) and not _swept(folder):
        raise BadSettings(
            f"{folder} holds files of something else ({sorted(names)[0]}); choose another --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSettings(f"The folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadSettings(f"{folder} is not writable; choose another --output.")


def _swept(folder: Path) -> bool:
    """Whether a folder has the results of a sweep whose study is kept elsewhere."""
    try:
        return "points" in read_json(folder / RESULTS)
    except BadCheckpoint:
        return False
