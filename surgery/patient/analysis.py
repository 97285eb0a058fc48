"""What is to be found in a model before anything is changed: anatomy, ME Layer, dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.files.checkpoint import Checkpoint
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, attention_targets, largest, mask_size, random_dimensions
from surgery.models.anatomy import Anatomy, describe, effective_gain, is_multimodal
from surgery.models.memory import return_freed_memory
from surgery.patient.quantised import dequantised
from surgery.patient.source import resolve, resolve_light
from surgery.patient.subject import Subject, calibration_windows, locating_prompts
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from surgery.measure.probe import Evidence
    from surgery.models.stream import Streamed

# Checkpoints above this size are analysed layer by layer instead of being loaded whole.
STREAM_ABOVE = 8_000_000_000


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
    measures, which takes dozens of passes through all layers and downloads a model unless `stream`
    is given; rate is then the share of dimensions in eq. 1 and in the mask. stream: run layer by
    layer from the checkpoint's bytes and stop once the emergence has lasted (all_layers: go on to
    the end); by default for models on the Hub that are not in the cache, and for large ones. The
    result's `emergence.layer` is None for a model without one.
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
    whole = stream is False or (evidence and not stream)
    if not whole:
        return_freed_memory()
    checkpoint = (resolve if whole else resolve_light)(model, revision, reporter.say)
    checkpoint = dequantised(checkpoint, reporter.say)
    anatomy = examine(checkpoint, trust_remote_code=trust_remote_code)
    subject = Subject(checkpoint, settings, reporter)
    large = stream is None and checkpoint.size > STREAM_ABOVE
    if stream or large or (not whole and (all_layers or checkpoint.remote is not None)):
        every = all_layers or evidence
        streamed = stream_model(subject, anatomy, settings, reporter, all_layers=every)
        if not evidence:
            return Analysis(checkpoint, anatomy, streamed.emergence, streamed=streamed)
        gathered, read = _lent_evidence(subject, anatomy, streamed.emergence, settings, reporter)
        streamed = replace(streamed, bytes_read=streamed.bytes_read + read)
        return Analysis(checkpoint, anatomy, streamed.emergence, gathered, streamed)
    emergence = find_emergence(subject, anatomy, settings, reporter)
    found = None
    if evidence:
        found = find_evidence(subject, subject.model, anatomy, emergence, settings, reporter)
    return Analysis(checkpoint, anatomy, emergence, found)


def examine(
    checkpoint: Checkpoint, *, check: bool = True, trust_remote_code: bool = False
) -> Anatomy:
    """The anatomy of a checkpoint: from the table, confirmed by a trace unless `check` is off.

    Multimodal checkpoints are always traced: the table does not say where their decoder lies.
    Raises Unsupported where no truthful edit is possible or table and trace disagree.
    """
    described, multimodal = describe(checkpoint), is_multimodal(checkpoint.config)
    if described is not None and not check and not multimodal:
        return described
    from surgery.models.anatomy import refuse_quantised
    from surgery.models.loading import refuse_remote_code
    from surgery.models.trace import confirm, trace

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
    from surgery.models.stream import stream_emergence

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
    from surgery.method.locate import agree
    from surgery.models.observe import layer_norms

    prompts = [prompt.tokens for prompt in locating_prompts(subject, settings)]
    with reporter.bar("Locating the ME Layer", len(prompts)) as advance:
        return agree(layer_norms(subject.model, anatomy, prompts, advance))


def given_emergence(layer: int) -> Emergence:
    """An ME Layer that the user names."""
    return Emergence(layer, 0.0, 0.0, 1.0, "given", (), (), found_by="given")


def _lent_evidence(
    subject: Subject,
    anatomy: Anatomy,
    emergence: Emergence,
    settings: Settings,
    reporter: Reporter,
) -> tuple[Evidence, int]:
    """The evidence of a model that is never in memory whole, and the bytes it took to read."""
    import torch

    from surgery.models.lending import LentModel

    lent = LentModel(
        subject.checkpoint,
        anatomy,
        dtype=getattr(torch, settings.dtype),
        device=subject.device,
        trust_remote_code=settings.trust_remote_code,
    )
    model = lent.open([prompt.tokens for prompt in locating_prompts(subject, settings)])
    return find_evidence(subject, model, anatomy, emergence, settings, reporter), lent.bytes_read


def find_evidence(
    subject: Subject,
    model: Any,
    anatomy: Anatomy,
    emergence: Emergence,
    settings: Settings,
    reporter: Reporter,
) -> Evidence:
    """What the paper measures to explain an ME Layer; see `surgery.probe`."""
    from surgery.measure.probe import gather, steps

    prompts = locating_prompts(subject, settings)
    mask = None
    if emergence.layer is not None:
        targets = attention_targets(emergence.layer, anatomy.attends, "first")
        mask = choose_mask(subject, anatomy, targets, settings)
    with reporter.bar("Gathering evidence", steps(emergence, prompts)) as advance:
        return gather(
            model,
            anatomy,
            emergence,
            prompts,
            mask,
            share=settings.rate,
            progress=advance,
        )


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
            from surgery.models.observe import sink_magnitudes

            sequences = calibration_windows(subject, settings)
            magnitudes = sink_magnitudes(subject.model, anatomy, targets, sequences)
        chosen = {layer: largest(magnitudes[layer], size) for layer in targets}
    return Mask(anatomy.hidden_size, settings.select, settings.strength, chosen)
