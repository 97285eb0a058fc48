"""What a written output does, run layer by layer beside its base, at the memory of a few."""

from __future__ import annotations

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError, first_line
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.folds.base import Fold
from surgery.folds.edits import Edit
from surgery.method.mask import Mask
from surgery.outputs.checks import Check
from surgery.patient.patient import Patient

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Decoder layers, as they are stored, that a stock load with offload to the disk may hold.
_HELD_LAYERS = 2
# KL, in nats per token, between bfloat16 (or float16) and float32 arithmetic on the same weights.
_NARROW = 2e-2


@dataclass(frozen=True)
class Layerwise:
    """Logits at the real tokens of some text, [tokens, vocabulary] each.

    Attributes:
        reference: of the base under hooks.
        written: of what was written.
        base: of the base; None where the fold is exact, like the next.
        folded: of the base with the edits in memory.
    """

    reference: torch.Tensor
    written: torch.Tensor
    base: torch.Tensor | None = None
    folded: torch.Tensor | None = None


def run_layerwise(
    patient: Patient,
    mask: Mask,
    fold: Fold,
    edits: Sequence[Edit],
    folder: Path,
    sequences: Sequence[Sequence[int]],
) -> Layerwise:
    """Base, hooks, edits in memory and the written weights, none of them ever loaded whole."""
    from surgery.folds.calibrate import towards  # imports torch
    from surgery.measure.trial import VARIANTS, Edited, travel
    from surgery.models.journey import gathered
    from surgery.models.lending import Lender

    edited = Edited(patient.plain, mask, edits, tokens=fold.tokens)
    wanted = ("reference",) if fold.exact else VARIANTS
    streams = travel(patient.ground, [edited], sequences, wanted=wanted).variants(0)
    found = {name: gathered(patient.ground, streams[name]) for name in wanted}
    written = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    ground = Lender(
        written,
        patient.anatomy,
        dtype=patient.loading.dtype,
        device=patient.device,
        trust_remote_code=patient.loading.trust_remote_code,
    )
    stream = towards(ground, sequences, patient.anatomy.depth)
    return Layerwise(**found, written=gathered(ground, stream))


def stock_from_disk(
    folder: Path, patient: Patient, sequences: Sequence[Sequence[int]], written: torch.Tensor
) -> Check | str:
    """Stock transformers on what was written, with accelerate's offload to the disk.

    In the format that is stored: converting it would write a copy of the model.

    Args:
        folder: of the written checkpoint.
        patient: the base.
        sequences: token ids.
        written: logits of the written weights, run layer by layer.

    Returns:
        The check, or why it could not be made.
    """
    import torch

    from surgery.measure.logits import divergence
    from surgery.models.loading import quiet, stock_model
    from surgery.models.observe import pad

    if find_spec("accelerate") is None:
        return "accelerate is not installed (pip install accelerate)"
    ids, real = pad(sequences)
    room: Mapping[Any, int] = {"cpu": _HELD_LAYERS * _largest_layer(patient)}
    with tempfile.TemporaryDirectory(prefix="surgery-") as offload:
        try:
            with quiet():
                model = stock_model(
                    folder,
                    patient.loading.trust_remote_code,
                    dtype="auto",
                    device_map="auto",
                    max_memory=room,
                    offload_folder=offload,
                ).eval()
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
        except SurgeryError:
            raise
        except Exception as error:  # whatever accelerate gives where a layer does not fit
            return f"it does not load with offload to the disk here: {first_line(error)}"
    found = logits[real.bool()].float()
    distance = divergence(written.cpu(), found)
    narrow = patient.loading.dtype == "float32" and model.dtype == torch.float32
    allowed = 1e-5 if narrow else _NARROW
    return Check(
        "stock transformers loads it, no weight missing",
        bool(found.isfinite().all()) and distance <= allowed,
        f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')} from the disk; "
        f"KL from the same weights layer by layer {distance:.1e}, allowed {allowed:.0e}",
    )


def _largest_layer(patient: Patient) -> int:
    """Bytes of the largest decoder layer, as it is stored."""
    sizes: Counter[str] = Counter()
    for name, entry in patient.plain.tensors.items():
        found = re.match(r"(.*\.\d+)\.", name)
        if found is not None:
            sizes[found[1]] += entry.size
    return max(sizes.values(), default=patient.plain.size)
