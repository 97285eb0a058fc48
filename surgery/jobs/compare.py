"""What an edit gained and lost: base, the paper's reference and edited checkpoints side by side.

Text measures are taken here; tasks of lm-evaluation-harness are run by `surgery.tasks`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.files.digests import file_sha256
from surgery.files.generated import MANIFEST
from surgery.files.staging import write_whole
from surgery.measure.tasks import load_tasks, run_tasks, task_settings
from surgery.method.mask import Mask, target_layers
from surgery.models.anatomy import Anatomy, depth_of, text_config, width_of
from surgery.outputs.manifest import clean_numbers, read_manifest, tool_version, versions
from surgery.patient.locating import choose_mask, find_emergence
from surgery.patient.patient import examine
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

if TYPE_CHECKING:
    from surgery.measure.tasks import TaskRow

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
class LossDifference:
    """Mean loss of a variant minus base, in nats per token, with its 95 % confidence interval.

    The interval is over sequences (`statistics.ratio`); None without scipy.
    """

    difference: float
    standard_error: float | None
    low: float | None
    high: float | None
    verdict: str | None


@dataclass(frozen=True)
class TextMeasure:
    """One model on the text.

    perplexity over all predicted tokens; against_base: its ratio to base, minus 1. kl_from_base,
    kl_from_reference: mean KL(base ‖ ·) and KL(reference ‖ ·) in nats per position, None where
    there is no such model. agreement: share of positions with base's greedy next token.
    loss_by_position, kl_by_position: mean loss (nats) and KL(base ‖ ·) by position in the window,
    the first token being 0. sink_attention: mean attention probability that later tokens give the
    first one, over heads and the layers from the first masked one on; sink_attention_by_layer: the
    same for every layer; None where the model gives no attention weights.
    """

    name: str
    perplexity: float
    against_base: float
    kl_from_base: float | None
    kl_from_reference: float | None
    agreement: float
    loss_by_position: tuple[float, ...]
    kl_by_position: tuple[float, ...]
    loss: LossDifference | None = None
    sink_attention: float | None = None
    sink_attention_by_layer: tuple[float | None, ...] | None = None


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
            path.write_text(f"{text}\n", encoding="utf-8")
        else:
            write_whole(path.resolve(), f"{text}\n".encode())


# --------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------


class _Totals:
    """Sums of one variant over the batches."""

    def __init__(self, longest: int) -> None:
        self.loss = np.zeros(longest)
        self.from_base = np.zeros(longest)
        self.from_reference = 0.0
        self.agreeing = 0
        self.by_sequence: list[tuple[float, int]] = []


def measure_text(
    models: Sequence[tuple[str, Any, Context]],
    sequences: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> tuple[TextMeasure, ...]:
    """Perplexity, KL, greedy agreement and curves by position of several models on one text.

    models: name, model and a context manager to run it under; the first is the base, and the one
    named "reference", if any, is what KL(reference ‖ ·) refers to and must come before the others.
    """
    import torch

    from surgery.measure.quality import batches
    from surgery.models.observe import pad

    longest = max(len(sequence) for sequence in sequences)
    totals = {name: _Totals(longest) for name, _, _ in models}
    predictions, positions = np.zeros(longest), np.zeros(longest)
    vocabulary = models[0][1].config.get_text_config().vocab_size
    for batch in batches(sequences, vocabulary):
        ids, mask = pad(batch)
        width = ids.shape[1]
        positions[:width] += mask.sum(0).numpy()
        predictions[: width - 1] += mask[:, 1:].sum(0).numpy()
        base = reference = None
        for name, model, context in models:
            with torch.inference_mode():
                with context():
                    device = next(model.parameters()).device
                    logits = model(
                        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                    ).logits
                if logits.shape[-1] != vocabulary and base is not None:
                    logits = logits[..., : base.shape[-1]]
                logs = logits.float().log_softmax(-1)
                del logits
                if base is None:
                    base = logs
                elif name == REFERENCE:
                    reference = logs
                _add(totals[name], logs, ids, mask, base, reference)
        progress(int(mask.sum()))
    return _measures(totals, predictions, positions)


def _add(totals: _Totals, logs: Any, ids: Any, mask: Any, base: Any, reference: Any) -> None:
    device, width = logs.device, ids.shape[1]
    real = mask.bool().to(device)
    targets = ids[:, 1:].to(device)
    losses = -logs[:, :-1].gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()
    losses = losses.masked_fill(~real[:, 1:], 0.0)
    totals.loss[: width - 1] += losses.sum(0).cpu().numpy()
    counts = real[:, 1:].sum(1)
    totals.by_sequence += zip(losses.sum(1).tolist(), counts.tolist(), strict=True)
    same = logs.argmax(-1) == base.to(device).argmax(-1)
    totals.agreeing += int((same & real).sum())
    if base is not logs:
        totals.from_base[:width] += _divergence(base.to(device), logs, real)
    if reference is not None and reference is not logs:
        totals.from_reference += float(_divergence(reference.to(device), logs, real).sum())


def _divergence(known: Any, logs: Any, real: Any) -> NDArray[np.float64]:
    """KL(known ‖ logs) summed over the sequences, by position."""
    total = np.zeros(logs.shape[1])
    # One sequence at a time: whole batches would need three times their memory here.
    for p, q, present in zip(known, logs, real, strict=True):
        total += (p.exp() * (p - q)).sum(-1).double().masked_fill(~present, 0.0).cpu().numpy()
    return total


def _measures(
    totals: dict[str, _Totals],
    predictions: NDArray[np.float64],
    positions: NDArray[np.float64],
) -> tuple[TextMeasure, ...]:
    names = list(totals)
    base = totals[names[0]]
    predicted, seen = predictions.sum(), positions.sum()
    with_targets = predictions > 0
    base_loss = float(base.loss.sum() / predicted)
    found = []
    for name, one in totals.items():
        loss = float(one.loss.sum() / predicted)
        referred = REFERENCE in names and names.index(name) >= names.index(REFERENCE)
        found.append(
            TextMeasure(
                name=name,
                perplexity=_exp(loss),
                against_base=_exp(loss - base_loss) - 1.0,
                kl_from_base=float(one.from_base.sum() / seen),
                kl_from_reference=one.from_reference / seen if referred else None,
                agreement=one.agreeing / float(seen),
                loss_by_position=tuple((one.loss / np.maximum(predictions, 1))[with_targets]),
                kl_by_position=tuple(one.from_base / np.maximum(positions, 1)),
                loss=None if one is base else _loss_difference(base, one),
            )
        )
    return tuple(found)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _loss_difference(base: _Totals, one: _Totals) -> LossDifference:
    before = [loss for loss, _ in base.by_sequence]
    after = [loss for loss, _ in one.by_sequence]
    sizes = [count for _, count in base.by_sequence]
    if find_spec("scipy") is None:
        mean = (sum(after) - sum(before)) / sum(sizes)
        return LossDifference(mean, None, None, None, None)
    from surgery.measure.statistics import ratio, verdict

    mean, error, low, high = ratio(before, after, sizes)
    return LossDifference(mean, error, low, high, verdict(low, high, higher_is_better=False))


def sink_attention(
    model: Any, anatomy: Anatomy, sequences: Sequence[Sequence[int]], context: Context
) -> tuple[float | None, ...] | None:
    """Mean attention probability that later tokens give the first one, by layer.

    Over heads, query tokens and sequences; None for a layer without attention weights, and None
    altogether where the model cannot attend eagerly. Source: §6 and Fig. 7 of the paper.
    """
    import torch

    from surgery.measure.probe import eager_attention
    from surgery.models.observe import backbone, hooked

    sums: dict[int, list[float]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: Any) -> None:
            weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                sums.setdefault(layer, []).append(float(weights[0, :, 1:, 0].double().mean()))

        return hook

    device = next(model.parameters()).device
    try:
        with eager_attention(model), context(), torch.inference_mode():
            handles = [
                model.get_submodule(known.attention).register_forward_hook(keep(known.layer))
                for known in anatomy.inputs
                if known is not None
            ]
            with hooked(handles):
                for sequence in sequences:
                    tokens = torch.tensor([list(sequence)], device=device)
                    backbone(model, anatomy)(input_ids=tokens, use_cache=False)
    except (SurgeryError, ValueError, ImportError, AttributeError):
        return None  # remote code need not offer eager attention
    if not sums:
        return None
    means = {layer: sum(found) / len(found) for layer, found in sums.items()}
    return tuple(means.get(layer) for layer in range(anatomy.depth))


# --------------------------------------------------------------------------------------------
# The whole comparison
# --------------------------------------------------------------------------------------------


@dataclass
class _Edited:
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
    reference: bool = True,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
    **task_options: Any,
) -> Comparison:
    """Measure what edits gained and lost against their base, on text and on tasks.

    base, edited: checkpoints in any form `resolve` takes; the edited ones need not be ours, only
    of the same architecture and tokenizer. text: a file, or hub:NAME for a data set
    (`texts.dataset_texts`), in place of the bundled held-out text; measure: whether to measure on
    text at all. tasks: lm-eval task names, groups or YAML files; task_options: the fields of
    `tasks.TaskSettings`. reference: also run the paper's hooks on the base, with the mask of each
    edited checkpoint's manifest, or located anew where there is none.
    Raises a SurgeryError that says what is wrong.
    """
    if not edited:
        raise BadSettings("Give at least one edited checkpoint to compare with the base.")
    if check_tokens < 1:
        raise BadSettings("--check-tokens must be at least 1.")
    if not measure and not tasks:
        raise BadSettings("There is nothing to measure: give --tasks, or leave out --no-text.")
    chosen = task_settings(tasks, task_options)
    device = device or _rank_device()
    settings = Settings(
        model=base, revision=revision, device=device, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    checkpoint = resolve(base, revision, reporter.say)
    subject = Subject(checkpoint, settings, reporter)
    notes: list[str] = []
    anatomy = _anatomy(checkpoint, trust_remote_code, notes)
    sources = [resolve(str(one), None, reporter.say) for one in edited]
    for source in sources:
        _require_same_shape(checkpoint, source)
        _require_same_tokenizer(subject, source, trust_remote_code, notes)
    loaded = None
    if chosen is not None:
        # Before anything is measured: a misspelt task should not cost an hour.
        loaded = load_tasks(chosen, reporter)
        notes += loaded.notes
    reporter.say("Hashing weight files")
    others = _named(sources)
    references = _references(subject, anatomy, others, reference, settings, reporter, notes)
    base_variant = Variant(
        BASE, BASE, checkpoint.origin.name, _weights(checkpoint), checkpoint.origin.commit
    )
    measures: tuple[TextMeasure, ...] = ()
    windows: list[list[int]] = []
    if measure and _main_process():
        windows = _windows(subject, text, check_tokens)
        measures = _measure_all(subject, anatomy, others, references, windows, settings, reporter)
    rows: tuple[TaskRow, ...] = ()
    recorded: dict[str, Any] = {}
    if loaded is not None:
        rows, recorded = run_tasks(
            loaded, subject, anatomy, references,
            [(other.variant.name, other.checkpoint) for other in others],
            settings, reporter, notes,
        )  # fmt: skip
    variants = (
        base_variant,
        *(Variant(name, REFERENCE, f"hooks on {checkpoint.origin.name}") for name in references),
        *(other.variant for other in others),
    )
    return Comparison(
        variants,
        measures,
        rows,
        {
            "text": _text_name(text) if measure else None,
            "tokens": sum(len(window) for window in windows),
            "sequences": len(windows),
            "dtype": dtype,
            "device": str(subject.device),
            **({"tasks": recorded} if recorded else {}),
        },
        _versions(loaded is not None),
        tuple(notes),
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


def _anatomy(checkpoint: Checkpoint, trust_remote_code: bool, notes: list[str]) -> Anatomy | None:
    try:
        return examine(checkpoint, trust_remote_code=trust_remote_code)
    except Unsupported as error:
        notes.append(f"There is no reference and no attention to measure: {error}")
        return None


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


def _require_same_tokenizer(
    subject: Subject, edited: Checkpoint, trust_remote_code: bool, notes: list[str]
) -> None:
    from surgery.models.loading import load_tokenizer
    from surgery.patient import texts

    try:
        tokenizer = load_tokenizer(edited.folder, trust_remote_code=trust_remote_code)
    except BadCheckpoint:
        notes.append(f"{edited.origin.name} has no tokenizer of its own; the base's is used.")
        return
    sample = [part.text[:2000] for part in texts.bundled("heldout")[:20]]
    if any(tokenizer(part)["input_ids"] != subject.tokenizer(part)["input_ids"] for part in sample):
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
    manifest = read_manifest(checkpoint.folder)
    return Mask(
        manifest.hidden_size,
        str(manifest.settings["select"]),
        manifest.strength,
        {layer: tuple(chosen) for layer, chosen in manifest.dimensions.items()},
    )


def _references(
    subject: Subject,
    anatomy: Anatomy | None,
    others: list[_Edited],
    wanted: bool,
    settings: Settings,
    reporter: Reporter,
    notes: list[str],
) -> dict[str, Mask]:
    """The different masks of the edited checkpoints, as references by name."""
    found: dict[str, Mask] = {}
    if not wanted or anatomy is None:
        return found
    located: Mask | None = None
    for other in others:
        mask = other.mask
        if mask is None:
            if located is None:
                located = _located(subject, anatomy, settings, reporter, notes)
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


def _located(
    subject: Subject,
    anatomy: Anatomy,
    settings: Settings,
    reporter: Reporter,
    notes: list[str],
) -> Mask | None:
    emergence = find_emergence(subject, anatomy, settings, reporter)
    if emergence.layer is None:
        notes.append("The base has no Massive Emergence Layer, so there is no reference.")
        return None
    targets = target_layers(emergence.layer, anatomy.depth, "first")
    return choose_mask(subject, anatomy, targets, settings)


def _text_name(text: str | Path | None) -> str:
    from surgery.patient import texts

    if text is None:
        return "bundled held-out text"
    return str(text) if str(text).startswith(texts.HUB) else Path(text).name


def _windows(subject: Subject, text: str | Path | None, limit: int) -> list[list[int]]:
    from surgery.models.loading import longest_context
    from surgery.patient import texts

    if text is None:
        chosen = texts.bundled("heldout")
    elif str(text).startswith(texts.HUB):
        chosen = texts.dataset_texts(str(text), limit)
    else:
        chosen = texts.read_texts(Path(text))
    longest = longest_context(subject.config.get_text_config(), texts.WINDOW)
    return texts.windows(subject.tokenizer, chosen, longest, limit)


def _measure_all(
    subject: Subject,
    anatomy: Anatomy | None,
    others: Sequence[_Edited],
    references: dict[str, Mask],
    windows: Sequence[Sequence[int]],
    settings: Settings,
    reporter: Reporter,
) -> tuple[TextMeasure, ...]:
    """Each edited checkpoint beside the base and its reference, two models in memory at a time."""
    from surgery.measure.quality import unmodified
    from surgery.models.loading import load_model, require_finite
    from surgery.models.reference import masked

    found: dict[str, TextMeasure] = {}
    total = sum(len(window) for window in windows)
    short = [list(window[:ATTENTION_TOKENS]) for window in windows[:ATTENTION_SEQUENCES]]
    for other in others:
        name, reference = other.variant.name, other.variant.reference
        model = load_model(
            other.checkpoint.folder,
            dtype=settings.dtype,
            device=subject.device,
            trust_remote_code=settings.trust_remote_code,
        )
        require_finite(model)
        models: list[tuple[str, Any, Context]] = [(BASE, subject.model, unmodified)]
        if reference is not None and anatomy is not None:
            mask = references[reference]

            def hooks(mask: Mask = mask) -> AbstractContextManager[Any]:
                assert anatomy is not None
                return masked(subject.model, anatomy, mask)

            models.append((REFERENCE, subject.model, hooks))
        models.append((name, model, unmodified))
        with reporter.bar(f"Measuring {name}", total) as advance:
            measured = measure_text(models, windows, progress=advance)
        for one, (_, which, context) in zip(measured, models, strict=True):
            label = reference if one.name == REFERENCE and reference else one.name
            if label in found:
                continue
            if anatomy is not None:
                attention = sink_attention(which, anatomy, short, context)
                start = min(min(mask.layers) for mask in references.values()) if references else 0
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
