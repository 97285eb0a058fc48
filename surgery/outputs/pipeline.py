"""An operation carried out: plan, measure, write, verify; the same for every kind of output."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.method.locate import Emergence
from surgery.method.mask import Mask
from surgery.outputs.base import Output
from surgery.outputs.checks import Verification
from surgery.outputs.manifest import Manifest, clean_numbers
from surgery.outputs.operation import Operation
from surgery.outputs.plan import Plan

if TYPE_CHECKING:
    from surgery.measure.quality import Quality

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: every object of the pipeline.

    Attributes:
        output: the folder or file, of several shards the first.
        plan: what was written, or would be.
        mask: S of every target layer, and γ.
        emergence: what was located; None where target layers were given.
        quality: what the gate measured; None where it was skipped.
        verification: what was proven; None after a dry run.
        manifest: None after a dry run.
    """

    output: Path
    plan: Plan
    mask: Mask
    emergence: Emergence | None
    quality: Quality | None
    verification: Verification | None
    manifest: Manifest | None


def carry_out(
    operation: Operation,
    kind: Output,
    target: Path,
    *,
    overwrite: bool,
    dry_run: bool = False,
) -> Conversion:
    """Write an operation's output, unless it is worse than allowed or not what it was to be.

    Args:
        operation: what was decided.
        kind: of output.
        target: where it goes.
        overwrite: whether an earlier conversion there may be replaced.
        dry_run: plan and stop.

    Raises:
        SurgeryError: says what is wrong; then nothing has been written.
    """
    plan = kind.plan(operation, target, overwrite=overwrite)
    operation.patient.reporter.show(plan)
    mask, emergence = operation.mask, operation.emergence
    if dry_run:
        return Conversion(plan.product, plan, mask, emergence, None, None, None)
    quality, manifest = _measured(operation, plan)
    verification, manifest = kind.write(plan, manifest, operation)
    logger.info("Wrote %s", plan.product)
    return Conversion(plan.product, plan, mask, emergence, quality, verification, manifest)


def _measured(operation: Operation, plan: Plan) -> tuple[Quality | None, Manifest]:
    """What the gate measured, unless it is skipped, and the manifest that says so."""
    settings, patient, mask = operation.settings, operation.patient, operation.mask
    if not settings.check:
        return None, operation.manifest(plan)
    from surgery.measure.gate import measure_fold, passes  # imports torch

    quality, calibration = measure_fold(
        patient, mask, operation.edits, operation.calibration, settings
    )
    patient.reporter.show(quality)
    forced = not passes(patient, mask, quality, settings)
    record = {**quality.as_dict(), "forced": forced, "leak_text": "held-out text"}
    return quality, operation.manifest(plan, clean_numbers(record), calibration)
