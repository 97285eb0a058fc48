"""What an edit gained and lost: base, the paper's reference and edited checkpoints side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadCheckpoint, BadSettings, Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.files.digests import file_sha256
from surgery.files.generated import MANIFEST
from surgery.files.staging import write_whole
from surgery.files.text import write_text
from surgery.measure.task_loading import load_tasks
from surgery.measure.task_settings import TaskSettings, task_settings
from surgery.measure.tasks import run_tasks
from surgery.method.mask import Mask, Selection, target_layers
from surgery.models.anatomy import depth_of, text_config, width_of
from surgery.outputs.manifest import clean_numbers, read_manifest, tool_version, versions
from surgery.patient import texts
from surgery.patient.locating import choose_mask, find_emergence
from surgery.patient.patient import Loading, Patient
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from surgery.measure.task_scores import TaskRow
    from surgery.measure.text import TextMeasure

SCHEMA = 1
BASE, REFERENCE = "base", "reference"
# Sequences and tokens of each on which attention weights are looked at: they grow quadratically.
ATTENTION_SEQUENCES = 4
ATTENTION_TOKENS = 64

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """One model of a comparison.

    kind: "base", "reference" or "edited". weights: sha256 by weight file, for edited checkpoints
    and the base. reference: the name of the reference that belongs to an edited checkpoint.
    """

    name: str
    kind: str
    source: str
    weights: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything `compare` measured. text and tasks: empty where they were not asked for."""

    variants: tuple[Variant, ...]
    text: tuple[TextMeasure, ...]
    tasks: tuple[TaskRow, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the results file."""
        return {
            "schema_version": SCHEMA,
            "tool": f"wemask-surgery {tool_version()}",
            **clean_numbers(asdict(self)),
        }

    def measure(self, name: str) -> TextMeasure:
        """The text measures of a variant."""
        return next(found for found in self.text if found.name == name)

    def write(self, path: Path) -> None:
        """Write the results file, which `surgery card DIR --results FILE` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        if path.exists() and not path.is_file():  # /dev/null, say, must not be replaced
            write_text(path, f"{text}\n")
        else:
            write_whole(path.resolve(), f"{text}\n".encode())


@dataclass
class _Edited:
    """An edited checkpoint, and the mask of its manifest, or that which the defaults locate."""

    checkpoint: Checkpoint
    variant: Variant
    mask: Mask | None


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
        trust_remote_code: whether checkpoints' own Python code may run.
        reporter: whom to tell.

    The others are the fields of `TaskSettings`.

    Raises:
        SurgeryError: says what is wrong.
    """
    options = {name: value for name, value in locals().items() if name in _TASK_OPTIONS}
    if not edited:
        raise BadSettings("Give at least one edited checkpoint to compare with the base.")
    if check_tokens < 1:
        raise BadSettings("--check-tokens must be at least 1.")
    if not measure and not tasks:
        raise BadSettings("There is nothing to measure: give --tasks, or leave out --no-text.")
    chosen = task_settings(tasks, options)
    loading = Loading(revision, device or _rank_device(), dtype, trust_remote_code)
    patient = Patient(resolve(base, revision, reporter.say), loading, reporter, dequantise=False)
    notes: list[str] = []
    known = _has_anatomy(patient, notes)
    sources = [resolve(str(one), None, reporter.say) for one in edited]
    for source in sources:
        _require_same_shape(patient.checkpoint, source)
        _require_same_tokenizer(patient, source, notes)
    loaded = None
    if chosen is not None:
        # Before anything is measured: a misspelt task should not cost an hour.
        loaded = load_tasks(chosen, reporter)
        notes += loaded.notes
    reporter.say("Hashing weight files")
    others = _named(sources)
    references = _references(patient, others, notes) if reference and known else {}
    windows: list[list[int]] = []
    measures: tuple[TextMeasure, ...] = ()
    if measure and _main_process():
        windows = _windows(patient, text, check_tokens)
        measures = _measure_all(patient, others, references, windows, known)
    rows: tuple[TaskRow, ...] = ()
    recorded: dict[str, Any] = {}
    if loaded is not None:
        named = [(other.variant.name, other.checkpoint) for other in others]
        rows, recorded = run_tasks(loaded, patient, references, named, notes)
    settings = {
        "text": _text_name(text) if measure else None,
        "tokens": sum(len(window) for window in windows),
        "sequences": len(windows),
        "dtype": dtype,
        "device": str(patient.device),
        **({"tasks": recorded} if recorded else {}),
    }
    variants = _variants(patient.checkpoint, references, others)
    packages = _versions(loaded is not None)
    return Comparison(variants, measures, rows, settings, packages, tuple(notes))


# Names of TaskSettings' fields that `compare` spells out.
_TASK_OPTIONS = tuple(name for name in TaskSettings.__dataclass_fields__ if name != "tasks")


def _variants(
    checkpoint: Checkpoint, references: Mapping[str, Mask], others: Sequence[_Edited]
) -> tuple[Variant, ...]:
    origin = checkpoint.origin
    return (
        Variant(BASE, BASE, origin.name, _weights(checkpoint), origin.commit),
        *(Variant(name, REFERENCE, f"hooks on {origin.name}") for name in references),
        *(other.variant for other in others),
    )


def _rank_device() -> str | None:
    """Under `accelerate launch`, every process has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else None


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _has_anatomy(patient: Patient, notes: list[str]) -> bool:
    """Whether attention can be found in the base; otherwise only text and tasks are measured."""
    try:
        return patient.anatomy is not None
    except Unsupported as error:
        notes.append(f"There is no reference and no attention to measure: {error}")
        return False


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


def _require_same_tokenizer(patient: Patient, edited: Checkpoint, notes: list[str]) -> None:
    from surgery.models.loading import load_tokenizer  # imports transformers

    trust = patient.loading.trust_remote_code
    try:
        tokenizer = load_tokenizer(edited.folder, trust_remote_code=trust)
    except BadCheckpoint:
        notes.append(f"{edited.origin.name} has no tokenizer of its own; the base's is used.")
        return
    sample = [part.text[:2000] for part in texts.bundled("heldout")[:20]]
    if any(tokenizer(part)["input_ids"] != patient.tokenizer(part)["input_ids"] for part in sample):
        raise BadSettings(
            f"{edited.origin.typed} cannot be compared with the base: its tokenizer gives other "
            "tokens for the same text."
        )


def _named(sources: Sequence[Checkpoint]) -> list[_Edited]:
    found: list[_Edited] = []
    taken = {BASE, REFERENCE}
    for source in sources:
        name, number = source.origin.name, 2
        while name in taken:
            name, number = f"{source.origin.name} ({number})", number + 1
        taken.add(name)
        weights, commit = _weights(source), source.origin.commit
        mask = _recorded_mask(source)
        found.append(_Edited(source, Variant(name, "edited", name, weights, commit), mask))
    return found


def _weights(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: file_sha256(checkpoint.folder / name) for name in checkpoint.weight_files}


def _recorded_mask(checkpoint: Checkpoint) -> Mask | None:
    """The mask in a checkpoint's surgery.json; None where it has none."""
    if not (checkpoint.folder / MANIFEST).is_file():
        return None
    return read_manifest(checkpoint.folder).mask()


def _references(patient: Patient, others: Sequence[_Edited], notes: list[str]) -> dict[str, Mask]:
    """The different masks of the edited checkpoints, as references by name."""
    found: dict[str, Mask] = {}
    located: Mask | None = None
    for other in others:
        mask = other.mask
        if mask is None:
            if located is None:
                located = _located(patient, notes)
                if located is None:
                    continue
            notes.append(
                f"{other.variant.name} has no {MANIFEST}; its reference is the mask that the "
                f"defaults locate, in layer {min(located.layers)}."
            )
            mask = other.mask = located
        name = next((name for name, known in found.items() if known == mask), None)
        if name is None:
            name = REFERENCE if not found else f"{REFERENCE} of {other.variant.name}"
            found[name] = mask
        other.variant = replace(other.variant, reference=name)
    return found


def _located(patient: Patient, notes: list[str]) -> Mask | None:
    """The mask that the defaults choose."""
    emergence = find_emergence(patient)
    if emergence.layer is None:
        notes.append("The base has no Massive Emergence Layer, so there is no reference.")
        return None
    targets = target_layers(emergence.layer, patient.anatomy.depth, "first")
    return choose_mask(patient, targets, Selection())


def _text_name(text: str | Path | None) -> str:
    if text is None:
        return "bundled held-out text"
    return str(text) if str(text).startswith(texts.HUB) else Path(text).name


def _windows(patient: Patient, text: str | Path | None, limit: int) -> list[list[int]]:
    if text is not None and str(text).startswith(texts.HUB):
        return patient.windows(texts.dataset_texts(str(text), limit), limit)
    return patient.held_out(limit, text=None if text is None else str(text))


def _measure_all(
    patient: Patient,
    others: Sequence[_Edited],
    references: Mapping[str, Mask],
    windows: Sequence[Sequence[int]],
    known: bool,
) -> tuple[TextMeasure, ...]:
    """Each edited checkpoint beside the base and its reference, two models in memory at a time.

    known: whether the base's anatomy is, so that attention can be looked at.
    """
    from surgery.measure.attention import sink_attention
    from surgery.measure.quality import unmodified
    from surgery.measure.text import measure_text
    from surgery.models.loading import load_model, require_finite
    from surgery.models.masking import wemask

    found: dict[str, TextMeasure] = {}
    total = sum(len(window) for window in windows)
    short = [list(window[:ATTENTION_TOKENS]) for window in windows[:ATTENTION_SEQUENCES]]
    start = min((min(mask.layers) for mask in references.values()), default=0)
    for other in others:
        name, reference = other.variant.name, other.variant.reference
        model = load_model(
            other.checkpoint.folder,
            dtype=patient.loading.dtype,
            device=patient.device,
            trust_remote_code=patient.loading.trust_remote_code,
        )
        require_finite(model)
        models: list[tuple[str, Any, Context]] = [(BASE, patient.model, unmodified)]
        if reference is not None:
            mask, anatomy = references[reference], patient.anatomy
            hooks = partial(wemask, patient.model, mask, anatomy=anatomy)
            models.append((REFERENCE, patient.model, hooks))
        models.append((name, model, unmodified))
        with patient.reporter.bar(f"Measuring {name}", total) as advance:
            measured = measure_text(models, windows, progress=advance)
        for one, (_, which, context) in zip(measured, models, strict=True):
            label = reference if one.name == REFERENCE and reference else one.name
            if label in found:
                continue
            if known:
                attention = sink_attention(which, patient.anatomy, short, context)
                one = _with_attention(one, attention, start)
            found[label] = replace(one, name=label)
        del model, models
    order = [BASE, *references, *(other.variant.name for other in others)]
    return tuple(found[name] for name in order if name in found)


def _with_attention(
    measure: TextMeasure, attention: tuple[float | None, ...] | None, start: int
) -> TextMeasure:
    later = [share for share in (attention or ())[start:] if share is not None]
    return replace(
        measure,
        sink_attention=sum(later) / len(later) if later else None,
        sink_attention_by_layer=attention,
    )


def _versions(tasks: bool) -> dict[str, str]:
    found = versions()
    for package in ("lm_eval", "datasets", "scipy", "accelerate", "vllm") if tasks else ("scipy",):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
