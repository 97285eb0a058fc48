"""Undoing a conversion: the base again, byte for byte."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from surgery.files.paths import expanded
from surgery.outputs.base import Restored
from surgery.outputs.registry import opened
from surgery.outputs.review import Review
from surgery.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Reverted(Restored):
    """A restored base, and where it is now; see `Restored`."""

    output: Path = Path()


def revert(
    folder: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    reporter: Reporter = SILENT,
) -> Reverted:
    """Write the base of a converted checkpoint to `output`, checked against the recorded hashes.

    Args:
        folder: a converted checkpoint, or a converted .gguf file.
        output: where the base is to be; nothing may be there.
        base: the base model, needed only where neither the manifest nor an undo file holds what the
            edit overwrote.
        reporter: whom to tell.

    Raises:
        BadSettings: for an output that exists, and for what cannot be undone.
        BadCheckpoint: where the original bytes cannot be had or are not the recorded ones; then
            nothing is written.
    """
    path, target = expanded(folder), Path(os.path.abspath(expanded(output)))
    kind, manifest = opened(path)
    found = kind.restore(Review(path, manifest, base, reporter=reporter), target)
    return Reverted(found.source, found.files, found.not_carried, target)
