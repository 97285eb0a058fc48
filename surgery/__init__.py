"""surgery: locate a language model's Massive Emergence Layer and fold WeMask into its weights.

    import surgery

    analysis = surgery.analyze("Qwen/Qwen3-4B")
    result = surgery.convert("Qwen/Qwen3-4B", rate=0.1, scope="first", output="out")
    surgery.verify("out").require()
    surgery.push("out", "me/Qwen3-4B-WeMask")

Names are imported when first used, so that `import surgery` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.errors import SurgeryError
    from surgery.files.checkpoint import Checkpoint, Origin
    from surgery.folds.edits import Edit, SinkDirection
    from surgery.folds.registry import make_edits
    from surgery.jobs.analyze import Analysis, analyze
    from surgery.jobs.card import refresh_card
    from surgery.jobs.compare import compare
    from surgery.jobs.convert import convert
    from surgery.jobs.push import push
    from surgery.jobs.reproduce import reproduce
    from surgery.jobs.revert import revert
    from surgery.jobs.sweep import sweep
    from surgery.jobs.verify import verify
    from surgery.measure.quality import Quality
    from surgery.method.locate import Emergence
    from surgery.method.mask import Mask
    from surgery.models.anatomy import Anatomy
    from surgery.models.masking import masked, weight_mask, wemask
    from surgery.outputs.checks import Verification
    from surgery.outputs.manifest import Manifest, read_manifest
    from surgery.outputs.pipeline import Conversion
    from surgery.outputs.plan import Plan
    from surgery.patient.source import resolve
    from surgery.reporter import Reporter
    from surgery.settings import Settings
    from surgery.sweeping.result import Sweep

_HOMES = {
    "Analysis": "jobs.analyze",
    "Anatomy": "models.anatomy",
    "Checkpoint": "files.checkpoint",
    "Comparison": "outputs.comparison",
    "Conversion": "jobs.convert",
    "Edit": "folds.edits",
    "Emergence": "method.locate",
    "Manifest": "outputs.manifest",
    "Mask": "method.mask",
    "Origin": "files.checkpoint",
    "Plan": "outputs.plan",
    "Quality": "measure.quality",
    "Reporter": "reporter",
    "Settings": "settings",
    "SinkDirection": "folds.edits",
    "SurgeryError": "errors",
    "Sweep": "jobs.sweep",
    "Verification": "outputs.checks",
    "analyze": "jobs.analyze",
    "compare": "jobs.compare",
    "convert": "jobs.convert",
    "make_edits": "folds.registry",
    "masked": "models.reference",
    "push": "jobs.push",
    "read_manifest": "outputs.manifest",
    "refresh_card": "jobs.card",
    "reproduce": "jobs.reproduce",
    "resolve": "patient.source",
    "revert": "jobs.revert",
    "sweep": "jobs.sweep",
    "verify": "jobs.verify",
    "weight_mask": "models.masking",
    "wemask": "models.masking",
}
__all__ = [
    "Analysis",
    "Anatomy",
    "Checkpoint",
    "Comparison",
    "Conversion",
    "Edit",
    "Emergence",
    "Manifest",
    "Mask",
    "Origin",
    "Plan",
    "Quality",
    "Reporter",
    "Settings",
    "SinkDirection",
    "SurgeryError",
    "Sweep",
    "Verification",
    "analyze",
    "compare",
    "convert",
    "make_edits",
    "masked",
    "push",
    "read_manifest",
    "refresh_card",
    "reproduce",
    "resolve",
    "revert",
    "sweep",
    "verify",
    "weight_mask",
    "wemask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(import_module(f"surgery.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
