"""Several models analysed one after another: the paper's Table 8 for a list of one's own."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.jobs.analyze import Analysis, analyze
from surgery.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Compared:
    """One model beside others.

    Attributes:
        model: as the user named it.
        analysis: None where there is none.
        error: why there is none.
    """

    model: str
    analysis: Analysis | None
    error: SurgeryError | None = None


def analyze_all(
    models: Sequence[str], *, reporter: Reporter = SILENT, **options: Any
) -> list[Compared]:
    """Analyse models one after another, with no more than one in memory.

    Args:
        models: folders, Hub ids, .gguf files or "demo".
        reporter: whom to tell.
        options: of `surgery.analyze`.

    Returns:
        One entry per model; a model that cannot be analysed has an error in place of an analysis.
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
    import torch  # takes a second

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
