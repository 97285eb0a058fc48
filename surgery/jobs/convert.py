"""The main job, from a name to a verified output: plan, validate, stream, finalise."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.paths import expanded
from surgery.files.staging import remove_stale
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, mask_size
from surgery.models.anatomy import depth_of, width_of
from surgery.outputs.base import Request
from surgery.outputs.operation import decide
from surgery.outputs.pipeline import Conversion, carry_out
from surgery.outputs.places import remember
from surgery.outputs.registry import output_for
from surgery.patient.patient import Patient
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

logger = logging.getLogger(__name__)


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
    fixed: bool = Settings.fixed,
    max_degradation: float = Settings.max_degradation,
    force: bool = Settings.force,
    device: str | None = Settings.device,
    dtype: str = Settings.dtype,
    stream: bool | None = Settings.stream,
    trust_remote_code: bool = Settings.trust_remote_code,
    push_to_hub: str | None = Settings.push_to_hub,
    undo_file: bool = Settings.undo_file,
    include: tuple[str, ...] = Settings.include,
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
    checkpoint = resolve(model, settings.revision, reporter.say, settings.include)
    if spoken_as is not None:
        settings = replace(settings, model=spoken_as[0], revision=spoken_as[1])
        checkpoint = replace(checkpoint, origin=spoken_as[2])
    named = expanded(output) if output is not None else None
    kind = output_for(settings.form, named)
    target = named or kind.default_path(*_default_name(checkpoint, settings))
    mask_size(settings.rate, width_of(checkpoint.config))
    settings.check_layers(depth_of(checkpoint.config))
    if not dry_run:
        # Before anybody looks at the output and at the free space. What an earlier run was killed
        # in the middle of putting there, this one may replace.
        overwrite |= remove_stale(target)
    kind.accept(Request(checkpoint, settings, target, overwrite))
    patient = Patient(
        checkpoint,
        settings.loading,
        reporter,
        traced=settings.check,
        dequantise=not settings.needs_no_weights,
    )
    operation = decide(patient, settings, mask=mask, emergence=emergence)
    made = carry_out(operation, kind, target, overwrite=overwrite, dry_run=dry_run)
    if made.manifest is not None:
        remember(made.manifest, checkpoint, settings.calibration)
    return made


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
