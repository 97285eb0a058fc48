"""The masks of a training, and of the fold that follows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from surgery.folds.registry import fold_named
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, attention_targets
from surgery.patient.locating import choose_mask, find_emergence, given_emergence
from surgery.training.begin import write_json
from surgery.training.case import Case
from surgery.training.lora import closed_inputs


@dataclass(frozen=True)
class Masks:
    """What is masked, and why.

    Attributes:
        training: on while training; None for a baseline.
        fold: in the weights afterwards; None where no fold follows.
        emergence: what the layers were taken from; None on every process but the first.
    """

    training: Mask | None = None
    fold: Mask | None = None
    emergence: Emergence | None = None

    def closed(self, case: Case) -> dict[str, tuple[int, ...]]:
        """The input dimensions that a LoRA must not read, by module path."""
        if self.training is None:
            return {}
        treatment, both = case.recipe.treatment, self.training
        if self.fold is not None:
            dimensions = {**self.fold.dimensions, **self.training.dimensions}
            both = replace(self.training, dimensions=dimensions)
        zeroed = treatment.folds and fold_named(treatment.fold).tokens == "every"
        layers = self.fold.layers if self.fold is not None and zeroed else ()
        return closed_inputs(case.patient.anatomy, both, layers, treatment.tokens)


def choose_masks(case: Case) -> Masks:
    """Locate the emergence and choose both masks; they are kept for the other processes."""
    treatment, patient = case.recipe.treatment, case.patient
    if not treatment.masks:
        return Masks()
    if treatment.layer is not None:
        emergence = given_emergence(treatment.layer)
    else:
        emergence = find_emergence(patient)
        patient.reporter.show(emergence)

    def mask_for(scope: str) -> Mask:
        targets = attention_targets(emergence.require(), patient.anatomy.attends, scope)
        return choose_mask(patient, targets, case.settings.selection)

    training = mask_for(treatment.scope)
    fold = mask_for(treatment.fold_scope) if treatment.folds else None
    patient.release()
    write_json(case.work / "masks.json", [_as_data(mask) for mask in (training, fold)])
    return Masks(training, fold, emergence)


def read_masks(case: Case) -> Masks:
    """The masks that the first process chose."""
    if not case.recipe.treatment.masks:
        return Masks()
    training, fold = json.loads((case.work / "masks.json").read_text(encoding="utf-8"))
    return Masks(_from_data(training), _from_data(fold))


def _as_data(mask: Mask | None) -> Any:
    return asdict(mask) if mask is not None else None


def _from_data(data: Any) -> Mask | None:
    if data is None:
        return None
    chosen = {int(layer): tuple(dims) for layer, dims in data["dimensions"].items()}
    return Mask(data["hidden_size"], data["select"], data["strength"], chosen)
