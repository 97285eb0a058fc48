"""What a conversion writes besides a checkpoint folder: a GGUF file, or an adapter for the base."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import BadCheckpoint, BadSettings, Unsupported, first_line
from surgery.files.checkpoint import Checkpoint
from surgery.files.generated import CARD, MANIFEST
from surgery.files.gguf_file import read_gguf, shards_of
from surgery.files.staging import temporary_sibling
from surgery.folds.fold import Edit
from surgery.jobs.convert import behaviour, hashed, verification_batch
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.outputs.adapter import (
    CONFIG,
    WEIGHTS,
    GgufUpdate,
    RankOne,
    gguf_updates,
    gguf_updates_of,
    peft_size,
    rank_one_terms,
    verify_peft,
    write_gguf_adapter,
    write_peft,
)
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.gguf_conversion import (
    MANIFEST_KEY,
    check_gguf_output,
    gguf_edits,
    gguf_staging,
    open_gguf,
    plan_gguf,
    read_embedded,
    restore_gguf,
    verify_gguf_bytes,
    write_gguf,
)
from surgery.outputs.manifest import Manifest, manifest_text, write_manifest
from surgery.outputs.plan import FilePlan, Plan, check_output, check_space, edits_by_file
from surgery.outputs.verification import Check, Verification, checked, divergence
from surgery.outputs.write import staging
from surgery.patient.containers import gguf_source, gguf_to_safetensors
from surgery.patient.subject import Subject
from surgery.reporter import Reporter
from surgery.settings import Settings

_GGUF_HEAD = 64 * 1024  # more than the metadata of an adapter takes, but for its manifest


def plan_product(
    form: str,
    source: Checkpoint,
    anatomy: Anatomy,
    mask: Mask,
    edits: tuple[Edit, ...],
    target: Path,
    *,
    overwrite: bool,
) -> Plan:
    """Which files a product consists of; raises like `surgery.plan.make_plan`."""
    if form == "gguf":
        if any(edit.kind not in ("gain", "bias") for edit in edits):
            raise Unsupported(
                "In a GGUF file only the norms can be edited, its projections are quantised: use "
                "--fold norm, or --fold sink with --as gguf-adapter."
            )
        path = gguf_source(source)
        checkpoint, files = open_gguf(path, source.origin, source.config)
        if MANIFEST_KEY in files[0].values:
            raise BadSettings(
                f"{path} was converted already, and a file holds one {MANIFEST_KEY} only; take "
                "back that conversion with surgery revert first."
            )
        named = gguf_edits(files, source, anatomy, mask)
        return replace(plan_gguf(checkpoint, named, target, overwrite=overwrite), form=form)
    if not edits:
        raise BadSettings("At --strength 0 there is nothing for an adapter to hold; give another.")
    axis = 0 if anatomy.input_axis else 1
    rows = {edit.tensor: source.tensors[edit.tensor].shape[axis] for edit in edits}
    size = peft_size(rows, anatomy.hidden_size)
    if form == "gguf-adapter":
        if target.suffix != ".gguf":
            raise BadSettings(
                "--as gguf-adapter writes one file; give an --output ending in .gguf."
            )
        check_gguf_output(source.sources, target, 1, overwrite=overwrite)
        files_planned: tuple[FilePlan, ...] = (FilePlan(target.name, size + _GGUF_HEAD),)
    else:
        check_output(source.sources, target, overwrite=overwrite)
        files_planned = (FilePlan(CONFIG, 2048), FilePlan(WEIGHTS, size))
    generated = (CARD, MANIFEST) if form == "adapter" else ()
    plan = Plan(source, Path(target).absolute(), files_planned, edits, overwrite, form, generated)
    check_space(plan)
    return plan


def write_product(
    plan: Plan, manifest: Manifest, subject: Subject, anatomy: Anatomy, mask: Mask
) -> tuple[Verification, Manifest]:
    """Write what was planned, verified before it gets its name."""
    write = {"gguf": _write_gguf, "adapter": _write_adapter, "gguf-adapter": _write_gguf_adapter}
    return write[plan.form](plan, manifest, subject, anatomy, mask)


# --------------------------------------------------------------------------------------------
# GGUF
# --------------------------------------------------------------------------------------------


def _write_gguf(
    plan: Plan, manifest: Manifest, subject: Subject, anatomy: Anatomy, mask: Mask
) -> tuple[Verification, Manifest]:
    files = [read_gguf(shard) for shard in shards_of(plan.checkpoint.folder / plan.files[0].name)]
    paths = [file.path for file in files]
    with gguf_staging(paths, plan.output, len(files), overwrite=plan.overwrite) as folder:
        subject.reporter.say(f"Writing {plan.output.name}")
        manifest, targets = write_gguf(plan, files, manifest, folder)
        checks = verify_gguf_bytes(targets[0])
        if subject.settings.check:
            subject.reporter.say("Verifying")
            checks += _gguf_behaviour(targets, subject, anatomy, mask)
        verification = Verification(tuple(checks))
        verification.require()
        subject.reporter.show(verification)
    return verification, replace(manifest, verification=verification.as_dict())


def _gguf_behaviour(
    written: Sequence[Path], subject: Subject, anatomy: Anatomy, mask: Mask
) -> list[Check]:
    """The written file, dequantised by transformers, against the base under hooks."""
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        folder = Path(temporary)
        gguf_to_safetensors(written, folder)
        return behaviour(subject, anatomy, mask, (), folder, subject.settings)


def verify_gguf(path: Path, settings: Settings, reporter: Reporter) -> Verification:
    """Prove a converted GGUF: its bytes against the base's hash, its logits against hooks.

    The base is restored from the file itself. Raises BadCheckpoint where surgery did not write it.
    """
    from surgery.patient.analysis import examine
    from surgery.patient.source import resolve

    manifest, files = read_embedded(path)
    reporter.say("Comparing bytes")
    checks = verify_gguf_bytes(path)
    if all(check.passed for check in checks):
        with temporary_sibling(path) as temporary:
            restored = temporary / files[0].path.name
            restore_gguf(path, restored)
            base = resolve(str(restored), say=reporter.say)
        anatomy = examine(base)
        subject = Subject(base, settings, reporter)
        mask = mask_of(manifest)
        checks += _gguf_behaviour([file.path for file in files], subject, anatomy, mask)
    return Verification(tuple(checks))


def mask_of(manifest: Manifest) -> Mask:
    """The mask that a manifest records."""
    return Mask(
        manifest.hidden_size,
        str(manifest.settings["select"]),
        manifest.strength,
        {layer: tuple(chosen) for layer, chosen in manifest.dimensions.items()},
    )


# --------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------


def _write_adapter(
    plan: Plan, manifest: Manifest, subject: Subject, anatomy: Anatomy, mask: Mask
) -> tuple[Verification, Manifest]:
    checkpoint, transposed = plan.checkpoint, anatomy.input_axis == 0
    terms = rank_one_terms(checkpoint, anatomy, plan.edits)
    with staging(plan.output, *checkpoint.sources, overwrite=plan.overwrite) as folder:
        subject.reporter.say(f"Writing {plan.output.name}")
        names = write_peft(folder, checkpoint.origin, terms, mask.strength, transposed=transposed)
        checks = [verify_peft(folder, terms, mask.strength, transposed=transposed)]
        if subject.settings.check:
            checks += adapter_behaviour(subject, anatomy, mask, plan.edits, folder)
        verification = Verification(tuple(checks))
        verification.require()
        manifest = replace(manifest, verification=verification.as_dict())
        card = render_card(manifest, front_matter(checkpoint.folder / CARD), figure=False)
        (folder / CARD).write_text(card, encoding="utf-8")
        manifest = replace(manifest, files=[hashed(folder, name) for name in (*names, CARD)])
        write_manifest(manifest, folder)
        subject.reporter.show(verification)
    return verification, manifest


def verify_adapter(
    folder: Path,
    manifest: Manifest,
    base: Checkpoint,
    anatomy: Anatomy,
    settings: Settings,
    reporter: Reporter,
) -> list[Check]:
    """An adapter in a folder against the base it was made for."""
    edits = manifest.rebuilt_edits()
    terms = rank_one_terms(base, anatomy, edits)
    transposed = anatomy.input_axis == 0
    checks = [verify_peft(folder, terms, manifest.strength, transposed=transposed)]
    if checks[0].passed:
        subject = Subject(base, settings, reporter)
        checks += adapter_behaviour(subject, anatomy, mask_of(manifest), edits, folder)
    return checks


def adapter_behaviour(
    subject: Subject,
    anatomy: Anatomy,
    mask: Mask,
    edits: Sequence[Edit],
    folder: Path,
) -> list[Check]:
    """The base with the adapter, by PEFT, against the folded weights and the paper's mask."""
    if find_spec("peft") is None:
        subject.reporter.say("Logits are not compared: that needs PEFT (pip install peft)")
        return []
    import torch
    from peft import PeftModel

    from surgery.folds.editing import edited
    from surgery.models.loading import quiet
    from surgery.models.reference import masked

    subject.reporter.say("Verifying")
    model, device = subject.model, subject.device
    ids, real = verification_batch(subject)

    def run(found: Any) -> Any:
        with torch.inference_mode():
            return found(
                input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
            ).logits[real.to(device)]

    base = run(model)
    with masked(model, anatomy, mask, "first"):
        reference = run(model)
    with edited(model, anatomy, subject.checkpoint, edits):
        folded = run(model)
    with quiet():
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
        except Exception as error:
            raise BadCheckpoint(f"PEFT cannot load {folder}: {first_line(error)}") from error
        adapted = run(wrapped)
    subject.release()
    distance, whole = divergence(folded, adapted), divergence(folded, base)
    return [
        Check(
            "PEFT's logits on the untouched base are the folded weights'",
            bool(distance <= 0.01 * whole + 1e-6),
            f"KL(folded ‖ this) {distance:.1e}, KL(folded ‖ base) {whole:.1e} nats per token",
        ),
        Check(
            "logits against the paper's mask (hook on the first token)",
            bool(torch.isfinite(adapted).all()),
            f"KL(reference ‖ this) {divergence(reference, adapted):.2e} nats per token; "
            f"KL(reference ‖ base) {divergence(reference, base):.2e}",
        ),
    ]


def _write_gguf_adapter(
    plan: Plan, manifest: Manifest, subject: Subject, anatomy: Anatomy, mask: Mask
) -> tuple[Verification, Manifest]:
    checkpoint = plan.checkpoint
    terms = rank_one_terms(checkpoint, anatomy, plan.edits)
    architecture, updates = _updates(checkpoint, anatomy, plan.edits, terms)
    manifest = replace(manifest, container={"kind": "gguf-adapter"})
    with gguf_staging(checkpoint.sources, plan.output, 1, overwrite=plan.overwrite) as folder:
        subject.reporter.say(f"Writing {plan.output.name}")
        path = folder / plan.product.name
        text = manifest_text(manifest)
        write_gguf_adapter(path, architecture, updates, mask.strength, checkpoint.origin, text)
        check = _verify_updates(path, architecture, updates, mask.strength)
        verification = Verification((check,))
        verification.require()
        subject.reporter.show(verification)
    return verification, replace(manifest, verification=verification.as_dict())


def verify_gguf_adapter(
    path: Path, manifest: Manifest, base: Checkpoint, anatomy: Anatomy
) -> Check:
    """An adapter for llama.cpp against the base it was made for.

    Raises BadCheckpoint where the manifest's edits do not fit the base.
    """
    edits = manifest.rebuilt_edits()
    edits_by_file(base, edits)
    terms = rank_one_terms(base, anatomy, edits)
    return _verify_updates(path, *_updates(base, anatomy, edits, terms), manifest.strength)


def _verify_updates(
    path: Path, architecture: str, updates: Sequence[GgufUpdate], strength: float
) -> Check:
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


def _updates(
    checkpoint: Checkpoint, anatomy: Anatomy, edits: Sequence[Edit], terms: Sequence[RankOne]
) -> tuple[str, list[GgufUpdate]]:
    if checkpoint.gguf is not None:
        files = [read_gguf(shard) for shard in shards_of(checkpoint.gguf)]
        return gguf_updates_of(files, terms, anatomy, edits)
    return gguf_updates(terms, anatomy, checkpoint.config)
