"""The main job, from a name to a verified checkpoint: each step is one function of the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.anatomy import (
    FOLDS,
    Anatomy,
    depth_of,
    describe,
    effective_gain,
    is_multimodal,
    width_of,
)
from surgery.card import front_matter, render_card
from surgery.checkpoint import Checkpoint, Origin
from surgery.errors import BadSettings, QualityGate, SurgeryError
from surgery.fold import Edit, SinkDirection, make_edits
from surgery.loading import DTYPES
from surgery.locate import Emergence
from surgery.manifest import (
    FileRecord,
    Manifest,
    clean_numbers,
    records,
    sink_records,
    tool_version,
    versions,
    write_manifest,
)
from surgery.mask import (
    SCOPES,
    SELECTIONS,
    Mask,
    attention_targets,
    check_rate,
    check_strength,
    largest,
    mask_size,
    random_dimensions,
)
from surgery.memory import return_freed_memory
from surgery.plan import CARD, FIGURE, Plan, check_output, make_plan
from surgery.source import resolve, resolve_light
from surgery.verification import (
    Check,
    Verification,
    verify_behaviour,
    verify_edits,
    verify_structure,
    verify_untouched,
)
from surgery.write import copy_plan, staging

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from surgery.calibrate import Leak
    from surgery.probe import Evidence, Prompt
    from surgery.quality import Quality
    from surgery.stream import Streamed

# Checkpoints above this size are analysed layer by layer instead of being loaded whole.
STREAM_ABOVE = 8_000_000_000
# Tokens on which base, hooks and written checkpoint are compared logit by logit.
VERIFY_TOKENS = 192


@dataclass(frozen=True)
class Settings:
    """The arguments of a conversion; see `surgery convert --help` for their meaning."""

    model: str
    rate: float = 0.1
    scope: str = "first"
    fold: str = "norm"
    select: str = "weight"
    strength: float = 1.0
    layer: int | None = None
    layers: tuple[int, ...] | None = None
    revision: str | None = None
    seed: int = 0
    calibration: str | None = None
    calibration_tokens: int = 4096
    check: bool = True
    check_tokens: int = 4096
    max_degradation: float = 0.1
    force: bool = False
    device: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        """Raise BadSettings for values that make no sense whatever the model is."""
        for name, value, allowed in (
            ("scope", self.scope, SCOPES),
            ("fold", self.fold, FOLDS),
            ("select", self.select, SELECTIONS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in allowed:
                raise BadSettings(f"--{name} must be one of {', '.join(allowed)}; not {value!r}.")
        check_strength(self.strength)
        check_rate(self.rate)
        if self.seed < 0:
            raise BadSettings("--seed must not be negative.")
        if self.layer is not None and self.layers is not None:
            raise BadSettings("Give either --layer (the ME Layer) or --layers (targets), not both.")
        if self.check_tokens < 1 or self.calibration_tokens < 1:
            raise BadSettings("--check-tokens and --calibration-tokens must be at least 1.")
        if not 0 <= self.max_degradation < float("inf"):
            raise BadSettings(
                "--max-degradation must be a finite number and not negative; to write a checkpoint "
                "however bad it is, give --force."
            )


class Reporter:
    """Where a conversion says what it does; this one is silent."""

    def say(self, message: str) -> None:
        """A step has begun."""

    def show(self, result: Any) -> None:
        """An Emergence, Plan, Quality or Verification is known."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar of `total` units; the block calls what it gets with units done."""
        yield lambda _done: None


SILENT = Reporter()


@dataclass(frozen=True)
class Analysis:
    """What `analyze` finds.

    evidence: None unless it was asked for. streamed: how much was read, when the model was run
    layer by layer.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    emergence: Emergence
    evidence: Evidence | None = None
    streamed: Streamed | None = None

    def targets(self, scope: str) -> tuple[int, ...]:
        """Target layers for a scope; empty without an emergence layer."""
        if self.emergence.layer is None:
            return ()
        return attention_targets(self.emergence.layer, self.anatomy.attends, scope)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: every object of the pipeline. manifest: None after a dry run."""

    output: Path
    plan: Plan
    mask: Mask
    emergence: Emergence | None
    quality: Quality | None
    verification: Verification | None
    manifest: Manifest | None


class Subject:
    """A checkpoint with its model and tokenizer, loaded when first needed."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, reporter: Reporter) -> None:
        self.checkpoint, self._settings, self._reporter = checkpoint, settings, reporter
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def device(self) -> Any:
        from surgery.loading import pick_device

        return pick_device(self._settings.device)

    @property
    def model(self) -> Any:
        if self._model is None:
            from surgery.loading import load_model, require_finite

            self._reporter.say(f"Loading {self.checkpoint.origin.name} ({self._settings.dtype})")
            self._model = load_model(
                self.checkpoint.folder,
                dtype=self._settings.dtype,
                device=self.device,
                trust_remote_code=self._settings.trust_remote_code,
            )
            require_finite(self._model)
        return self._model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from surgery.loading import load_tokenizer

            self._tokenizer = load_tokenizer(
                self.checkpoint.folder, trust_remote_code=self._settings.trust_remote_code
            )
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The configuration, without loading the model."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self.checkpoint.folder,
            trust_remote_code=self._settings.trust_remote_code,
            local_files_only=True,
        )

    def release(self) -> None:
        """Forget the model, to make room."""
        self._model = None


def study(
    checkpoint: Checkpoint, *, check: bool = True, trust_remote_code: bool = False
) -> Anatomy:
    """The anatomy of a checkpoint: from the table, confirmed by a trace unless `check` is off.

    Multimodal checkpoints are always traced: the table does not say where their decoder lies.
    Raises Unsupported where no truthful edit is possible or table and trace disagree.
    """
    described, multimodal = describe(checkpoint), is_multimodal(checkpoint.config)
    if described is not None and not check and not multimodal:
        return described
    from surgery.anatomy import refuse_quantised
    from surgery.loading import refuse_remote_code
    from surgery.trace import confirm, trace

    refuse_quantised(checkpoint)
    refuse_remote_code(checkpoint.folder, trust_remote_code)
    traced = trace(checkpoint, trust_remote_code=trust_remote_code)
    return confirm(described, traced, multimodal=multimodal)


def stream_model(
    subject: Subject,
    anatomy: Anatomy,
    settings: Settings,
    reporter: Reporter,
    *,
    all_layers: bool = False,
) -> Streamed:
    """Locate the ME Layer without loading the model whole."""
    from surgery.stream import stream_emergence

    checkpoint = subject.checkpoint
    prompts = [prompt.tokens for prompt in locating_prompts(subject, settings)]
    with reporter.bar("Streaming layers", anatomy.depth) as advance:
        return stream_emergence(
            checkpoint,
            anatomy,
            prompts,
            dtype=settings.dtype,
            device=subject.device,
            all_layers=all_layers,
            trust_remote_code=settings.trust_remote_code,
            progress=advance,
        )


def find_emergence(
    subject: Subject, anatomy: Anatomy, settings: Settings, reporter: Reporter
) -> Emergence:
    """Locate the ME Layer on the bundled prompts, or on the user's calibration text."""
    from surgery.locate import agree
    from surgery.observe import layer_norms

    prompts = [prompt.tokens for prompt in locating_prompts(subject, settings)]
    with reporter.bar("Locating the ME Layer", len(prompts)) as advance:
        return agree(layer_norms(subject.model, anatomy, prompts, advance))


def locating_prompts(subject: Subject, settings: Settings) -> list[Prompt]:
    """The prompts the ME Layer is located with; BadSettings when the text is too short."""
    from surgery import texts
    from surgery.loading import longest_context
    from surgery.probe import Prompt

    chosen = _calibration_texts(settings)[: texts.LOCATING_PROMPTS]
    longest = longest_context(subject.config.get_text_config(), texts.LONGEST_PROMPT)
    tokens = texts.encode(subject.tokenizer, chosen, longest)
    prompts = [
        Prompt(text.kind, text.text, tuple(ids))
        for text, ids in zip(chosen, tokens, strict=True)
        if len(ids) >= texts.SHORTEST
    ]
    if not prompts:
        raise BadSettings("The calibration text is too short to locate an ME Layer on.")
    return prompts


def find_evidence(
    subject: Subject,
    anatomy: Anatomy,
    emergence: Emergence,
    settings: Settings,
    reporter: Reporter,
) -> Evidence:
    """What the paper measures to explain an ME Layer; see `surgery.probe`."""
    from surgery.probe import gather, steps

    prompts = locating_prompts(subject, settings)
    mask = None
    if emergence.layer is not None:
        targets = attention_targets(emergence.layer, anatomy.attends, "first")
        mask = choose_mask(subject, anatomy, targets, settings)
    with reporter.bar("Gathering evidence", steps(emergence, prompts)) as advance:
        return gather(
            subject.model,
            anatomy,
            emergence,
            prompts,
            mask,
            share=settings.rate,
            progress=advance,
        )


def _calibration_texts(settings: Settings) -> list[Any]:
    from surgery import texts

    if settings.calibration is None:
        return texts.bundled("calibration")
    return texts.read_texts(Path(settings.calibration))


def calibration_windows(subject: Subject, settings: Settings) -> list[list[int]]:
    """Sequences of calibration text, at most about `settings.calibration_tokens`."""
    from surgery import texts

    chosen = _calibration_texts(settings)
    if settings.calibration is None:
        # Short texts of every kind before the few long ones: the budget buys more variety.
        chosen = sorted(chosen, key=lambda text: len(text.text) > 4000)
    limit = settings.calibration_tokens
    return texts.windows(subject.tokenizer, chosen, _longest(subject, texts.WINDOW), limit)


def heldout_windows(
    subject: Subject, limit: int, length: int | None = None, text: str | None = None
) -> list[list[int]]:
    """Sequences of held-out text for measuring, at most about `limit` tokens.

    text: a file to measure on in place of the bundled text.
    """
    from surgery import texts

    longest = _longest(subject, length or texts.WINDOW)
    chosen = texts.bundled("heldout") if text is None else texts.read_texts(Path(text))
    return texts.windows(subject.tokenizer, chosen, longest, limit)


def _longest(subject: Subject, wanted: int) -> int:
    from surgery.loading import longest_context

    return longest_context(subject.config.get_text_config(), wanted)


def analyze(
    model: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    calibration: str | None = None,
    trust_remote_code: bool = False,
    evidence: bool = False,
    rate: float = 0.1,
    stream: bool | None = None,
    all_layers: bool = False,
    reporter: Reporter = SILENT,
) -> Analysis:
    """Locate the ME Layer of a model (paper §3, Appendices D and H).

    model: a folder, a Hub id, a .gguf file or "demo". evidence: also gather all that the paper
    measures, which needs the whole model; rate is then the share of dimensions in eq. 1 and in the
    mask. stream: run layer by layer from the checkpoint's bytes and stop once the emergence has
    lasted (all_layers: go on to the end); by default for models on the Hub that are not in the
    cache, and for large ones. The result's `emergence.layer` is None for a model without one.
    Raises BadCheckpoint, BadSettings or Unsupported.
    """
    settings = Settings(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        calibration=calibration,
        trust_remote_code=trust_remote_code,
        rate=rate,
    )
    if evidence and stream:
        raise BadSettings("Evidence needs the whole model; leave out the streaming.")
    whole = evidence or stream is False
    if not whole:
        return_freed_memory()
    checkpoint = (resolve if whole else resolve_light)(model, revision, reporter.say)
    anatomy = study(checkpoint, trust_remote_code=trust_remote_code)
    subject = Subject(checkpoint, settings, reporter)
    if stream or (
        not whole
        and (all_layers or checkpoint.remote is not None or checkpoint.size > STREAM_ABOVE)
    ):
        streamed = stream_model(subject, anatomy, settings, reporter, all_layers=all_layers)
        return Analysis(checkpoint, anatomy, streamed.emergence, streamed=streamed)
    emergence = find_emergence(subject, anatomy, settings, reporter)
    found = find_evidence(subject, anatomy, emergence, settings, reporter) if evidence else None
    return Analysis(checkpoint, anatomy, emergence, found)


def given_emergence(layer: int) -> Emergence:
    """An ME Layer that the user names."""
    return Emergence(layer, 0.0, 0.0, 1.0, "given", (), (), found_by="given")


def choose_mask(
    subject: Subject,
    anatomy: Anatomy,
    targets: Sequence[int],
    settings: Settings,
    magnitudes: Mapping[int, NDArray[np.float64]] | None = None,
) -> Mask:
    """S for every target layer, by weight, activation or chance.

    magnitudes: what `sink_magnitudes` found on the calibration text, when that is known.
    """
    size = mask_size(settings.rate, anatomy.hidden_size)
    if settings.select == "random":
        chosen = {
            layer: random_dimensions(anatomy.hidden_size, size, settings.seed, layer)
            for layer in targets
        }
    elif settings.select == "weight":
        chosen = {
            layer: largest(effective_gain(anatomy, subject.checkpoint, layer), size)
            for layer in targets
        }
    else:
        if magnitudes is None:
            from surgery.observe import sink_magnitudes

            sequences = calibration_windows(subject, settings)
            magnitudes = sink_magnitudes(subject.model, anatomy, targets, sequences)
        chosen = {layer: largest(magnitudes[layer], size) for layer in targets}
    return Mask(anatomy.hidden_size, settings.select, settings.strength, chosen)


def calibrate_sinks(
    subject: Subject, anatomy: Anatomy, mask: Mask, settings: Settings, reporter: Reporter
) -> tuple[dict[int, SinkDirection], dict[int, Leak]]:
    """The sink direction of every target layer, in order."""
    from surgery.calibrate import sink_directions

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
    from surgery.calibrate import LeakWatcher
    from surgery.editing import EditedWeights
    from surgery.quality import measure, unmodified
    from surgery.reference import masked

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
    check_output(checkpoint.folder, target, overwrite=overwrite)
    mask_size(settings.rate, width_of(checkpoint.config))
    _check_given_layers(settings, depth_of(checkpoint.config))
    anatomy = study(checkpoint, check=settings.check, trust_remote_code=settings.trust_remote_code)
    anatomy.require(settings.fold)
    subject = Subject(checkpoint, settings, reporter)
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
    plan = make_plan(checkpoint, edits, target, overwrite=overwrite)
    reporter.show(plan)
    if dry_run:
        return Conversion(plan.output, plan, mask, emergence, None, None, None)
    quality, quality_record = None, None
    if settings.check:
        quality, leaks = measure_quality(subject, anatomy, mask, edits, settings, reporter, sinks)
        reporter.show(quality)
        forced = _gate(subject, anatomy, mask, quality, settings, reporter)
        quality_record = {**quality.as_dict(), "forced": forced, "leak_text": "held-out text"}
    manifest = Manifest(
        tool=f"wemask-surgery {tool_version()}",
        base=checkpoint.origin,
        model_type=anatomy.model_type,
        hidden_size=anatomy.hidden_size,
        depth=anatomy.depth,
        anatomy=anatomy.known_from,
        settings=_recorded(settings),
        strength=mask.strength,
        dimensions={layer: list(mask.dimensions[layer]) for layer in mask.layers},
        edits=records(checkpoint, edits),
        sinks=sink_records(sinks, leaks) if sinks else {},
        files=[],
        versions=versions(),
        left_out=list(checkpoint.left_out),
        emergence=clean_numbers(emergence.as_dict()) if emergence else None,
        quality=clean_numbers(quality_record),
    )
    verification, manifest = _write(
        plan, manifest, subject, anatomy, mask, emergence, settings, reporter
    )
    return Conversion(plan.output, plan, mask, emergence, quality, verification, manifest)


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
    return Path(f"{name}-wemask-{'-'.join(parts)}")


def _recorded(settings: Settings) -> dict[str, Any]:
    """Settings as the manifest keeps them: paths of this machine say nothing elsewhere."""
    kept = asdict(settings)
    kept["layers"] = list(settings.layers) if settings.layers is not None else None
    kept.pop("device")
    return kept


def _check_given_layers(settings: Settings, depth: int) -> None:
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
    from surgery.quality import require_quality

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
    with staging(plan.output, checkpoint.folder, overwrite=plan.overwrite) as folder:
        with reporter.bar("Writing", plan.bytes_written) as advance:
            written = copy_plan(plan, folder, advance)
        figure = emergence is not None and bool(emergence.rows)
        if figure and emergence is not None:
            from surgery.figures import plot_layers

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
        files += [_hashed(folder, name) for name in ((CARD, FIGURE) if figure else (CARD,))]
        manifest = replace(manifest, files=files)
        write_manifest(manifest, folder)
        reporter.show(verification)
    return verification, manifest


def _hashed(folder: Path, name: str) -> FileRecord:
    raw = (folder / name).read_bytes()
    return FileRecord(name, len(raw), hashlib.sha256(raw).hexdigest())


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

    from surgery.observe import pad
    from surgery.reference import masked

    device = subject.device
    # Several sequences, so that padding takes part.
    ids, real = pad(heldout_windows(subject, VERIFY_TOKENS, VERIFY_TOKENS // 2))
    model = subject.model

    def run() -> Any:
        with torch.inference_mode():
            return model(
                input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False
            ).logits[real.bool().to(device)]

    base_logits = run()
    with masked(model, anatomy, mask, "first" if settings.fold == "sink" else "all"):
        reference_logits = run()
    model = None
    subject.release()
    # Halving a gain is exact in any binary format, scaling by other factors is rounded.
    exact = mask.strength in (0.0, 1.0)
    return verify_behaviour(
        base_logits,
        reference_logits,
        folder,
        ids,
        real.bool(),
        fold=settings.fold,
        exact=exact,
        inexact_because="scaled weights are rounded to the stored format",
        dtype=settings.dtype,
        device=device,
        trust_remote_code=settings.trust_remote_code,
    )
