"""What a training writes: merged in float32, folded, verified, and put in place at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.files.generated import LOSS_FIGURE, MANIFEST
from surgery.files.staging import put, remove_stale, sync_tree
from surgery.models.names import StoredNames
from surgery.outputs.base import Request
from surgery.outputs.checks import Check, Verification, verify_masked
from surgery.outputs.folder import Folder
from surgery.outputs.manifest import read_manifest
from surgery.outputs.operation import decide
from surgery.outputs.pipeline import Conversion, carry_out
from surgery.outputs.places import remember
from surgery.outputs.plan import Plan
from surgery.patient.patient import Patient
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.training.begin import ADAPTER, BASE, MODEL, write_json
from surgery.training.case import Case, names_of, record_of
from surgery.training.lora import (
    LowRank,
    name_base,
    read_adapter,
    with_sinks,
    write_adapter,
    write_merged,
)
from surgery.training.loss_plot import plot_loss
from surgery.training.masks import Masks
from surgery.training.trained import add_training, agreement, stands_alone, verify_closed
from surgery.training.trainer import Trained


@dataclass(frozen=True)
class Products:
    """What was written: folders by name, None where not asked for, and what was proven."""

    places: Mapping[str, Path | None]
    record: dict[str, Any]
    verification: Verification


def own_base(output: Path) -> str:
    """The name of the folded base beside an adapter, seen from the folder of the output."""
    return f"{output.name}/{BASE}"


class _Within(Reporter):
    """A step of ours told like the others: its files are not final, its checks come with ours."""

    def __init__(self, outer: Reporter) -> None:
        self.say, self.bar = outer.say, outer.bar  # type: ignore[method-assign]
        self._outer = outer

    def show(self, result: Any) -> None:
        if not isinstance(result, Plan | Verification):
            self._outer.show(result)


def finish(case: Case, trained: Trained, masks: Masks) -> Products:
    """Merge, fold, verify and write everything under temporary names, then rename."""
    part = case.output / ".finishing"
    shutil.rmtree(part, ignore_errors=True)
    for name in (BASE, ADAPTER, MODEL):
        remove_stale(case.output / name)
    part.mkdir()
    try:
        return _Finishing(case, trained, masks, part).run()
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Finishing:
    """The steps from a trained LoRA to products, in a folder that is not yet in place."""

    def __init__(self, case: Case, trained: Trained, masks: Masks, part: Path) -> None:
        self.case, self.trained, self.masks, self.part = case, trained, masks, part
        self.treatment, self.reporter = case.recipe.treatment, case.patient.reporter
        self.record = record_of(case, trained)
        self.merged = part / "merged"

    def run(self) -> Products:
        """Make all, prove all, and only then put it in place."""
        case, part, checkpoint = self.case, self.part, self.case.checkpoint
        figure = part / LOSS_FIGURE
        title = f"{checkpoint.origin.name}: {case.recipe.name}"
        drawn = plot_loss(self.trained.history, figure, title)
        if self.treatment.intervention == "gated_attention":
            base, revision = names_of(checkpoint)
            shutil.copytree(self.trained.adapter, part / ADAPTER)
            name_base(part / ADAPTER, base, revision)
            checks = stands_alone(part / ADAPTER, self.record, checkpoint)
        else:
            checks = self._products()
        verification = Verification(tuple(checks))
        self.reporter.show(verification)
        verification.require()
        record: Any = {**self.record, "verification": verification.as_dict()}
        for name in (MODEL, ADAPTER):
            if (part / name).is_dir():
                add_training(part / name, record, checks, figure if drawn else None, checkpoint)
        # An adapter's base first, so that no adapter is ever there without it.
        places = {name: self._put(name) for name in (BASE, ADAPTER, MODEL)}
        if drawn:
            os.replace(figure, case.output / "loss.png")
        for name in (BASE, MODEL):
            if places[name] is not None and (case.output / name / MANIFEST).is_file():
                remember(read_manifest(case.output / name), case.checkpoint, None)
        write_json(case.work / "record.json", record)
        return Products(places, record, verification)

    def _put(self, name: str) -> Path | None:
        if not (self.part / name).is_dir():
            return None
        sync_tree(self.part / name)
        put(self.part / name, self.case.output / name)
        return self.case.output / name

    def _products(self) -> list[Check]:
        """The merged checkpoint, the adapter and its base, as the recipe asks; what was proven."""
        case, masks, part, treatment = self.case, self.masks, self.part, self.treatment
        self.reporter.say("Merging in float32")
        updates, names = _updates(case, self.trained.adapter)
        self.record["changed"] = write_merged(case.checkpoint, updates, names, self.merged)
        shut = masks.closed(case)
        checks = [verify_closed(updates, shut)] if shut else []
        folded, fold, quality = self.merged, None, None
        if masks.fold is not None:
            fold = case.settings.fold_used
            conversion = self._fold(self.merged, part / MODEL, _Within(self.reporter), check=True)
            folded = conversion.output
            assert conversion.verification is not None
            assert conversion.manifest is not None
            quality = conversion.manifest.quality
            checks += conversion.verification.checks
            if fold.exact:
                checks.append(verify_masked(case.checkpoint, folded, conversion.plan.edits))
        self.reporter.say("Comparing with the trained model under hooks")
        checks += agreement(
            case.patient,
            self.trained.adapter,
            folded,
            mask=masks.fold,
            fold=fold,
            quality=quality,
        )
        if treatment.save in ("adapter", "both"):
            self._adapter(updates, names)
            made = open_checkpoint(folded, Origin("directory", "merged", str(folded)))
            base = part / BASE if (part / BASE).is_dir() else case.checkpoint.folder
            loaded = Patient(made, case.settings.loading, dequantise=False)
            checks += agreement(loaded, part / ADAPTER, folded, base=base)
        if treatment.save == "adapter":
            shutil.rmtree(folded)
        elif masks.fold is None:
            os.rename(self.merged, part / MODEL)
            (part / MODEL / "surgery.json").unlink(missing_ok=True)  # it would speak of the base
        shutil.rmtree(self.merged, ignore_errors=True)
        return checks

    def _fold(self, source: Path, output: Path, reporter: Reporter, *, check: bool) -> Conversion:
        """A checkpoint with the mask in its weights, written down as made from the recipe's."""
        case, treatment = self.case, self.treatment
        settings = replace(
            case.settings, scope=treatment.fold_scope, layer=treatment.layer, check=check
        )
        base = case.checkpoint
        checkpoint = replace(
            resolve(str(source), None, reporter.say), origin=base.origin, left_out=base.left_out
        )
        kind = Folder()
        kind.accept(Request(checkpoint, settings, output, overwrite=False))
        patient = Patient(
            checkpoint,
            settings.loading,
            reporter,
            traced=check,
            dequantise=not settings.needs_no_weights,
        )
        masks = self.masks
        operation = decide(patient, settings, mask=masks.fold, emergence=masks.emergence)
        return carry_out(operation, kind, output, overwrite=False)

    def _adapter(self, updates: Mapping[str, LowRank], names: Any) -> None:
        """The updates as an adapter of the model they belong to.

        After `norm` and `qkv` that is the folded base, written beside it. A sink fold is itself of
        rank one and goes into the adapter, which then belongs to the recipe's own model.
        """
        case, mask, part = self.case, self.masks.fold, self.part
        base, revision = names_of(case.checkpoint)
        if mask is not None and case.settings.fold_used.low_rank:
            made = open_checkpoint(self.merged, Origin("directory", "merged", str(self.merged)))
            patient = Patient(made, case.settings.loading, self.reporter, dequantise=False)
            calibration = case.settings.fold_used.calibrate(patient, mask)

            def weight(module: str) -> Any:
                return made.read(names(f"{module}.weight"))

            anatomy = case.patient.anatomy
            updates = with_sinks(updates, anatomy, mask, calibration.directions, weight)
        elif mask is not None:
            self.reporter.say("Folding the base that the adapter belongs to")
            # What counts was measured on the merged model, and the adapter is compared with that.
            self._fold(case.checkpoint.folder, part / BASE, SILENT, check=False)
            base, revision = own_base(case.output), None
        write_adapter(part / ADAPTER, updates, base, revision)


def _updates(case: Case, adapter: Path) -> tuple[dict[str, LowRank], Any]:
    """The trained updates, and the checkpoint's name of each parameter."""
    import torch

    from surgery.models.loading import auto_class, load_config

    config = load_config(case.checkpoint.folder, trust_remote_code=case.settings.trust_remote_code)
    with torch.device("meta"):
        model = auto_class(config).from_config(
            config, trust_remote_code=case.settings.trust_remote_code
        )
    stored = StoredNames(case.checkpoint, model)

    def transposed(module: str) -> bool:
        return type(model.get_submodule(module)).__name__ == "Conv1D"

    return read_adapter(adapter, transposed), stored.of
