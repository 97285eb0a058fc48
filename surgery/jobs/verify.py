"""Proving a written output against its base."""

from __future__ import annotations

from pathlib import Path

from surgery.files.paths import expanded
from surgery.outputs.checks import Verification
from surgery.outputs.registry import opened
from surgery.outputs.review import Review
from surgery.reporter import SILENT, Reporter


def verify(
    folder: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    stream: bool | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> Verification:
    """Prove a written output against its base: bytes, edits, stock load, logits.

    Args:
        folder: a converted checkpoint, an adapter, or a .gguf file, which holds its manifest.
        base: the base model, when it is not where the manifest says.
        device: to compare logits on; None for the best there is.
        stream: whether base and output run layer by layer; None for what suits their size.
        trust_remote_code: whether the base's own Python code may run.
        reporter: whom to tell.

    Returns:
        Which checks held; `require()` raises VerificationFailed.

    Raises:
        BadCheckpoint: when there is no manifest or no base.
        BadSettings: for a base of a .gguf file, which holds its own.
    """
    path = expanded(folder)
    kind, manifest = opened(path)
    review = Review(path, manifest, base, device, trust_remote_code, reporter, stream)
    return Verification(tuple(kind.checks(review)))
