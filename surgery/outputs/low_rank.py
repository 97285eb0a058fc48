"""The sink fold as low-rank updates: exactly a LoRA of rank 1, for a base that stays untouched.

W ← W − γ (W (m ⊙ c)) vᵀ is the low-rank update W + (α / r) B A with r = 1, A = vᵀ,
B = −W (m ⊙ c) and α = γ, so `lora_alpha` is the strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.folds.edits import Edit, RankOne
from surgery.models.anatomy import Anatomy
from surgery.outputs.places import shown_origin

UPDATES = "rank-one updates"  # what the edits become, in words


@dataclass(frozen=True)
class Term:
    """The update of one linear: W + α b aᵀ.

    Attributes:
        module: its path in the loaded model.
        tensor: its weight's name in the checkpoint.
        layer: the target layer, from 0.
        a: what it answers to, v, [D], float32.
        b: what it then adds, −W (m ⊙ c), [out], float32.
    """

    module: str
    tensor: str
    layer: int
    a: NDArray[np.float32]
    b: NDArray[np.float32]


def terms_of(checkpoint: Checkpoint, anatomy: Anatomy, edits: Sequence[Edit]) -> list[Term]:
    """The updates behind the edits of a sink fold, from the base's own weights."""
    terms = []
    for edit in edits:
        if not isinstance(edit, RankOne):
            raise Unsupported("Only --fold sink is a low-rank update; an adapter needs it.")
        found = anatomy.at(edit.layer)
        if edit.tensor not in found.weights:
            raise BadCheckpoint(f"{edit.tensor} does not read the attention input of its layer.")
        weight = checkpoint.read(edit.tensor)
        terms.append(
            Term(
                module=found.readers[found.weights.index(edit.tensor)],
                tensor=edit.tensor,
                layer=edit.layer,
                a=edit.sink.detector,
                b=response(weight if edit.axis == 1 else weight.T, edit),
            )
        )
    return terms


def response(weight: NDArray, edit: RankOne) -> NDArray[np.float32]:
    """−W (m ⊙ c) of a weight [out, D], in float64, rounded once."""
    columns = weight[:, list(edit.dimensions)].astype(np.float64)
    return (-(columns @ edit.sink.center.astype(np.float64))).astype(np.float32)


def size_of(checkpoint: Checkpoint, anatomy: Anatomy, edits: Sequence[Edit]) -> int:
    """About how many bytes the updates take."""
    axis = 0 if anatomy.input_axis else 1
    rows = [checkpoint.tensors[edit.tensor].shape[axis] for edit in edits]
    return sum(4 * (anatomy.hidden_size + count) + 400 for count in rows)


def base_name(origin: Origin) -> str:
    """What `from_pretrained` finds a base by: a Hub id where there is one, else its name.

    A path is of this machine, and an adapter is published.
    """
    if origin.note:  # the demo: where its weights come from
        return origin.note.split(" ", 1)[0]
    return origin.name if origin.kind == "hub" else shown_origin(origin).typed
