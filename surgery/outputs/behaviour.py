"""What a written output does: its logits, loaded by others, against the base under hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.files.checkpoint import Checkpoint
from surgery.folds.base import Fold
from surgery.folds.edits import Edit
from surgery.method.mask import Mask
from surgery.outputs.checks import Check
from surgery.patient.patient import Loading, Patient
from surgery.patient.quantised import loadable

if TYPE_CHECKING:
    import torch

# Tokens on which base, hooks and written checkpoint are compared logit by logit.
VERIFY_TOKENS = 192
# KL, in nats per token, that the same weights may leave when they are run twice.
_AGAIN = {"float32": 1e-5, "float64": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}
# KL, in nats per token, that rounding to a stored format alone may leave.
_ROUNDING = {"F32": 1e-5, "F64": 1e-5, "F16": 1e-3, "BF16": 2e-2}
# The gate measures on more tokens and longer sequences, where the first token counts for less.
_SMALLER_SAMPLE = 10
# Without a gate: the share of the base's distance that a fold of the mask leaves at most.
_UNMEASURED = 0.5
_IN_MEMORY = "logits are those of the weights folded in memory"
_PAPER = "logits against the paper's mask (hook on the first token)"


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


def behaviour(
    patient: Patient,
    mask: Mask,
    fold: Fold,
    folder: Path,
    edits: Sequence[Edit],
    quality: Mapping[str, Any] | None,
) -> list[Check]:
    """The written checkpoint, loaded by stock transformers, against the base under hooks.

    A fold that only approximates the hooks is compared with itself in memory too. The patient's
    model is released before the written one is loaded.

    Args:
        patient: the base.
        mask: what was folded in.
        fold: that did it.
        folder: of the written checkpoint.
        edits: of the fold, in the names of the patient's model; of no use for exact folds.
        quality: what the gate measured, as a manifest has it; None where there was none.

    Raises:
        BadCheckpoint: when the checkpoint does not load.
    """
    from surgery.folds import editing  # imports torch

    if patient.streams:
        return _layer_by_layer(patient, mask, fold, folder, edits, quality)
    batch, dtype = Batch.of(patient), patient.loading.dtype
    reference = masked_logits(batch, patient, mask, fold.tokens)
    base = folded = None
    if not fold.exact:
        base = batch.logits(patient.model)
        context = editing.edited(patient.model, patient.plain, edits)
        folded = batch.logits(patient.model, context)
    patient.release()
    with loadable(folder) as loaded:
        logits, checks = stock_load(loaded, batch, patient.loading)
    if folded is None or base is None:
        return [*checks, equal(logits, reference, dtype, rounded=_rounded(mask))]
    return [*checks, *_approximate(logits, folded, reference, base, dtype, quality)]


def _rounded(mask: Mask) -> bool:
    """Halving a gain is exact in any binary format, scaling by other factors is rounded."""
    return mask.strength not in (0.0, 1.0)


def _approximate(
    logits: Any,
    folded: Any,
    reference: Any,
    base: Any,
    dtype: str,
    quality: Mapping[str, Any] | None,
) -> list[Check]:
    """That logits are those of the fold in memory, and near its reference."""
    from surgery.measure.logits import divergence  # imports torch

    # The gate, too, measured the rounded weights.
    again = run_again(dtype)
    whole = divergence(folded, base)
    return [
        as_folded(_IN_MEMORY, logits, folded, min(again, 0.01 * whole + 1e-6)),
        near_reference(logits, reference, base, quality, again),
    ]


def _layer_by_layer(
    patient: Patient,
    mask: Mask,
    fold: Fold,
    folder: Path,
    edits: Sequence[Edit],
    quality: Mapping[str, Any] | None,
) -> list[Check]:
    """The same of a model that is never in memory whole; see `outputs.layerwise`."""
    from surgery.outputs.layerwise import run_layerwise, stock_from_disk  # import torch

    sequences = patient.held_out(VERIFY_TOKENS, VERIFY_TOKENS // 2)
    dtype = patient.loading.dtype
    with loadable(folder) as loaded:
        seen = run_layerwise(patient, mask, fold, edits, loaded, sequences)
        stock = stock_from_disk(loaded, patient, sequences, seen.written)
    logits = seen.written
    finite = bool(logits.isfinite().all())
    checks = [Check("logits are finite", finite, f"{logits.shape[0]} tokens, layer by layer")]
    if isinstance(stock, Check):
        checks.insert(0, stock)
    else:
        patient.reporter.say(f"Not tried: a stock load of what was written; {stock}")
    if seen.folded is None or seen.base is None:
        return [*checks, equal(logits, seen.reference, dtype, rounded=_rounded(mask))]
    found = _approximate(logits, seen.folded, seen.reference, seen.base, dtype, quality)
    return [*checks, *found]


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


def run_again(dtype: str) -> float:
    """KL that the same weights may leave when they are run twice, nats per token.

    Sums may be taken in another order.
    """
    return _AGAIN.get(dtype, max(_AGAIN.values()))


def rounding_of(checkpoint: Checkpoint) -> float:
    """KL that rounding to the checkpoint's formats alone may leave, nats per token."""
    formats = {entry.dtype for entry in checkpoint.tensors.values()} & set(_ROUNDING)
    return max((_ROUNDING[name] for name in formats), default=_ROUNDING["F32"])


def as_folded(name: str, logits: Any, folded: Any, allowed: float) -> Check:
    """Logits that must be those of the weights folded in memory, up to rounding."""
    from surgery.measure.logits import divergence  # imports torch

    distance = divergence(folded, logits)
    detail = f"KL(folded ‖ this) {distance:.2e} nats per token, allowed {allowed:.1e}"
    return Check(name, distance <= allowed, detail)


def near_reference(
    logits: Any,
    reference: Any,
    base: Any,
    quality: Mapping[str, Any] | None,
    rounding: float,
    name: str = _PAPER,
) -> Check:
    """Logits that approximate the paper's mask as nearly as the gate has measured.

    Args:
        logits: of what was written, [tokens, vocabulary].
        reference: of the base under the paper's hooks, likewise.
        base: of the base, likewise.
        quality: what the gate measured, as a manifest has it. Without it the fold must be nearer
            to the reference than half the base's distance: an unrelated reference is as far from
            the fold as from the base.
        rounding: KL that rounding alone, or running it twice, may leave, nats per token.
        name: of the check.
    """
    from surgery.measure.logits import divergence  # imports torch

    distance = divergence(reference, logits)
    whole = divergence(reference, base)
    variants = quality["variants"] if quality is not None else []
    folded: Mapping[str, Any] = next((one for one in variants if one["name"] == "folded"), {})
    measured = folded.get("kl_from_reference")
    if measured is not None:
        allowed = _SMALLER_SAMPLE * measured + rounding
        why = f"{_SMALLER_SAMPLE} times the gate's {measured:.1e}, and rounding"
    else:
        allowed = _UNMEASURED * whole + rounding
        why = f"{_UNMEASURED:g} of the base's, as no gate ran, and rounding"
    detail = (
        f"KL(reference ‖ this) {distance:.2e} nats per token, allowed {allowed:.2e} ({why}); "
        f"KL(reference ‖ base) {whole:.2e}"
    )
    return Check(name, distance <= allowed, detail)
