"""What a user asks of a conversion, and whom it tells what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from surgery.anatomy import FOLDS
from surgery.errors import BadSettings
from surgery.loading import DTYPES
from surgery.mask import SCOPES, SELECTIONS, check_rate, check_strength

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
            from surgery.hub import repository_name

            repository_name(self.push_to_hub)
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
