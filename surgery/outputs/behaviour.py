"""What a written output does: its logits, loaded by others, against the base under hooks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.folds.base import Fold
from surgery.method.mask import Mask
from surgery.outputs.checks import Check
from surgery.patient.patient import Loading, Patient
from surgery.patient.quantised import loadable

if TYPE_CHECKING:
    import torch

# Tokens on which base, hooks and written checkpoint are compared logit by logit.
VERIFY_TOKENS = 192


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, so that padding counts.

    Attributes:
        ids: token ids, [sequences, longest].
        real: False at padding, [sequences, longest].
        device: that models run on.
    """

    ids: torch.Tensor
    real: torch.Tensor
    device: torch.device

    @classmethod
    def of(cls, patient: Patient) -> Batch:
        """Held-out text, on the patient's device."""
        from surgery.models.observe import pad  # imports torch

        ids, real = pad(patient.held_out(VERIFY_TOKENS, VERIFY_TOKENS // 2))
        return cls(ids.to(patient.device), real.bool().to(patient.device), patient.device)

    def logits(
        self, model: Any, context: AbstractContextManager[Any] | None = None
    ) -> torch.Tensor:
        """A model's logits at the real tokens, [tokens, vocabulary]."""
        import torch

        with torch.inference_mode(), context or nullcontext():
            found: torch.Tensor = model(
                input_ids=self.ids, attention_mask=self.real.long(), use_cache=False
            ).logits[self.real]
        return found


def masked_logits(batch: Batch, patient: Patient, mask: Mask, tokens: str) -> torch.Tensor:
    """The logits of a patient under the paper's hook, on the "first" token or on "every" one."""
    from surgery.models.masking import wemask  # imports torch

    context = wemask(patient.model, mask, tokens, anatomy=patient.anatomy)
    return batch.logits(patient.model, context)


def behaviour(patient: Patient, mask: Mask, fold: Fold, folder: Path) -> list[Check]:
    """The written checkpoint, loaded by stock transformers, against the base under hooks.

    The patient's model is released before the written one is loaded.

    Raises:
        BadCheckpoint: when the checkpoint does not load.
    """
    batch = Batch.of(patient)
    base = batch.logits(patient.model)
    reference = masked_logits(batch, patient, mask, fold.tokens)
    patient.release()
    # Halving a gain is exact in any binary format, scaling by other factors is rounded.
    rounded = mask.strength not in (0.0, 1.0)
    with loadable(folder) as loaded:
        logits, checks = stock_load(loaded, batch, patient.loading)
    if fold.exact:
        return [*checks, equal(logits, reference, patient.loading.dtype, rounded=rounded)]
    return [*checks, near_reference(logits, reference, base)]


def stock_load(folder: Path, batch: Batch, loading: Loading) -> tuple[torch.Tensor, list[Check]]:
    """A written checkpoint's logits in stock transformers, and that there are any."""
    from surgery.models.loading import load_model  # imports torch

    model = load_model(
        folder,
        dtype=loading.dtype,
        device=batch.device,
        trust_remote_code=loading.trust_remote_code,
    )
    loads = Check("stock transformers loads it, no weight missing", True, type(model).__name__)
    logits = batch.logits(model)
    finite = bool(logits.isfinite().all())
    return logits, [loads, Check("logits are finite", finite, f"{logits.shape[0]} tokens")]


def equal(logits: Any, reference: Any, dtype: str, *, rounded: bool) -> Check:
    """Logits that must be the reference's to the last bit, unless the edit was rounded."""
    name = "logits equal the base under a hook that masks every token"
    if logits.equal(reference):
        return Check(name, True, f"bit-equal in {dtype}")
    difference = float((logits.double() - reference.double()).abs().max())
    largest = float(reference.double().abs().max())
    why = (
        "; scaled weights are rounded to the stored format"
        if rounded
        else (", expected bit-equality")
    )
    detail = f"largest difference {difference:.2e} (largest logit {largest:.3g}){why}"
    return Check(name, rounded and difference <= 0.02 * largest, detail)


def near_reference(logits: Any, reference: Any, base: Any) -> Check:
    """Logits that approximate the paper's mask, and how much nearer they are than the base's."""
    from surgery.measure.logits import divergence  # imports torch

    distance = divergence(reference, logits)
    return Check(
        "logits against the paper's mask (hook on the first token)",
        math.isfinite(distance),
        f"KL(reference ‖ this) {distance:.2e} nats per token; "
        f"KL(reference ‖ base) {divergence(reference, base):.2e}",
    )
