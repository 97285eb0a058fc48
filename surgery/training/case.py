"""What all steps of a training need to know."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.files.checkpoint import Checkpoint
from surgery.outputs.manifest import clean_numbers
from surgery.outputs.places import shown_data, shown_origin
from surgery.patient.patient import Patient
from surgery.reporter import Reporter
from surgery.settings import Settings
from surgery.training.begin import WORK
from surgery.training.recipe import Recipe
from surgery.training.trainer import Trained, training_versions

# Text that a fold is measured and calibrated on, tokens; of a smoke test less.
TOKENS, SMOKE_TOKENS = Settings.check_tokens, 128


@dataclass(frozen=True)
class Case:
    """A recipe and the patient that it treats.

    Attributes:
        recipe: as it was parsed.
        patient: the model before training.
        settings: of the fold that follows.
        output: folder to write.
    """

    recipe: Recipe
    patient: Patient
    settings: Settings
    output: Path

    @property
    def work(self) -> Path:
        """Where training keeps its own files."""
        return self.output / WORK

    @property
    def checkpoint(self) -> Checkpoint:
        """Of the model before training."""
        return self.patient.checkpoint


def make_case(
    recipe: Recipe, checkpoint: Checkpoint, output: Path, smoke: bool, reporter: Reporter
) -> Case:
    """The case of a recipe; Unsupported where its fold would not be truthful in the model."""
    treatment = recipe.treatment
    settings = Settings(
        model=str(recipe.model.model_name_or_path),
        rate=float(treatment.rate),
        scope=treatment.scope,
        fold=treatment.fold if treatment.folds else Settings.fold,
        select=treatment.select,
        strength=float(treatment.strength),
        layer=treatment.layer,
        revision=revision_of(recipe),
        seed=recipe.arguments.seed,
        max_degradation=float(treatment.max_degradation),
        force=treatment.force,
        check_tokens=SMOKE_TOKENS if smoke else TOKENS,
        calibration_tokens=SMOKE_TOKENS if smoke else TOKENS,
        device="cpu" if recipe.arguments.use_cpu else None,
        trust_remote_code=bool(getattr(recipe.arguments, "trust_remote_code", False)),
    )
    patient = Patient(checkpoint, settings.loading, reporter, dequantise=False)
    anatomy = patient.anatomy
    if treatment.folds:
        settings.fold_used.require(anatomy)
    return Case(recipe, patient, settings, output)


def revision_of(recipe: Recipe) -> str | None:
    revision = recipe.keys.get("model_revision")
    return str(revision) if revision is not None else None


def names_of(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """The model and revision that an adapter of a checkpoint names."""
    if checkpoint.origin.kind == "hub":
        return checkpoint.origin.name, checkpoint.origin.commit
    return shown_origin(checkpoint.origin).typed, None


def record_of(case: Case, trained: Trained) -> dict[str, Any]:
    """What the manifest and the card say about the training."""
    losses = [row["loss"] for row in trained.history if "loss" in row]
    held_out = [row["eval_loss"] for row in trained.history if "eval_loss" in row]
    recipe = shown_data(json.loads(json.dumps(case.recipe.record(), default=str)))
    return clean_numbers(
        {
            "recipe": {"name": case.recipe.name, "keys": recipe},
            "base": asdict(shown_origin(case.checkpoint.origin)),
            "steps": trained.steps,
            "seconds": round(trained.seconds, 1),
            "rows": trained.rows,
            "evaluation_rows": trained.evaluation_rows,
            "processes": trained.processes,
            "trainable": trained.trainable,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "held_out_loss": held_out[-1] if held_out else None,
            "history": list(trained.history),
            "versions": training_versions(),
            "changed": [],
        }
    )
