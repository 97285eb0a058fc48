"""Where the emergence of a patient is, and which dimensions its mask takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.method.locate import Emergence
from surgery.method.mask import Mask, Selection, largest, mask_size, random_dimensions
from surgery.models.anatomy import effective_gain
from surgery.patient.patient import Patient

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from surgery.models.stream import Streamed


def find_emergence(patient: Patient) -> Emergence:
    """Locate the ME Layer on the bundled prompts, or on the user's calibration text.

    No layer runs beyond those that show that the emergence lasts.
    """
    from surgery.models.stream import locate  # imports torch

    prompts = [prompt.tokens for prompt in patient.prompts()]
    ground, depth = patient.ground, patient.anatomy.depth
    with patient.reporter.bar("Locating the ME Layer", depth) as advance:
        return locate(ground, prompts, progress=advance)[0]


def observe_emergence(patient: Patient) -> Emergence:
    """The same from every layer of a loaded model, for a whole table."""
    from surgery.method.locate import agree
    from surgery.models.observe import layer_norms  # imports torch

    prompts = [prompt.tokens for prompt in patient.prompts()]
    with patient.reporter.bar("Locating the ME Layer", len(prompts)) as advance:
        return agree(layer_norms(patient.model, patient.anatomy, prompts, advance))


def stream_model(patient: Patient, *, all_layers: bool = False) -> Streamed:
    """Locate the ME Layer without loading the model whole."""
    from surgery.models.stream import LayerStream  # imports torch

    prompts = [prompt.tokens for prompt in patient.prompts()]
    stream = LayerStream(
        patient.plain,
        patient.anatomy,
        dtype=patient.loading.dtype,
        device=patient.device,
        trust_remote_code=patient.loading.trust_remote_code,
    )
    with patient.reporter.bar("Streaming layers", patient.anatomy.depth) as advance:
        return stream.locate(prompts, all_layers=all_layers, progress=advance)


def given_emergence(layer: int) -> Emergence:
    """An ME Layer that the user names."""
    return Emergence(layer, 0.0, 0.0, 1.0, "given", (), (), found_by="given")


def choose_mask(
    patient: Patient,
    targets: Sequence[int],
    selection: Selection,
    magnitudes: Mapping[int, NDArray[np.float64]] | None = None,
) -> Mask:
    """S for every target layer, by weight, activation or chance (eq. 4).

    Args:
        patient: whose gains or activations are ranked.
        targets: layers, ascending.
        selection: how many dimensions, and by what.
        magnitudes: what `magnitudes_at` found on the calibration text, when that is known.
    """
    width = patient.anatomy.hidden_size
    size = mask_size(selection.rate, width)
    if selection.select == "random":
        chosen = {layer: random_dimensions(width, size, selection.seed, layer) for layer in targets}
    elif selection.select == "weight":
        chosen = {
            layer: largest(effective_gain(patient.anatomy, patient.plain, layer), size)
            for layer in targets
        }
    else:
        if magnitudes is None:
            sequences = patient.calibration()  # which is read before the model is loaded
            magnitudes = magnitudes_at(patient, targets, sequences)
        chosen = {layer: largest(magnitudes[layer], size) for layer in targets}
    return Mask(width, selection.select, selection.strength, chosen)


def magnitudes_at(
    patient: Patient, targets: Sequence[int], sequences: Sequence[Sequence[int]]
) -> dict[int, NDArray[np.float64]]:
    """The mean |x| of first tokens at the input of each target layer's attention, [D] by layer."""
    from surgery.models.journey import first_magnitudes  # import torch
    from surgery.models.observe import sink_magnitudes

    if patient.streams:
        return first_magnitudes(patient.ground, targets, sequences)
    return sink_magnitudes(patient.model, patient.anatomy, targets, sequences)
