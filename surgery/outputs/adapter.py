"""A PEFT adapter: the sink fold beside an untouched, also a quantised base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, BadSettings, first_line
from surgery.files.checkpoint import Origin
from surgery.files.generated import CARD, MANIFEST
from surgery.files.gguf_file import names_gguf
from surgery.files.ranges import LocalFiles
from surgery.files.safetensors_file import parse_header, write_safetensors
from surgery.files.text import read_json, write_text
from surgery.folds.edits import Edit
from surgery.method.mask import Mask
from surgery.outputs.base import (
    Output,
    Request,
    Restored,
    no_undo_of_adapter,
    refuse_what_folders_have,
    require_low_rank,
)
from surgery.outputs.behaviour import (
    Batch,
    as_folded,
    masked_logits,
    near_reference,
    run_again,
)
from surgery.outputs.card import ADAPTER_CARD
from surgery.outputs.checks import Check, Verification, checked, verify_files
from surgery.outputs.describe import FileComparison, compare_files, describe, hashed
from surgery.outputs.low_rank import UPDATES, Term, base_name, size_of, terms_of
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import Operation
from surgery.outputs.plan import FilePlan, Plan, check_output, check_space
from surgery.outputs.review import Review
from surgery.outputs.write import staging
from surgery.patient.patient import Patient

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(Output):
    """adapter_config.json and adapter_model.safetensors, with card and manifest."""

    name = "adapter"
    card = ADAPTER_CARD

    def default_path(self, stem: str, words: Sequence[str]) -> Path:
        return Path(f"{stem}-wemask-{'-'.join((*words, 'adapter'))}")

    def accept(self, request: Request) -> None:
        if names_gguf(request.target):
            raise BadSettings(
                "--as adapter writes a folder for PEFT; give another --output, or --as "
                "gguf-adapter for llama.cpp."
            )
        refuse_what_folders_have(request)
        require_low_rank(request)
        sources = request.checkpoint.sources
        check_output(sources, request.target, overwrite=request.overwrite)

    def plan(self, operation: Operation, target: Path, *, overwrite: bool) -> Plan:
        base, edits = operation.patient.plain, operation.edits
        check_output(base.sources, target, overwrite=overwrite)
        size = size_of(base, operation.patient.anatomy, edits)
        files = (FilePlan(CONFIG, 2048), FilePlan(WEIGHTS, size))
        plan = Plan(
            base,
            Path(target).absolute(),
            files,
            edits,
            overwrite,
            generated=(CARD, MANIFEST),
            beside=UPDATES,
        )
        check_space(plan)
        return plan

    def write(
        self, plan: Plan, manifest: Manifest, operation: Operation
    ) -> tuple[Verification, Manifest]:
        patient, base = operation.patient, plan.checkpoint
        transposed, strength = patient.anatomy.input_axis == 0, operation.mask.strength
        terms = terms_of(base, patient.anatomy, plan.edits)
        with staging(plan.output, *base.sources, overwrite=plan.overwrite) as folder:
            patient.reporter.say(f"Writing {plan.output.name}")
            names = write_peft(folder, base.origin, terms, strength, transposed=transposed)
            checks = [verify_peft(folder, terms, strength, transposed=transposed)]
            if operation.settings.check:
                checks += _behaviour(patient, operation.mask, plan.edits, folder, manifest.quality)
            verification = Verification(tuple(checks))
            verification.require()
            manifest = replace(
                manifest,
                verification=verification.as_dict(),
                files=[hashed(folder, name) for name in names],
            )
            manifest = describe(manifest, folder, base, plan.generated, self.card)
            patient.reporter.show(verification)
        return verification, manifest

    def wrote(self, manifest: Manifest, path: Path) -> bool:
        return manifest.settings.form == self.name

    def checks(self, review: Review) -> list[Check]:
        patient, manifest = review.patient(), review.manifest
        anatomy = patient.anatomy
        files = verify_files(review.path, manifest.files)
        if not files.passed:
            return [files]
        edits = manifest.settings.fold_used.edits(anatomy, manifest.mask(), manifest.calibration())
        terms = terms_of(patient.plain, anatomy, manifest.rebuilt_edits())
        transposed = anatomy.input_axis == 0
        checks = [verify_peft(review.path, terms, manifest.strength, transposed=transposed)]
        if checks[0].passed:
            checks += _behaviour(patient, manifest.mask(), edits, review.path, manifest.quality)
        return [files, *checks]

    def restore(self, review: Review, target: Path) -> Restored:
        raise no_undo_of_adapter(review.path)

    def compare(
        self, review: Review, again: Path, repeated: Manifest
    ) -> tuple[FileComparison, ...]:
        return compare_files(review.manifest, again, repeated, self.card)


def peft_config(
    origin: Origin, terms: Sequence[Term], strength: float, *, transposed: bool
) -> dict[str, Any]:
    """adapter_config.json. Modules are named in full, so that no other module answers to a name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(origin),
        "revision": origin.commit,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": int(strength) if strength == int(strength) else strength,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": [term.module for term in terms],
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def write_peft(
    folder: Path, origin: Origin, terms: Sequence[Term], strength: float, *, transposed: bool
) -> tuple[str, ...]:
    """Write a PEFT adapter into a folder; returns the names of its files."""
    config = peft_config(origin, terms, strength, transposed=transposed)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    tensors: dict[str, NDArray] = {}
    for term in terms:
        name = f"base_model.model.{term.module}"
        tensors[f"{name}.lora_A.weight"] = term.a[None, :]
        tensors[f"{name}.lora_B.weight"] = term.b[:, None]
    write_safetensors(
        folder / WEIGHTS,
        {name: ("F32", values.shape) for name, values in tensors.items()},
        lambda name: np.ascontiguousarray(tensors[name], dtype="<f4").tobytes(),
        {"format": "pt"},
    )
    return CONFIG, WEIGHTS


def verify_peft(folder: Path, terms: Sequence[Term], strength: float, *, transposed: bool) -> Check:
    """The adapter's tensors and scale are what the base's weights and the manifest give."""

    def test() -> str:
        config = read_json(folder / CONFIG)
        expected = peft_config(Origin("", "", ""), terms, strength, transposed=transposed)
        # Other keys too: PEFT takes patterns from some, which it searches for in its own time.
        for key in sorted({*expected, *config} - {"base_model_name_or_path", "revision"}):
            if config.get(key) != expected.get(key):
                raise BadCheckpoint(f"{CONFIG} has another {key}")
        files = LocalFiles(folder)
        entries = parse_header(files, WEIGHTS)
        for term in terms:
            for part, values in (("lora_A", term.a), ("lora_B", term.b)):
                name = f"base_model.model.{term.module}.{part}.weight"
                entry = entries.pop(name, None)
                if entry is None or files.read(WEIGHTS, entry.begin, entry.end) != values.tobytes():
                    raise BadCheckpoint(f"{name} is not what the base and the manifest give")
        if entries:
            raise BadCheckpoint(f"{WEIGHTS} holds the unexpected tensor {next(iter(entries))}")
        return f"{len(terms)} rank-one updates recomputed"

    return checked("the adapter equals the update recomputed from the base", test)


def _behaviour(
    patient: Patient,
    mask: Mask,
    edits: Sequence[Edit],
    folder: Path,
    quality: Mapping[str, Any] | None,
) -> list[Check]:
    """The base with the adapter, by PEFT, against the folded weights and the paper's mask."""
    if find_spec("peft") is None:
        patient.reporter.say("Logits are not compared: that needs PEFT (pip install peft)")
        return []
    from peft import PeftModel  # imports torch

    from surgery.folds.editing import edited
    from surgery.measure.logits import divergence
    from surgery.models.loading import quiet

    patient.reporter.say("Verifying")
    model, batch = patient.model, Batch.of(patient)
    base = batch.logits(model)
    reference = masked_logits(batch, patient, mask, "first")
    folded = batch.logits(model, edited(model, patient.plain, edits))
    with quiet():
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
        except Exception as error:
            raise BadCheckpoint(f"PEFT cannot load {folder}: {first_line(error)}") from error
        adapted = batch.logits(wrapped)
    patient.release()
    # The adapter is float32 beside rounded weights: a hundredth of what the fold does is allowed.
    allowed = 0.01 * divergence(folded.double(), base.double()) + 1e-6
    name = "PEFT's logits on the untouched base are the folded weights'"
    return [
        as_folded(name, adapted, folded, allowed),
        near_reference(adapted, reference, base, quality, run_again(patient.loading.dtype)),
    ]
