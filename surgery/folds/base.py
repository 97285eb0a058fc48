"""What every fold can say and do: the mask of the paper as edits of plain weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from surgery.errors import BadSettings, Unsupported
from surgery.folds.edits import Edit, SinkDirection
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy

if TYPE_CHECKING:
    from surgery.patient.patient import Patient


@dataclass(frozen=True)
class Leak:
    """How a detector answers: v·x, which should be 1 on the sink token and 0 elsewhere.

    Attributes:
        ordinary_rms: root mean square over ordinary tokens.
        ordinary_largest: largest |v·x| over ordinary tokens.
        sink_smallest: smallest v·x over first tokens.
        tokens: number of ordinary tokens.
        late_rms: as `ordinary_rms`, over those from position 256 on; None where there are none.
        secondary_rms: as `ordinary_rms`, over secondary sinks; 0 where there are none.
        secondary_largest: as `ordinary_largest`, likewise.
        secondary_tokens: number of secondary sinks.
        plain: KL(reference ‖ folded) on calibration text kept back, nats per token, of detectors
            without a null on secondary sinks in any layer; None where none was compared.
        null: the same of detectors with one. The smaller of the two decides.
    """

    ordinary_rms: float
    ordinary_largest: float
    sink_smallest: float
    tokens: int
    late_rms: float | None = None
    secondary_rms: float = 0.0
    secondary_largest: float = 0.0
    secondary_tokens: int = 0
    plain: float | None = None
    null: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What a fold had to measure before it could be made; empty for folds that measure nothing.

    Attributes:
        directions: sink directions by target layer.
        leaks: their leak on the calibration text, by target layer.
    """

    directions: Mapping[int, SinkDirection] = field(default_factory=dict)
    leaks: Mapping[int, Leak] = field(default_factory=dict)


class Fold(ABC):
    """One way to fold a mask into weights; `surgery.folds.registry` holds one object of each."""

    name: ClassVar[str]
    # Which tokens its reference masks: the fold's own promise.
    tokens: ClassVar[Literal["first", "every"]]
    # Whether it equals its reference to the last bit, so far as its edits are not rounded.
    exact: ClassVar[bool]
    # Whether it edits linears, which quantised containers cannot hold, or norms alone.
    linear: ClassVar[bool]
    # Whether it is a low-rank update of linears, which can ship as an adapter.
    low_rank: ClassVar[bool] = False
    # Whether `calibrate` has to run the model.
    calibrates: ClassVar[bool] = False
    # What it is, for the model card.
    words: ClassVar[str]

    def refusal(self, anatomy: Anatomy) -> str:
        """Why this fold would not be truthful in a model; empty where it is."""
        return ""

    def require(self, anatomy: Anatomy) -> None:
        """Raise Unsupported, naming the alternative, where this fold would not be truthful."""
        refusal = self.refusal(anatomy)
        if refusal:
            raise Unsupported(refusal)

    def calibrate(self, _patient: Patient, _mask: Mask) -> Calibration:
        """Measure on the patient what the edits need."""
        return Calibration()

    def touched(self, anatomy: Anatomy, mask: Mask) -> list[str]:
        """The model's parameters that the edits change, known before anything is measured."""
        return [edit.parameter for edit in self.edits(anatomy, mask)]

    @abstractmethod
    def layer_edits(
        self, anatomy: Anatomy, mask: Mask, layer: int, calibration: Calibration
    ) -> Iterator[Edit]:
        """The edits of one target layer."""

    def edits(
        self, anatomy: Anatomy, mask: Mask, calibration: Calibration | None = None
    ) -> tuple[Edit, ...]:
        """The edits that fold a mask into a model; none at strength 0, which changes no byte.

        Raises:
            Unsupported: where the fold would reach more than attention.
            BadSettings: where it needs the sink direction of a layer, and has none.
        """
        self.require(anatomy)
        if mask.strength == 0.0:
            return ()
        known = calibration or Calibration()
        if self.calibrates:
            self._require_directions(mask, known)
        return tuple(
            edit for layer in mask.layers for edit in self.layer_edits(anatomy, mask, layer, known)
        )

    def _require_directions(self, mask: Mask, calibration: Calibration) -> None:
        for layer in mask.layers:
            found = calibration.directions.get(layer)
            if found is None:
                raise BadSettings(
                    f"The {self.name} fold needs the sink direction of every target layer, and has "
                    f"none of layer {layer}; calibrate it first, or choose another fold."
                )
            sizes = len(found.center), len(found.detector)
            if sizes != (len(mask.dimensions[layer]), mask.hidden_size):
                raise BadSettings(
                    f"The sink direction of layer {layer} is of another mask: it has {sizes[0]} "
                    f"masked dimensions of {sizes[1]}, and the mask "
                    f"{len(mask.dimensions[layer])} of {mask.hidden_size}."
                )


def readers(anatomy: Anatomy, layer: int) -> Iterator[tuple[str, str]]:
    """The linears that read a layer's attention input: stored tensor and model parameter."""
    found = anatomy.at(layer)
    for tensor, module in zip(found.weights, found.readers, strict=True):
        yield tensor, f"{module}.weight"
