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
    from surgery.analysis import Analysis, analyze
    from surgery.anatomy import Anatomy
    from surgery.checkpoint import Checkpoint, Origin
    from surgery.comparison import Comparison, compare
    from surgery.conversion import Conversion, convert
    from surgery.errors import SurgeryError
    from surgery.fold import Edit, SinkDirection, make_edits
    from surgery.hub import push
    from surgery.locate import Emergence
    from surgery.manifest import Manifest, read_manifest
    from surgery.mask import Mask
    from surgery.masking import weight_mask, wemask
    from surgery.plan import Plan
    from surgery.quality import Quality
    from surgery.reference import masked
    from surgery.reversal import revert
    from surgery.review import refresh_card, reproduce, verify
    from surgery.settings import Reporter, Settings
    from surgery.source import resolve
    from surgery.sweeping import Sweep, sweep
    from surgery.verification import Verification

_HOMES = {
    "Analysis": "analysis",
    "Anatomy": "anatomy",
    "Checkpoint": "checkpoint",
    "Comparison": "comparison",
    "Conversion": "conversion",
    "Edit": "fold",
    "Emergence": "locate",
    "Manifest": "manifest",
    "Mask": "mask",
    "Origin": "checkpoint",
    "Plan": "plan",
    "Quality": "quality",
    "Reporter": "settings",
    "Settings": "settings",
    "SinkDirection": "fold",
    "SurgeryError": "errors",
    "Sweep": "sweeping",
    "Verification": "verification",
    "analyze": "analysis",
    "compare": "comparison",
    "convert": "conversion",
    "make_edits": "fold",
    "masked": "reference",
    "push": "hub",
    "read_manifest": "manifest",
    "refresh_card": "review",
    "reproduce": "review",
    "resolve": "source",
    "revert": "reversal",
    "sweep": "sweeping",
    "verify": "review",
    "weight_mask": "masking",
    "wemask": "masking",
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
