"""A .gguf file patched in place: the same container, its gains edited, everything else kept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import BadSettings, Unsupported
from surgery.files.gguf_file import read_gguf, shard_path, shards_of
from surgery.files.staging import temporary_sibling
from surgery.folds.registry import fold_named
from surgery.method.mask import Mask
from surgery.outputs.base import Output, Request, Restored, refuse_what_folders_have
from surgery.outputs.behaviour import behaviour
from surgery.outputs.checks import Check, Verification
from surgery.outputs.describe import FileComparison
from surgery.outputs.gguf_container import (
    check_gguf_output,
    compare_shards,
    gguf_staging,
    read_embedded,
    repeated_gguf_name,
)
from surgery.outputs.gguf_names import MANIFEST_KEY
from surgery.outputs.gguf_patch import (
    gguf_edits,
    open_gguf,
    require_editable_gains,
    restore_gguf,
    verify_gguf_bytes,
    write_gguf,
)
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import Operation
from surgery.outputs.plan import FilePlan, Plan, check_space, edits_by_file
from surgery.outputs.review import Review
from surgery.patient.containers import gguf_source, gguf_to_safetensors
from surgery.patient.patient import Patient
from surgery.patient.source import resolve


class Gguf(Output):
    """The norm fold in a GGUF; its manifest travels inside and restores the base from the file."""

    name = "gguf"
    one_file = True

    def default_path(self, stem: str, words: Sequence[str]) -> Path:
        return Path(f"{stem}-wemask-{'-'.join(words)}.gguf")

    def accept(self, request: Request) -> None:
        refuse_what_folders_have(request)
        if request.settings.fold_used.linear:
            raise Unsupported(
                "In a GGUF file only the norms can be edited, its projections are quantised: use "
                "--fold norm, or --fold sink with --as gguf-adapter."
            )
        path = gguf_source(request.checkpoint)
        if MANIFEST_KEY in read_gguf(path).values:
            raise BadSettings(
                f"{path} was converted already, and a file holds one {MANIFEST_KEY} only; take "
                "back that conversion with surgery revert first."
            )
        shards = shards_of(path)
        if request.settings.strength != 0.0:
            require_editable_gains([read_gguf(shard) for shard in shards])
        check_gguf_output(shards, request.target, len(shards), overwrite=request.overwrite)

    def plan(self, operation: Operation, target: Path, *, overwrite: bool) -> Plan:
        plain = operation.patient.plain
        checkpoint, files = open_gguf(gguf_source(plain), plain.origin, plain.config)
        edits = gguf_edits(files, operation.patient, operation.mask)
        by_file = edits_by_file(checkpoint, edits)
        planned = tuple(
            FilePlan(name, checkpoint.file_sizes[name], by_file.get(name, ()))
            for name in checkpoint.weight_files
        )
        output = target.absolute()
        check_gguf_output([file.path for file in files], output, len(files), overwrite=overwrite)
        first = shard_path(output, 1, len(files)).name
        plan = Plan(checkpoint, output, planned, edits, overwrite, first=first)
        check_space(plan)
        return plan

    def write(
        self, plan: Plan, manifest: Manifest, operation: Operation
    ) -> tuple[Verification, Manifest]:
        reporter = operation.patient.reporter
        shards = shards_of(plan.checkpoint.folder / plan.files[0].name)
        files = [read_gguf(shard) for shard in shards]
        with gguf_staging(shards, plan.output, len(files), overwrite=plan.overwrite) as folder:
            reporter.say(f"Writing {plan.output.name}")
            manifest, targets = write_gguf(plan, files, manifest, folder)
            checks = verify_gguf_bytes(targets[0])
            if operation.settings.check:
                reporter.say("Verifying")
                checks += self._behaviour(targets, operation.patient, operation.mask)
            verification = Verification(tuple(checks))
            verification.require()
            reporter.show(verification)
        # As it is in the file, which was complete before anything about it was proven.
        return verification, manifest

    def _behaviour(self, written: Sequence[Path], patient: Patient, mask: Mask) -> list[Check]:
        """The written file, dequantised by transformers, against the base under hooks."""
        with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
            folder = Path(temporary)
            gguf_to_safetensors(written, folder)
            return behaviour(patient, mask, fold_named("norm"), folder, (), None)

    def wrote(self, manifest: Manifest, path: Path) -> bool:
        return path.is_file() and manifest.settings.form == "checkpoint"

    def checks(self, review: Review) -> list[Check]:
        path = review.path
        if review.base is not None:
            raise BadSettings(
                f"{path.name} holds what restores its base; leave out --base {review.base}."
            )
        manifest, files = read_embedded(path)
        review.reporter.say("Comparing bytes")
        checks = verify_gguf_bytes(path)
        if not all(check.passed for check in checks):
            return checks
        with temporary_sibling(path) as temporary:
            restored = temporary / files[0].path.name
            restore_gguf(path, restored)
            patient = review.patient(resolve(str(restored), say=review.reporter.say))
        return checks + self._behaviour([file.path for file in files], patient, manifest.mask())

    def restore(self, review: Review, target: Path) -> Restored:
        _, files = read_embedded(review.path)
        paths = [file.path for file in files]
        with gguf_staging(paths, target, len(files), overwrite=False) as folder:
            return Restored("manifest", restore_gguf(review.path, folder / target.name))

    def repeated_name(self, path: Path, manifest: Manifest) -> str:
        return repeated_gguf_name(path, manifest)

    def compare(
        self, review: Review, again: Path, repeated: Manifest
    ) -> tuple[FileComparison, ...]:
        return compare_shards(review.path, again)
