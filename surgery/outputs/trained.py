"""A folder whose weights were trained before the mask was folded in: what can still be proven."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import BadSettings
from surgery.outputs.base import Restored
from surgery.outputs.checks import (
    Check,
    verify_files,
    verify_masked,
    verify_structure,
    verify_untouched,
)
from surgery.outputs.folder import Folder
from surgery.outputs.manifest import Manifest
from surgery.outputs.plan import edits_by_file
from surgery.outputs.review import Review


class Trained(Folder):
    """What `finetune` makes of a folder: it is written as any other, and looked at otherwise."""

    def wrote(self, manifest: Manifest, path: Path) -> bool:
        return path.is_dir() and manifest.training is not None

    def checks(self, review: Review) -> list[Check]:
        """Hashes, structure, zeros, and all that stayed; its logits belong to the training."""
        path, manifest, base = review.path, review.manifest, review.checkpoint
        assert manifest.training is not None
        checks = [verify_files(path, manifest.files), verify_structure(base, path)]
        if not all(check.passed for check in checks):
            return checks
        edits = manifest.rebuilt_edits()
        if manifest.settings.fold_used.exact:
            # The training was kept from reading S, so that the base's values there are the merged.
            edits_by_file(base, edits)  # a damaged manifest may name anything
            checks.append(verify_masked(base, path, edits))
        changed = {*manifest.training["changed"], *(edit.tensor for edit in edits)}
        known = sorted(name for name in changed if name in base.tensors)
        checks.append(verify_untouched(base, path, known, manifest.files))
        return checks

    def restore(self, review: Review, target: Path) -> Restored:
        raise BadSettings(
            f"{review.path} was trained, which cannot be undone; take its base instead."
        )

    def require_repeatable(self, path: Path) -> None:
        raise BadSettings(
            f"{path} was trained; run its recipe again with surgery finetune instead."
        )
