"""The main job, from a name to a verified checkpoint: each step is one function of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings, QualityGate, SurgeryError
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.digests import file_sha256
from surgery.files.generated import CARD, FIGURE, MANIFEST, UNDO
from surgery.files.staging import remove_stale
from surgery.folds.fold import Edit, SinkDirection, make_edits
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, attention_targets, mask_size
from surgery.models.anatomy import Anatomy, depth_of, width_of
from surgery.models.loading import auto_class_name
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.manifest import (
    EditRecord,
    FileRecord,
    Manifest,
    clean_numbers,
    records,
    sink_records,
    tool_version,
    versions,
    write_manifest,
)
from surgery.outputs.plan import Plan, check_output, make_plan
from surgery.outputs.undo import replaced_files, undo_size, write_undo
from surgery.outputs.verification import (
    Check,
    Verification,
    verify_behaviour,
    verify_edits,
    verify_structure,
    verify_untouched,
)
from surgery.outputs.write import copy_plan, staging
from surgery.patient.analysis import choose_mask, examine, find_emergence, given_emergence
from surgery.patient.hub import check_downloads
from surgery.patient.quantised import dequantised, loadable, require_editable
from surgery.patient.source import resolve
from surgery.patient.subject import Subject, calibration_windows, heldout_windows
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

if TYPE_CHECKING:
    from surgery.folds.calibrate import Leak
    from surgery.measure.quality import Quality

# Tokens on which base, hooks and written checkpoint are compared logit by logit.
VERIFY_TOKENS = 192


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: every object of the pipeline.

    output: the folder or file, of several shards the first. manifest: None after a dry run.
    """

    output: Path
    plan: Plan
    mask: Mask
    emergence: Emergence | None
    quality: Quality | None
    verification: Verification | None
    manifest: Manifest | None


def calibrate_sinks(
    subject: Subject, anatomy: Anatomy, mask: Mask, settings: Settings, reporter: Reporter
) -> tuple[dict[int, SinkDirection], dict[int, Leak]]:
    """The sink direction of every target layer, in order."""
    from surgery.folds.calibrate import sink_directions

    sequences = calibration_windows(subject, settings)
    with reporter.bar("Calibrating the sink direction", len(mask.layers)) as advance:
        return sink_directions(
            subject.model, anatomy, subject.checkpoint, mask, sequences, progress=advance
        )


def measure_quality(
    subject: Subject,
    anatomy: Anatomy,
    mask: Mask,
    edits: Sequence[Edit],
    settings: Settings,
    reporter: Reporter,
    sinks: Mapping[int, SinkDirection] | None = None,
) -> tuple[Quality, dict[int, Leak]]:
    """Base, reference and folded weights on held-out text, and the detectors' leak there."""
    from surgery.folds.calibrate import LeakWatcher
    from surgery.folds.editing import EditedWeights
    from surgery.measure.quality import measure, unmodified
    from surgery.models.reference import masked

    model, checkpoint = subject.model, subject.checkpoint
    sequences = heldout_windows(subject, settings.check_tokens)
    watcher = LeakWatcher(model, anatomy, sinks or {})
    weights = EditedWeights(model, anatomy, checkpoint, edits)

    @contextmanager
    def folded() -> Iterator[None]:
        with weights.active(), watcher.watch():
            yield

    def reference() -> AbstractContextManager[None]:
        return masked(model, anatomy, mask)

    variants = {"base": unmodified, "reference": reference, "folded": folded}
    total = sum(len(sequence) for sequence in sequences)
    with reporter.bar("Measuring base, reference and fold", total) as advance:
        quality = measure(model, anatomy, sequences, min(mask.layers), variants, progress=advance)
    return quality, watcher.leaks()


def convert(
    model: str,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    emergence: Emergence | None = None,
    mask: Mask | None = None,
    reporter: Reporter = SILENT,
    spoken_as: tuple[str, str | None, Origin] | None = None,
    **options: Any,
) -> Conversion:
    """Fold WeMask into a checkpoint and write it, verified, to `output`.

    model: a folder, a Hub id (`name@revision`), a .gguf file or "demo". options: the fields of
    `Settings`. emergence, mask: results of earlier steps, used instead of finding them again.
    spoken_as: model, revision and origin to write down instead, when a conversion is repeated.
    Raises a SurgeryError that says what is wrong; then nothing has been written.
    """
    settings = Settings(model=model, **options)
    checkpoint = resolve(model, settings.revision, reporter.say)
    if spoken_as is not None:
        settings = replace(settings, model=spoken_as[0], revision=spoken_as[1])
        checkpoint = replace(checkpoint, origin=spoken_as[2])
    target = Path(output) if output is not None else default_output(checkpoint, settings)
    form = "gguf" if target.suffix == ".gguf" and settings.form == "checkpoint" else settings.form
    if form == "checkpoint":
        check_output(checkpoint.sources, target, overwrite=overwrite)
    mask_size(settings.rate, width_of(checkpoint.config))
    check_given_layers(settings, depth_of(checkpoint.config))
    _check_form(settings, form, target)
    require_editable(checkpoint, settings.fold, settings.strength, form)
    analysed = checkpoint if _needs_no_weights(settings) else dequantised(checkpoint, reporter.say)
    anatomy = examine(analysed, check=settings.check, trust_remote_code=settings.trust_remote_code)
    anatomy.require(settings.fold)
    if mask is None:
        anatomy.require_selection(settings.select)
    subject = Subject(analysed, settings, reporter)
    if mask is None:
        targets, emergence = _targets(subject, anatomy, emergence, settings, reporter)
        mask = choose_mask(subject, anatomy, targets, settings)
    for layer in mask.layers:
        anatomy.at(layer)
    sinks: dict[int, SinkDirection] | None = None
    leaks: dict[int, Leak] = {}
    if settings.fold == "sink":
        sinks, leaks = calibrate_sinks(subject, anatomy, mask, settings, reporter)
    edits = make_edits(anatomy, mask, settings.fold, sinks)
    if not dry_run:
        # Before the plan looks at the output and at the free space. What an earlier run was killed
        # in the middle of putting there, this one may replace.
        overwrite |= remove_stale(target)
    if form == "checkpoint":
        plan = make_plan(
            checkpoint,
            edits,
            target,
            overwrite=overwrite,
            figure=emergence is not None and bool(emergence.rows),
            undo_size=undo_size(checkpoint, edits) if settings.undo_file else 0,
        )
    else:
        from surgery.outputs.products import plan_product

        plan = plan_product(form, analysed, anatomy, mask, edits, target, overwrite=overwrite)
    reporter.show(plan)
    if dry_run:
        return Conversion(plan.product, plan, mask, emergence, None, None, None)
    quality, quality_record = None, None
    if settings.check:
        quality, leaks = measure_quality(subject, anatomy, mask, edits, settings, reporter, sinks)
        reporter.show(quality)
        forced = _gate(subject, anatomy, mask, quality, settings, reporter)
        quality_record = {**quality.as_dict(), "forced": forced, "leak_text": "held-out text"}
    manifest = replace(
        known_manifest(
            checkpoint,
            anatomy,
            mask,
            records(plan.checkpoint, plan.edits),
            emergence,
            settings,
        ),
        sinks=sink_records(sinks, leaks) if sinks else {},
        quality=clean_numbers(quality_record),
    )
    if form == "checkpoint":
        verification, manifest = _write(
            plan, manifest, subject, anatomy, mask, emergence, settings, reporter
        )
    else:
        from surgery.outputs.products import write_product

        verification, manifest = write_product(plan, manifest, subject, anatomy, mask)
    return Conversion(plan.product, plan, mask, emergence, quality, verification, manifest)


def known_manifest(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    mask: Mask,
    edits: list[EditRecord],
    emergence: Emergence | None,
    settings: Settings,
) -> Manifest:
    """The manifest as far as it is known before anything is measured or written."""
    return Manifest(
        tool=f"wemask-surgery {tool_version()}",
        base=checkpoint.origin,
        model_type=anatomy.model_type,
        hidden_size=anatomy.hidden_size,
        depth=anatomy.depth,
        anatomy=anatomy.known_from,
        settings=recorded(settings),
        strength=mask.strength,
        dimensions={layer: list(mask.dimensions[layer]) for layer in mask.layers},
        edits=edits,
        sinks={},
        files=[],
        versions=versions(),
        left_out=list(checkpoint.left_out),
        replaced=replaced_files(checkpoint),
        emergence=clean_numbers(emergence.as_dict()) if emergence else None,
        auto_class=auto_class_name(checkpoint, trust_remote_code=settings.trust_remote_code),
    )


def _needs_no_weights(settings: Settings) -> bool:
    """Whether the headers and the gains tell all that these settings ask for."""
    given = settings.layer is not None or settings.layers is not None
    return given and not settings.check and settings.fold == "norm" and settings.select == "weight"


def default_output(checkpoint: Checkpoint, settings: Settings) -> Path:
    """./<name>-wemask-<settings>."""
    parts = [settings.fold, settings.scope, f"{settings.rate:g}"]
    if settings.layers is not None:
        parts[1] = "layers" + "+".join(str(layer) for layer in settings.layers)
    if settings.select != "weight":
        parts.append(settings.select)
    if settings.strength != 1.0:
        parts.append(f"strength{settings.strength:g}")
    name = checkpoint.origin.name.rsplit("/", 1)[-1]
    if settings.form == "gguf-adapter":  # by GGUF's naming convention
        return Path(f"{name}-WeMask-v1.0-F32-LoRA.gguf")
    if settings.form == "adapter":
        parts.append("adapter")
    return Path(f"{name}-wemask-{'-'.join(parts)}")


def recorded(settings: Settings) -> dict[str, Any]:
    """Settings as the manifest keeps them: paths of this machine say nothing elsewhere."""
    kept = asdict(settings)
    kept["layers"] = list(settings.layers) if settings.layers is not None else None
    kept.pop("device")
    return kept


def check_given_layers(settings: Settings, depth: int) -> None:
    """Raise BadSettings for layers that the model has not."""
    if settings.layer is not None and not 0 <= settings.layer < depth - 1:
        raise BadSettings(
            f"--layer {settings.layer} is not a layer with one after it: the model has layers 0 to "
            f"{depth - 1}."
        )
    for layer in settings.layers or ():
        if not 0 <= layer < depth:
            raise BadSettings(f"--layers names {layer}; the model has layers 0 to {depth - 1}.")
    if settings.layers is not None and not settings.layers:
        raise BadSettings("--layers names no layer.")


def _check_form(settings: Settings, form: str, target: Path) -> None:
    """Raise BadSettings for what does not go with the kind of output."""
    if form == "adapter" and target.suffix == ".gguf":
        raise BadSettings(
            "--as adapter writes a folder for PEFT; give another --output, or --as gguf-adapter "
            "for llama.cpp."
        )
    if form != "checkpoint" and settings.undo_file:
        raise BadSettings(
            "--undo-file is for checkpoint folders: a .gguf file is undone from its own metadata, "
            "and an adapter changes no byte of its base; leave it out."
        )


def _targets(
    subject: Subject,
    anatomy: Anatomy,
    emergence: Emergence | None,
    settings: Settings,
    reporter: Reporter,
) -> tuple[tuple[int, ...], Emergence | None]:
    if settings.layers is not None:
        return tuple(sorted(set(settings.layers))), None
    if emergence is None and settings.layer is not None:
        emergence = given_emergence(settings.layer)
    if emergence is None:
        emergence = find_emergence(subject, anatomy, settings, reporter)
        reporter.show(emergence)
    targets = attention_targets(emergence.require(), anatomy.attends, settings.scope)
    skipped = set(range(emergence.require() + 1, targets[-1])) - set(targets)
    if skipped:
        reporter.say(
            f"Skipping {'layers' if len(skipped) > 1 else 'layer'} "
            f"{', '.join(map(str, sorted(skipped)))}: no attention there to mask"
        )
    return targets, emergence


def _gate(
    subject: Subject,
    anatomy: Anatomy,
    mask: Mask,
    quality: Quality,
    settings: Settings,
    reporter: Reporter,
) -> bool:
    """Whether the fold had to be forced; raises QualityGate where it is not."""
    from surgery.measure.quality import require_quality

    try:
        require_quality(quality, settings.fold, settings.max_degradation, None)
    except QualityGate:
        if settings.force:
            return True
        better = _alternative(subject, anatomy, mask, settings, reporter)
        require_quality(quality, settings.fold, settings.max_degradation, better)
    return False


def _alternative(
    subject: Subject, anatomy: Anatomy, mask: Mask, settings: Settings, reporter: Reporter
) -> tuple[str, Any] | None:
    """How the sink fold does on the same text, for the error message."""
    if settings.fold == "sink":
        return None
    try:
        reporter.say("Too much degradation; measuring the sink fold for comparison")
        sinks, _ = calibrate_sinks(subject, anatomy, mask, settings, reporter)
        edits = make_edits(anatomy, mask, "sink", sinks)
        quality, _ = measure_quality(subject, anatomy, mask, edits, settings, reporter)
    except SurgeryError:
        return None
    return "sink", quality["folded"]


def _write(
    plan: Plan,
    manifest: Manifest,
    subject: Subject,
    anatomy: Anatomy,
    mask: Mask,
    emergence: Emergence | None,
    settings: Settings,
    reporter: Reporter,
) -> tuple[Verification, Manifest]:
    checkpoint = plan.checkpoint
    with staging(plan.output, *checkpoint.sources, overwrite=plan.overwrite) as folder:
        with reporter.bar("Writing", plan.bytes_written) as advance:
            written = copy_plan(plan, folder, advance)
        check_downloads(checkpoint, {w.name: w.source_sha256 for w in written})
        figure = FIGURE in plan.generated
        if figure and emergence is not None:
            from surgery.report.plots import plot_layers

            plot_layers(emergence, folder / FIGURE, title=checkpoint.origin.name)
        checks = [
            verify_structure(checkpoint, folder),
            verify_edits(checkpoint, folder, plan.edits),
        ]
        if settings.check:
            reporter.say("Verifying")
            checks.append(verify_untouched(checkpoint, folder, plan.edits))
            checks += behaviour(subject, anatomy, mask, plan.edits, folder, settings)
        verification = Verification(tuple(checks))
        verification.require()
        manifest = replace(manifest, verification=verification.as_dict())
        card = render_card(manifest, front_matter(checkpoint.folder / CARD), figure=figure)
        (folder / CARD).write_text(card, encoding="utf-8")
        files = [FileRecord(w.name, w.size, w.sha256, w.source_sha256) for w in written]
        if UNDO in plan.generated:
            write_undo(folder / UNDO, checkpoint, plan.edits)
        files += [hashed(folder, name) for name in plan.generated if name != MANIFEST]
        manifest = replace(manifest, files=files)
        write_manifest(manifest, folder)
        reporter.show(verification)
    return verification, manifest


def hashed(folder: Path, name: str) -> FileRecord:
    """A file as the manifest records it."""
    path = folder / name
    return FileRecord(name, path.stat().st_size, file_sha256(path))


def verification_batch(subject: Subject) -> tuple[Any, Any]:
    """Token ids [B, T] of several sequences, so that padding counts, and which are real, bool."""
    from surgery.models.observe import pad

    ids, real = pad(heldout_windows(subject, VERIFY_TOKENS, VERIFY_TOKENS // 2))
    return ids, real.bool()


def behaviour(
    subject: Subject,
    anatomy: Anatomy,
    mask: Mask,
    edits: Sequence[Edit],
    folder: Path,
    settings: Settings,
) -> list[Check]:
    """The written checkpoint, loaded by stock transformers, against the base under hooks."""
    import torch

    from surgery.models.reference import masked

    device = subject.device
    ids, real = verification_batch(subject)
    model = subject.model

    def run() -> Any:
        with torch.inference_mode():
            return model(
                input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
            ).logits[real.to(device)]

    base_logits = run()
    with masked(model, anatomy, mask, "first" if settings.fold == "sink" else "all"):
        reference_logits = run()
    model = None
    subject.release()
    # Halving a gain is exact in any binary format, scaling by other factors is rounded.
    exact = mask.strength in (0.0, 1.0)
    with loadable(folder) as loaded:
        return verify_behaviour(
            base_logits,
            reference_logits,
            loaded,
            ids,
            real,
            fold=settings.fold,
            exact=exact,
            inexact_because="scaled weights are rounded to the stored format",
            dtype=settings.dtype,
            device=device,
            trust_remote_code=settings.trust_remote_code,
        )
