"""What is to be done to a patient, decided before anything is measured or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surgery.folds.base import Calibration, Fold
from surgery.folds.edits import Edit
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, attention_targets
from surgery.models.loading import auto_class_name
from surgery.outputs.manifest import (
    Manifest,
    clean_numbers,
    records,
    sink_records,
    tool_version,
    versions,
)
from surgery.outputs.places import shown_origin, shown_settings
from surgery.outputs.plan import Plan, RemotePlan
from surgery.outputs.records import QualityRecord
from surgery.outputs.undo import replaced_files
from surgery.patient.locating import choose_mask, find_emergence, given_emergence
from surgery.patient.patient import Patient
from surgery.settings import Settings


@dataclass(frozen=True)
class Operation:
    """A patient, and the edits that were decided on.

    Attributes:
        patient: whose weights are edited.
        settings: what was asked for.
        mask: S of every target layer, and γ.
        emergence: what was located or given; None where target layers were given.
        calibration: what the fold had to measure.
        edits: in the names of the patient's checkpoint.
    """

    patient: Patient
    settings: Settings
    mask: Mask
    emergence: Emergence | None
    calibration: Calibration
    edits: tuple[Edit, ...]

    @property
    def fold(self) -> Fold:
        """The fold that made the edits."""
        return self.settings.fold_used

    @property
    def drawn(self) -> bool:
        """Whether there is a curve of norms by layer to draw."""
        return self.emergence is not None and bool(self.emergence.rows)

    def manifest(
        self,
        plan: Plan | RemotePlan,
        quality: QualityRecord | None = None,
        calibration: Calibration | None = None,
    ) -> Manifest:
        """The manifest as far as it is known before anything is written.

        Args:
            plan: whose edits are recorded, in the names of its container.
            quality: what the gate measured.
            calibration: with the leaks that are to be recorded, where those of the calibration
                text are not.
        """
        patient, anatomy = self.patient, self.patient.anatomy
        known = calibration or self.calibration
        return Manifest(
            tool=f"wemask-surgery {tool_version()}",
            base=shown_origin(patient.checkpoint.origin),
            model_type=anatomy.model_type,
            hidden_size=anatomy.hidden_size,
            depth=anatomy.depth,
            anatomy=anatomy.known_from,
            settings=shown_settings(self.settings, patient.checkpoint.origin),
            strength=self.mask.strength,
            dimensions={layer: list(self.mask.dimensions[layer]) for layer in self.mask.layers},
            edits=records(plan.checkpoint, plan.edits),
            sinks=sink_records(known.directions, known.leaks),
            files=[],
            versions=versions(),
            left_out=list(plan.checkpoint.left_out or patient.checkpoint.left_out),
            replaced=replaced_files(patient.checkpoint),
            emergence=clean_numbers(self.emergence.as_dict()) if self.emergence else None,
            quality=quality,
            auto_class=auto_class_name(
                patient.checkpoint, trust_remote_code=patient.loading.trust_remote_code
            ),
        )


def decide(
    patient: Patient,
    settings: Settings,
    *,
    mask: Mask | None = None,
    emergence: Emergence | None = None,
    locate: Callable[[Patient], Emergence] = find_emergence,
) -> Operation:
    """Anatomy, ME Layer, mask, calibration and edits, in this order.

    Args:
        patient: the model.
        settings: what was asked for.
        mask: of an earlier step, used instead of choosing it again.
        emergence: of an earlier step, used instead of searching for it.
        locate: how an emergence is searched for.
    """
    anatomy, fold = patient.anatomy, settings.fold_used
    fold.require(anatomy)
    if mask is None:
        anatomy.require_selection(settings.select)
        targets, emergence = _targets(patient, settings, emergence, locate)
        mask = choose_mask(patient, targets, settings.selection)
    for layer in mask.layers:
        anatomy.at(layer)
    calibration = fold.calibrate(patient, mask)
    edits = fold.edits(anatomy, mask, calibration)
    return Operation(patient, settings, mask, emergence, calibration, edits)


def _targets(
    patient: Patient,
    settings: Settings,
    emergence: Emergence | None,
    locate: Callable[[Patient], Emergence],
) -> tuple[tuple[int, ...], Emergence | None]:
    if settings.layers is not None:
        return tuple(sorted(set(settings.layers))), None
    if emergence is None and settings.layer is not None:
        emergence = given_emergence(settings.layer)
    if emergence is None:
        emergence = locate(patient)
        patient.reporter.show(emergence)
    attends = patient.anatomy.attends
    targets = attention_targets(emergence.require(), attends, settings.scope)
    skipped = set(range(emergence.require() + 1, targets[-1])) - set(targets)
    if skipped:
        patient.reporter.say(
            f"Skipping {'layers' if len(skipped) > 1 else 'layer'} "
            f"{', '.join(map(str, sorted(skipped)))}: no attention there to mask"
        )
    return targets, emergence
