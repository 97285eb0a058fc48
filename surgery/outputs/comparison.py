"""The results file of `surgery compare`: everything that was measured, as data."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.files.paths import expanded
from surgery.files.staging import write_whole
from surgery.files.text import write_text
from surgery.outputs.manifest import clean_numbers, tool_version
from surgery.outputs.results import SCHEMA

if TYPE_CHECKING:
    from surgery.measure.task_scores import TaskRow
    from surgery.measure.text import TextMeasure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One model of a comparison.

    Attributes:
        name: that the measures are found by.
        kind: "base", "reference" or "edited".
        source: the checkpoint's name, or what a reference is.
        weights: sha256 by weight file, for edited checkpoints and the base.
        commit: of a Hub model.
        reference: the name of the reference that belongs to an edited checkpoint.
    """

    name: str
    kind: str
    source: str
    weights: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything `compare` measured.

    Attributes:
        variants: base, references, edited checkpoints.
        text: their measures on text; empty where they were not asked for.
        tasks: a row per metric of each task; likewise.
        settings: what was measured on, and how.
        versions: of the packages that can influence a result.
        notes: what the reader should know.
    """

    variants: tuple[Variant, ...]
    text: tuple[TextMeasure, ...]
    tasks: tuple[TaskRow, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the results file."""
        return {
            "schema_version": SCHEMA,
            "tool": f"wemask-surgery {tool_version()}",
            **clean_numbers(asdict(self)),
        }

    def measure(self, name: str) -> TextMeasure:
        """The text measures of a variant."""
        return next(found for found in self.text if found.name == name)

    def write(self, path: Path) -> None:
        """Write the results file, which `surgery card DIR --results FILE` reads."""
        path = expanded(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        if path.exists() and not path.is_file():  # /dev/null, say, must not be replaced
            write_text(path, f"{text}\n")
        else:
            write_whole(path.resolve(), f"{text}\n".encode())
        logger.info("results of %d variants in %s", len(self.variants), path)
