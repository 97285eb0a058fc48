"""A LoRA that llama.cpp loads beside its base: one file, its manifest inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.gguf_file import names_gguf, read_gguf
from surgery.models.anatomy import text_config
from surgery.outputs.base import (
    Output,
    Request,
    Restored,
    no_undo_of_adapter,
    refuse_what_folders_have,
    require_low_rank,
)
from surgery.outputs.checks import Check, Verification, checked
from surgery.outputs.describe import FileComparison
from surgery.outputs.gguf_container import (
    check_gguf_output,
    compare_shards,
    gguf_staging,
    repeated_gguf_name,
)
from surgery.outputs.gguf_updates import (
    GgufUpdate,
    llama_architecture,
    updates_for,
    write_gguf_adapter,
)
from surgery.outputs.low_rank import UPDATES, size_of
from surgery.outputs.manifest import Manifest, manifest_text
from surgery.outputs.operation import Operation
from surgery.outputs.plan import FilePlan, Plan, check_space, edits_by_file
from surgery.outputs.review import Review

_HEAD = 64 * 1024  # bytes; more than the metadata of an adapter takes, but for its manifest


class GgufAdapter(Output):
    """The sink fold as a .gguf LoRA of rank 1."""

    name = "gguf-adapter"
    one_file = True

    def default_path(self, stem: str, words: Sequence[str]) -> Path:
        return Path(f"{stem}-WeMask-v1.0-F32-LoRA.gguf")  # by GGUF's naming convention

    def accept(self, request: Request) -> None:
        refuse_what_folders_have(request)
        require_low_rank(request)
        if not names_gguf(request.target):
            raise BadSettings(
                "--as gguf-adapter writes one file; give an --output ending in .gguf."
            )
        config, sources = request.checkpoint.config, request.checkpoint.sources
        if request.checkpoint.gguf is None:
            llama_architecture(str(text_config(config).get("model_type")), config)
        check_gguf_output(sources, request.target, 1, overwrite=request.overwrite)

    def plan(self, operation: Operation, target: Path, *, overwrite: bool) -> Plan:
        base, edits = operation.patient.plain, operation.edits
        check_gguf_output(base.sources, target, 1, overwrite=overwrite)
        size = size_of(base, operation.patient.anatomy, edits) + _HEAD
        files = (FilePlan(target.name, size),)
        plan = Plan(base, Path(target).absolute(), files, edits, overwrite, beside=UPDATES)
        check_space(plan)
        return plan

    def write(
        self, plan: Plan, manifest: Manifest, operation: Operation
    ) -> tuple[Verification, Manifest]:
        patient, base = operation.patient, plan.checkpoint
        architecture, updates = updates_for(base, patient.anatomy, plan.edits)
        manifest = replace(manifest, container={"kind": self.name})
        strength = operation.mask.strength
        with gguf_staging(base.sources, plan.output, 1, overwrite=plan.overwrite) as folder:
            patient.reporter.say(f"Writing {plan.output.name}")
            path = folder / plan.product.name
            text = manifest_text(manifest)
            write_gguf_adapter(path, architecture, updates, strength, base.origin, text)
            verification = Verification((_verify(path, architecture, updates, strength),))
            verification.require()
            patient.reporter.show(verification)
        # As it is in the file, which was complete before anything about it was proven.
        return verification, manifest

    def wrote(self, manifest: Manifest, path: Path) -> bool:
        return manifest.settings.form == self.name

    def checks(self, review: Review) -> list[Check]:
        patient, edits = review.patient(), review.manifest.rebuilt_edits()
        anatomy = patient.anatomy
        edits_by_file(patient.plain, edits)  # a damaged manifest may name anything
        architecture, updates = updates_for(patient.plain, anatomy, edits)
        return [_verify(review.path, architecture, updates, review.manifest.strength)]

    def restore(self, review: Review, target: Path) -> Restored:
        raise no_undo_of_adapter(review.path)

    def repeated_name(self, path: Path, manifest: Manifest) -> str:
        return repeated_gguf_name(path, manifest)

    def compare(
        self, review: Review, again: Path, repeated: Manifest
    ) -> tuple[FileComparison, ...]:
        return compare_shards(review.path, again)


def _verify(path: Path, architecture: str, updates: Sequence[GgufUpdate], strength: float) -> Check:
    """The file holds the updates, their scale and nothing else."""

    def test() -> str:
        written = read_gguf(path)
        for key, value in (
            ("general.architecture", architecture),
            ("adapter.lora.alpha", np.float32(strength)),
        ):
            if written.values.get(key) != value:
                raise BadCheckpoint(f"{path.name} has another {key}")
        tensors = dict(written.tensors)
        for update in updates:
            for part, values in (("a", update.a), ("b", update.b)):
                name = f"{update.tensor}.lora_{part}"
                tensor = tensors.pop(name, None)
                if tensor is None or written.read(tensor) != values.tobytes():
                    raise BadCheckpoint(f"{name} is not what the base and the manifest give")
        if tensors:
            raise BadCheckpoint(f"{path.name} holds the unexpected tensor {next(iter(tensors))}")
        return f"{len(updates)} rank-one updates, {path.stat().st_size / 1e3:.0f} kB"

    return checked("the adapter equals the update recomputed from the base", test)
