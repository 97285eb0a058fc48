"""What a sweep is about: its points, and everything else that decides what it finds."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import BadSettings
from surgery.files.checkpoint import Origin
from surgery.files.paths import expanded
from surgery.folds.registry import FOLDS, fold_named
from surgery.measure.task_settings import TaskSettings
from surgery.method.mask import attention_targets, mask_size
from surgery.patient import texts
from surgery.patient.patient import Patient
from surgery.settings import Settings
from surgery.sweeping.queue import Parameters, Space

RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# From the slowest to the fastest: folds share the mask, and so the reference.
_ORDER = ("scope", "select", "strength", "rate", "fold")


@dataclass(frozen=True)
class Score:
    """A figure that a sweep can minimise.

    Attributes:
        figure: its name in a point's figures.
        words: what it is, with its unit.
        base: the figure that is the same of the model as it is; None for a distance from it.
        price: the figure that it is weighed against on the Pareto front.
    """

    figure: str
    words: str
    base: str | None
    price: str = "kl_from_reference"


SCORES = {
    "perplexity": Score("perplexity", "perplexity", "base_perplexity"),
    "kl": Score("kl_from_reference", "KL(reference ‖ folded), nats", None, "perplexity"),
    "tasks": Score("task_error", "error on the tasks (1 − score, mean)", "base_task_error"),
}


@dataclass(frozen=True)
class Point:
    """One combination of settings.

    Attributes:
        rate: share of dimensions masked.
        scope: "first" or "all" layers after the ME Layer.
        fold: how the mask is folded into weights.
        select: how dimensions are chosen.
        strength: γ; 1 masks.
    """

    rate: float
    scope: str
    fold: str
    select: str
    strength: float

    def settings(self, common: Settings) -> Settings:
        """The settings of a conversion at this point."""
        return replace(common, **asdict(self))


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a sweep finds.

    Attributes:
        common: the settings that all points share.
        values: of each setting that varies.
        score: what is minimised, by its name in `SCORES`.
        text: a file to measure on in place of the bundled held-out text.
        trials: so many points by search; None for every point of the grid.
        tasks: what to score by where the score is "tasks".
    """

    common: Settings
    values: Mapping[str, tuple[Any, ...]]
    score: str
    text: str | None
    trials: int | None
    tasks: TaskSettings | None = None

    @property
    def space(self) -> Space:
        """The points as their study needs them."""
        combinations = itertools.product(*(self.values[name] for name in _ORDER))
        grid = [dict(zip(_ORDER, combination, strict=True)) for combination in combinations]
        return Space(self.values, grid if self.trials is None else (), self.trials)

    def point(self, parameters: Parameters) -> Point:
        """The point with these parameters; numbers that a search found are rounded."""
        numbers = {name: float(parameters[name]) for name in ("rate", "strength")}
        if self.trials is not None:
            numbers = {name: round(value, 4) for name, value in numbers.items()}
        return Point(**{**parameters, **numbers})

    def facts(self, origin: Origin) -> dict[str, Any]:
        """What a study is about, as it is recorded in it."""
        common = self.common
        return {
            "model": origin.name,
            "commit": origin.commit,
            "score": self.score,
            "search": self.trials is not None,
            **{f"{name}s": list(values) for name, values in self.values.items()},
            "layer": common.layer,
            "seed": common.seed,
            "dtype": common.dtype,
            "check tokens": common.check_tokens,
            "calibration tokens": common.calibration_tokens,
            "sha256 of the text": _text_hash(self.text, "heldout"),
            "sha256 of the calibration text": _text_hash(common.calibration, "calibration"),
            **({"tasks": _task_facts(self.tasks)} if self.tasks is not None else {}),
        }

    def check(self, patient: Patient) -> None:
        """Raise what keeps any point of this plan from being scored, before a model is loaded."""
        if self.score not in SCORES:
            raise BadSettings(f"--score must be one of {', '.join(SCORES)}; not {self.score!r}.")
        if (self.score == "tasks") != (self.tasks is not None):
            raise BadSettings(
                "--score tasks and --tasks belong together: which tasks, and that they decide."
            )
        if self.trials is not None and self.trials < 1:
            raise BadSettings("--trials must be at least 1.")
        for rate in self.values["rate"]:
            mask_size(rate, patient.anatomy.hidden_size)
        for fold in self.values["fold"]:
            fold_named(fold).require(patient.anatomy)
        if self.common.layer is not None:
            attention_targets(self.common.layer, patient.anatomy.attends, "all")
        for path in (self.text, self.common.calibration):
            if path is not None:
                texts.read_texts(Path(path))


def default_folds(patient: Patient) -> tuple[str, ...]:
    """One fold that reaches every token, and the one that reaches the massive token alone."""
    return ("qkv" if FOLDS["norm"].refusal(patient.anatomy) else "norm", "sink")


def varied(common: Settings, **lists: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """What varies, each list without repetitions.

    Args:
        common: the settings that all points share.
        lists: the values of each setting, by its name.

    Raises:
        BadSettings: a value makes no sense whatever the model is, or there is none.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for name, given in lists.items():
        if not given:
            raise BadSettings(f"--{name}s names nothing.")
        for value in given:
            replace(common, **{name: value})  # raises BadSettings
        numbers = name in ("rate", "strength")
        found[name] = tuple(dict.fromkeys(float(v) if numbers else v for v in given))
    return found


def _text_hash(path: str | None, bundled: str) -> str:
    file = expanded(path) if path is not None else texts.FOLDER / f"{bundled}.jsonl"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _task_facts(tasks: TaskSettings) -> dict[str, Any]:
    """As JSON has it; where the documents lie differs between machines, what they are may not."""
    facts = {name: value for name, value in asdict(tasks).items() if name != "data"}
    return dict(json.loads(json.dumps(facts)))
