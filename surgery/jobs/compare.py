"""What an edit gained and lost: base, the paper's reference and edited checkpoints side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadCheckpoint, BadSettings, Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.files.digests import file_sha256
from surgery.files.generated import MANIFEST
from surgery.files.weights import method_of
from surgery.measure.edited import BASE, EDITED, REFERENCE, Edited, references_of
from surgery.measure.task_loading import load_tasks
from surgery.measure.task_settings import TaskSettings, task_settings
from surgery.measure.tasks import run_tasks
from surgery.method.mask import Mask, Selection, attention_targets
from surgery.models.anatomy import depth_of, text_config, width_of
from surgery.outputs.comparison import Comparison, Variant
from surgery.outputs.manifest import versions
from surgery.outputs.registry import recorded
from surgery.patient import texts
from surgery.patient.locating import choose_mask, find_emergence
from surgery.patient.patient import Loading, Patient
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from surgery.measure.task_scores import TaskRow
    from surgery.measure.text import TextMeasure

logger = logging.getLogger(__name__)


def compare(
    base: str,
    *edited: str | Path,
    text: str | Path | None = None,
    measure: bool = True,
    check_tokens: int = 4096,
    tasks: Sequence[str] = (),
    data: str | None = TaskSettings.data,
    limit: int | None = TaskSettings.limit,
    batch_size: str | None = TaskSettings.batch_size,
    seeds: tuple[int, ...] = TaskSettings.seeds,
    max_new_tokens: int | None = TaskSettings.max_new_tokens,
    temperature: float | None = TaskSettings.temperature,
    chat_template: bool | None = TaskSettings.chat_template,
    thinking: bool = TaskSettings.thinking,
    backend: str = TaskSettings.backend,
    reference: bool = True,
    revision: str | None = Loading.revision,
    device: str | None = Loading.device,
    dtype: str = Loading.dtype,
    stream: bool | None = Loading.stream,
    trust_remote_code: bool = Loading.trust_remote_code,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Measure what edits gained and lost against their base, on text and on tasks.

    Args:
        base: in any form that `resolve` takes.
        edited: likewise; they need not be ours, only of the same architecture and tokenizer.
        text: a file, or hub:NAME for a data set (`texts.dataset_texts`), in place of the bundled
            held-out text.
        measure: whether to measure on text at all.
        check_tokens: tokens of text, at most about.
        tasks: lm-eval task names, groups or YAML files.
        reference: also run the paper's hooks on the base, with the mask of each edited
            checkpoint's manifest, or located anew where there is none.
        revision: of the base.
        device: None for the best there is.
        dtype: that models run in.
        stream: whether the text is measured layer by layer from the checkpoints' files instead of
            loading them; None for what suits each one's size and the memory.
        trust_remote_code: whether checkpoints' own Python code may run.
        reporter: whom to tell.

    The others are the fields of `TaskSettings`.

    Raises:
        SurgeryError: says what is wrong.
    """
    given = locals()
    if not edited:
        raise BadSettings("Give at least one edited checkpoint to compare with the base.")
    if check_tokens < 1:
        raise BadSettings("--check-tokens must be at least 1.")
    if not measure and not tasks:
        raise BadSettings("There is nothing to measure: give --tasks, or leave out --no-text.")
    chosen = task_settings(given)
    loading = Loading(revision, device or _rank_device(), dtype, trust_remote_code, stream=stream)
    patient = Patient.admit(base, loading, reporter, dequantise=False)
    notes: list[str] = []
    known = _has_anatomy(patient, notes)
    others = [_admit(patient, str(one), notes, known=known) for one in edited]
    # Before anything is measured: a misspelt task should not cost an hour.
    loaded = load_tasks(chosen, reporter) if chosen is not None else None
    notes += loaded.notes if loaded is not None else ()
    logger.info("comparing %d checkpoints with %s", len(others), base)
    reporter.say("Hashing weight files")
    steps = known and _in_floats(patient)
    compared = [replace(one, steps=steps and _in_floats(one.patient)) for one in _named(others)]
    if reference and known:
        compared = _with_references(patient, compared, notes)
    variants = _variants(patient, compared)
    windows: list[list[int]] = []
    measures: tuple[TextMeasure, ...] = ()
    if measure and int(os.environ.get("RANK", "0")) == 0:
        from surgery.measure.text import measure_beside  # imports torch

        windows = _windows(patient, text, check_tokens)
        measures = measure_beside(patient, compared, windows, attention=known)
    rows: tuple[TaskRow, ...] = ()
    settings: dict[str, Any] = {
        "text": _text_name(text) if measure else None,
        "tokens": sum(len(window) for window in windows),
        "sequences": len(windows),
        "dtype": dtype,
        "device": str(patient.device),
    }
    if loaded is not None:
        rows, settings["tasks"] = run_tasks(loaded, patient, compared, notes)
    packages = _versions(loaded is not None)
    return Comparison(variants, measures, rows, settings, packages, tuple(notes))


def _variants(base: Patient, edited: Sequence[Edited]) -> tuple[Variant, ...]:
    """Which models are compared, told by the sha256 of their weight files."""
    origin = base.checkpoint.origin
    return (
        Variant(BASE, BASE, origin.name, _weights(base.checkpoint), origin.commit),
        *(
            Variant(name, REFERENCE, f"hooks on {origin.name}") for name in references_of(edited)
        ),
        *(
            Variant(
                one.name, EDITED, one.name, _weights(one.patient.checkpoint),
                one.patient.checkpoint.origin.commit, one.reference,
            )
            for one in edited
        ),
    )  # fmt: skip


def _weights(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: file_sha256(checkpoint.folder / name) for name in checkpoint.weight_files}


def _rank_device() -> str | None:
    """Under `accelerate launch`, every process has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else None


def _has_anatomy(patient: Patient, notes: list[str]) -> bool:
    """Whether attention can be found in the base; otherwise only text and tasks are measured."""
    try:
        return patient.anatomy is not None
    except Unsupported as error:
        notes.append(f"There is no reference and no attention to measure: {error}")
        return False


# --------------------------------------------------------------------------------------------
# The edited checkpoints
# --------------------------------------------------------------------------------------------


def _admit(base: Patient, typed: str, notes: list[str], *, known: bool) -> Patient:
    """An edited checkpoint, as it is stored.

    Raises:
        BadSettings: where it cannot be compared with the base.
    """
    checkpoint = resolve(typed, None, base.reporter.say)
    anatomy = base.anatomy if known else None
    edited = Patient(checkpoint, base.loading, dequantise=False, anatomy=anatomy)
    _require_same_shape(base.checkpoint, checkpoint)
    _require_same_tokenizer(base, edited, notes)
    return edited


def _in_floats(patient: Patient) -> bool:
    """Whether a checkpoint's weights can be run a layer at a time: packed ones cannot."""
    return not method_of(patient.checkpoint.config)


def _require_same_shape(base: Checkpoint, edited: Checkpoint) -> None:
    def shape(checkpoint: Checkpoint) -> dict[str, Any]:
        config = checkpoint.config
        return {
            "model type": checkpoint.model_type,
            "hidden size": width_of(config),
            "number of layers": depth_of(config),
            "vocabulary": text_config(config).get("vocab_size"),
        }

    ours, theirs = shape(base), shape(edited)
    for what, value in ours.items():
        if theirs[what] != value:
            raise BadSettings(
                f"{edited.origin.typed} cannot be compared with {base.origin.typed}: its {what} is "
                f"{theirs[what]}, not {value}."
            )


def _require_same_tokenizer(base: Patient, edited: Patient, notes: list[str]) -> None:
    try:
        tokenizer = edited.tokenizer
    except BadCheckpoint:
        name = edited.checkpoint.origin.name
        notes.append(f"{name} has no tokenizer of its own; the base's is used.")
        return
    sample = [part.text[:2000] for part in texts.bundled("heldout")[:20]]
    if any(tokenizer(part)["input_ids"] != base.tokenizer(part)["input_ids"] for part in sample):
        raise BadSettings(
            f"{edited.checkpoint.origin.typed} cannot be compared with the base: its tokenizer "
            "gives other tokens for the same text."
        )


def _named(patients: Sequence[Patient]) -> list[Edited]:
    """The checkpoints under their own names, numbered where these are the same."""
    found: dict[str, Edited] = {}
    for patient in patients:
        origin = patient.checkpoint.origin
        name, number = origin.name, 2
        while name in (BASE, REFERENCE, *found):
            name, number = f"{origin.name} ({number})", number + 1
        found[name] = Edited(name, patient)
    return list(found.values())


def _with_references(base: Patient, edited: Sequence[Edited], notes: list[str]) -> list[Edited]:
    """The checkpoints with the masks of their manifests, the same mask under the same name."""
    found: list[Edited] = []
    names: list[tuple[Mask, str]] = []
    located: Mask | None = None
    for one in edited:
        manifest = recorded(one.patient.checkpoint)
        mask = manifest.mask() if manifest is not None else None
        if mask is None:
            located = located or _located(base, notes)
            if located is None:
                found.append(one)
                continue
            notes.append(
                f"{one.name} has no {MANIFEST}; its reference is the mask that the defaults "
                f"locate, in layer {min(located.layers)}."
            )
            mask = located
        name = next((name for known, name in names if known == mask), None)
        if name is None:
            name = REFERENCE if not names else f"{REFERENCE} of {one.name}"
            names.append((mask, name))
        found.append(replace(one, reference=name, mask=mask))
    return found


def _located(patient: Patient, notes: list[str]) -> Mask | None:
    """The mask that the defaults choose."""
    emergence = find_emergence(patient)
    if emergence.layer is None:
        notes.append("The base has no Massive Emergence Layer, so there is no reference.")
        return None
    targets = attention_targets(emergence.layer, patient.anatomy.attends, "first")
    return choose_mask(patient, targets, Selection())


# --------------------------------------------------------------------------------------------
# What they are measured on
# --------------------------------------------------------------------------------------------


def _text_name(text: str | Path | None) -> str:
    if text is None:
        return "bundled held-out text"
    return str(text) if str(text).startswith(texts.HUB) else Path(text).name


def _windows(patient: Patient, text: str | Path | None, limit: int) -> list[list[int]]:
    if text is not None and str(text).startswith(texts.HUB):
        return patient.windows(texts.dataset_texts(str(text), limit), limit)
    return patient.held_out(limit, text=None if text is None else str(text))


def _versions(tasks: bool) -> dict[str, str]:
    """Versions that can influence a result, those of the extras among them."""
    found = versions()
    for package in ("lm_eval", "datasets", "scipy", "accelerate", "vllm") if tasks else ("scipy",):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
