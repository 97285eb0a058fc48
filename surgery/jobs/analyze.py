"""What is to be found in a model before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.files.checkpoint import Checkpoint
from surgery.method.locate import Emergence
from surgery.method.mask import attention_targets
from surgery.models.anatomy import Anatomy
from surgery.models.memory import return_freed_memory
from surgery.patient.locating import choose_mask, observe_emergence, stream_model
from surgery.patient.patient import Patient
from surgery.patient.source import resolve, resolve_light
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings

if TYPE_CHECKING:
    from surgery.measure.evidence import Evidence
    from surgery.models.stream import Streamed

# Checkpoints above this size (bytes) are analysed layer by layer instead of being loaded whole.
STREAM_ABOVE = 1_000_000_000


@dataclass(frozen=True)
class Analysis:
    """What `analyze` finds.

    Attributes:
        checkpoint: of the model.
        anatomy: who reads the attention input, layer by layer.
        emergence: its `layer` is None for a model without one.
        evidence: what the paper measures; None unless it was asked for.
        streamed: how much was read, when the model was run layer by layer.
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
    revision: str | None = Settings.revision,
    device: str | None = Settings.device,
    dtype: str = Settings.dtype,
    calibration: str | None = Settings.calibration,
    trust_remote_code: bool = Settings.trust_remote_code,
    evidence: bool = False,
    rate: float = Settings.rate,
    stream: bool | None = None,
    all_layers: bool = False,
    reporter: Reporter = SILENT,
) -> Analysis:
    """Locate the ME Layer of a model (paper §3, Appendices D and H).

    Args:
        model: a folder, a Hub id, a .gguf file or "demo".
        revision: branch, tag or commit of a Hub model.
        device: of the analysis; None for the best there is.
        dtype: of the analysis.
        calibration: a file of text in place of the bundled prompts.
        trust_remote_code: whether the checkpoint's own Python code may run.
        evidence: also gather all that the paper measures, which takes dozens of passes through all
            layers and downloads a model unless `stream` is given.
        rate: the share of dimensions in eq. 1 and in the mask of the evidence.
        stream: run layer by layer from the checkpoint's bytes and stop once the emergence has
            lasted; by default for models on the Hub that are not in the cache, and for large ones.
        all_layers: when streaming, go on to the end.
        reporter: whom to tell.

    Raises:
        BadCheckpoint, BadSettings or Unsupported: with the reason.
    """
    settings = Settings.gathered(locals())
    whole = stream is False or (evidence and not stream)
    if not whole:
        return_freed_memory()
    checkpoint = (resolve if whole else resolve_light)(model, revision, reporter.say)
    patient = Patient(checkpoint, settings.loading, reporter)
    plain, anatomy = patient.plain, patient.anatomy
    large = stream is None and (plain.size > STREAM_ABOVE or (not whole and patient.streams))
    if stream or large or (not whole and (all_layers or plain.remote is not None)):
        streamed = stream_model(patient, all_layers=all_layers or evidence)
        if not evidence:
            return Analysis(plain, anatomy, streamed.emergence, streamed=streamed)
        gathered, read = _lent_evidence(patient, streamed.emergence, settings)
        streamed = replace(streamed, bytes_read=streamed.bytes_read + read)
        return Analysis(plain, anatomy, streamed.emergence, gathered, streamed)
    emergence = observe_emergence(patient)
    found = None
    if evidence:
        found = _evidence(patient, patient.model, emergence, settings)
    return Analysis(plain, anatomy, emergence, found)


def _lent_evidence(
    patient: Patient, emergence: Emergence, settings: Settings
) -> tuple[Evidence, int]:
    """The evidence of a model that is never in memory whole, and the bytes it took to read."""
    from surgery.models.lending import LentModel  # imports torch

    lent = LentModel(
        patient.plain,
        patient.anatomy,
        dtype=settings.dtype,
        device=patient.device,
        trust_remote_code=settings.trust_remote_code,
    )
    model = lent.open([prompt.tokens for prompt in patient.prompts()])
    return _evidence(patient, model, emergence, settings), lent.bytes_read


def _evidence(patient: Patient, model: Any, emergence: Emergence, settings: Settings) -> Evidence:
    """What the paper measures to explain an ME Layer; see `surgery.measure.probe`."""
    from surgery.measure.evidence import gather, steps  # imports torch

    prompts = patient.prompts()
    mask = None
    if emergence.layer is not None:
        targets = attention_targets(emergence.layer, patient.anatomy.attends, "first")
        mask = choose_mask(patient, targets, settings.selection)
    with patient.reporter.bar("Gathering evidence", steps(emergence, prompts)) as advance:
        return gather(
            model,
            patient.anatomy,
            emergence,
            prompts,
            mask,
            share=settings.rate,
            progress=advance,
        )
