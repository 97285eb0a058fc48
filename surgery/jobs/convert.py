"""The main job, from a name to a verified output: plan, validate, stream, finalise."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.staging import remove_stale
from surgery.measure.quality import Quality
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, mask_size
from surgery.models.anatomy import depth_of, width_of
from surgery.outputs.base import Request
from surgery.outputs.checks import Verification
from surgery.outputs.manifest import Manifest, clean_numbers
from surgery.outputs.operation import Operation, decide
from surgery.outputs.plan import Plan
from surgery.outputs.registry import output_for
from surgery.patient.patient import Patient
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

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


def convert(
    model: str,
    *,
    rate: float = Settings.rate,
    scope: str = Settings.scope,
    fold: str = Settings.fold,
    select: str = Settings.select,
    strength: float = Settings.strength,
    layer: int | None = Settings.layer,
    layers: tuple[int, ...] | None = Settings.layers,
    output: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = Settings.revision,
    seed: int = Settings.seed,
    calibration: str | None = Settings.calibration,
    calibration_tokens: int = Settings.calibration_tokens,
    check: bool = Settings.check,
    check_tokens: int = Settings.check_tokens,
    max_degradation: float = Settings.max_degradation,
    force: bool = Settings.force,
    device: str | None = Settings.device,
    dtype: str = Settings.dtype,
    trust_remote_code: bool = Settings.trust_remote_code,
    push_to_hub: str | None = Settings.push_to_hub,
    undo_file: bool = Settings.undo_file,
    form: str = Settings.form,
    emergence: Emergence | None = None,
    mask: Mask | None = None,
    reporter: Reporter = SILENT,
    spoken_as: tuple[str, str | None, Origin] | None = None,
) -> Conversion:
    """Fold WeMask into a checkpoint and write it, verified, to `output`.

    Args:
        model: a folder, a Hub id (`name@revision`), a .gguf file or "demo".
        output: the folder or file to write; by default named after model and settings.
        overwrite: whether an earlier conversion there may be replaced.
        dry_run: plan and stop.
        emergence: of an earlier analysis, used instead of locating it again.
        mask: of an earlier step, used instead of choosing it again.
        reporter: whom to tell.
        spoken_as: model, revision and origin to write down instead, when a conversion is repeated.

    The others are the fields of `Settings`.

    Raises:
        SurgeryError: says what is wrong; then nothing has been written.
    """
    settings = Settings.gathered(locals())
    checkpoint = resolve(model, settings.revision, reporter.say)
    if spoken_as is not None:
        settings = replace(settings, model=spoken_as[0], revision=spoken_as[1])
        checkpoint = replace(checkpoint, origin=spoken_as[2])
    named = Path(output) if output is not None else None
    kind = output_for(settings.form, named)
    target = named or kind.default_path(*_default_name(checkpoint, settings))
    mask_size(settings.rate, width_of(checkpoint.config))
    settings.check_layers(depth_of(checkpoint.config))
    kind.accept(Request(checkpoint, settings, target, overwrite))
    patient = Patient(
        checkpoint,
        settings.loading,
        reporter,
        traced=settings.check,
        dequantise=not settings.needs_no_weights,
    )
    operation = decide(patient, settings, mask=mask, emergence=emergence)
    if not dry_run:
        # Before the plan looks at the output and at the free space. What an earlier run was killed
        # in the middle of putting there, this one may replace.
        overwrite |= remove_stale(target)
    plan = kind.plan(operation, target, overwrite=overwrite)
    reporter.show(plan)
    mask, emergence = operation.mask, operation.emergence
    if dry_run:
        return Conversion(plan.product, plan, mask, emergence, None, None, None)
    quality, manifest = _measured(operation, plan)
    verification, manifest = kind.write(plan, manifest, operation)
    logger.info("Wrote %s", plan.product)
    return Conversion(plan.product, plan, mask, emergence, quality, verification, manifest)


def _measured(operation: Operation, plan: Plan) -> tuple[Quality | None, Manifest]:
    """What the gate measured, unless it is skipped, and the manifest that says so."""
    from surgery.measure.gate import measure_fold, passes  # imports torch

    settings, patient, mask = operation.settings, operation.patient, operation.mask
    if not settings.check:
        return None, operation.manifest(plan)
    quality, calibration = measure_fold(
        patient, mask, operation.edits, operation.calibration, settings.check_tokens
    )
    patient.reporter.show(quality)
    forced = not passes(patient, mask, quality, settings)
    record = {**quality.as_dict(), "forced": forced, "leak_text": "held-out text"}
    return quality, operation.manifest(plan, clean_numbers(record), calibration)


def _default_name(checkpoint: Checkpoint, settings: Settings) -> tuple[str, list[str]]:
    """The base's name, and the settings that tell one conversion of it from another."""
    words = [settings.fold, settings.scope, f"{settings.rate:g}"]
    if settings.layers is not None:
        words[1] = "layers" + "+".join(str(layer) for layer in settings.layers)
    if settings.select != Settings.select:
        words.append(settings.select)
    if settings.strength != Settings.strength:
        words.append(f"strength{settings.strength:g}")
    return checkpoint.origin.name.rsplit("/", 1)[-1], words
