"""What a user asks of a conversion."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import BadSettings
from surgery.method.mask import SCOPES, SELECTIONS, check_rate, check_strength
from surgery.models.anatomy import FOLDS
from surgery.models.loading import DTYPES

FORMS = ("checkpoint", "adapter", "gguf-adapter")


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
    undo_file: bool = False
    form: str = "checkpoint"

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
        if self.form not in FORMS:
            raise BadSettings(f"--as must be one of {', '.join(FORMS)}; not {self.form!r}.")
        if self.form != "checkpoint" and self.fold != "sink":
            raise BadSettings(
                f"--as {self.form} needs --fold sink: the other folds are no low-rank updates."
            )
        check_strength(self.strength)
        check_rate(self.rate)
        if self.seed < 0:
            raise BadSettings("--seed must not be negative.")
        if self.layer is not None and self.layers is not None:
            raise BadSettings("Give either --layer (the ME Layer) or --layers (targets), not both.")
        if self.check_tokens < 1 or self.calibration_tokens < 1:
            raise BadSettings("--check-tokens and --calibration-tokens must be at least 1.")
        if self.push_to_hub is not None:
            from surgery.outputs.hub import repository_name

            repository_name(self.push_to_hub)
        if not 0 <= self.max_degradation < float("inf"):
            raise BadSettings(
                "--max-degradation must be a finite number and not negative; to write a checkpoint "
                "however bad it is, give --force."
            )
