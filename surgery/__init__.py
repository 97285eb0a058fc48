"""surgery: locate a language model's Massive Emergence Layer and fold WeMask into its weights.

    import surgery

    analysis = surgery.analyze("Qwen/Qwen3-4B")
    result = surgery.convert("Qwen/Qwen3-4B", rate=0.1, scope="first", output="out")
    surgery.verify("out").require()
    surgery.push("out", "me/Qwen3-4B-WeMask")

Names are imported when first used, so that `import surgery` is instant.
"""

# ruff: noqa: F401
from __future__ import annotations

import logging
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
    from surgery.jobs.finetune import finetune
    from surgery.jobs.publish import publish
    from surgery.jobs.push import push
    from surgery.jobs.reproduce import reproduce
    from surgery.jobs.revert import revert
    from surgery.jobs.sweep import sweep
    from surgery.jobs.verify import verify
    from surgery.measure.quality import Quality
    from surgery.method.locate import Emergence
    from surgery.method.mask import Mask
    from surgery.models import gated_attention
    from surgery.models.anatomy import Anatomy
    from surgery.models.masking import masked, weight_mask, wemask
    from surgery.outputs.checks import Verification
    from surgery.outputs.comparison import Comparison
    from surgery.outputs.manifest import Manifest, read_manifest
    from surgery.outputs.pipeline import Conversion
    from surgery.outputs.plan import Plan
    from surgery.patient.source import resolve
    from surgery.reporter import Reporter
    from surgery.settings import Settings
    from surgery.sweeping.result import Sweep

# The public names, by the module they live in; `TYPE_CHECKING` repeats them for type checkers, and
# a test compares the two.
_PUBLIC = {
    "errors": "SurgeryError",
    "files.checkpoint": "Checkpoint Origin",
    "folds.edits": "Edit SinkDirection",
    "folds.registry": "make_edits",
    "jobs.analyze": "Analysis analyze",
    "jobs.card": "refresh_card",
    "jobs.compare": "compare",
    "jobs.convert": "convert",
    "jobs.finetune": "finetune",
    "jobs.publish": "publish",
    "jobs.push": "push",
    "jobs.reproduce": "reproduce",
    "jobs.revert": "revert",
    "jobs.sweep": "sweep",
    "jobs.verify": "verify",
    "measure.quality": "Quality",
    "method.locate": "Emergence",
    "method.mask": "Mask",
    "models": "gated_attention",
    "models.anatomy": "Anatomy",
    "models.masking": "masked weight_mask wemask",
    "outputs.checks": "Verification",
    "outputs.comparison": "Comparison",
    "outputs.manifest": "Manifest read_manifest",
    "outputs.pipeline": "Conversion",
    "outputs.plan": "Plan",
    "patient.source": "resolve",
    "reporter": "Reporter",
    "settings": "Settings",
    "sweeping.result": "Sweep",
}
_HOMES = {name: home for home, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_HOMES)

# Silent, unless whoever uses the library asks for its log.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    # As `from HOME import NAME`, which also finds a module such as `surgery.gated_attention`.
    value = getattr(__import__(f"surgery.{_HOMES[name]}", fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
