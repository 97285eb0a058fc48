"""The block `surgery:` of a recipe: what a training does, as it is asked and recorded."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import BadSettings
from surgery.folds.registry import FOLDS
from surgery.method.mask import SCOPES, SELECTIONS, TOKENS, check_rate, check_strength

METHODS = ("sft", "dpo", "grpo")
INTERVENTIONS = ("wemask", "none", "gated_attention")
SAVES = ("merged", "adapter", "both")
BLOCK = "surgery"


@dataclass(frozen=True)
class Treatment:
    """The block `surgery:` of a recipe.

    method: sft, dpo or grpo. intervention: wemask; none, for a baseline; gated_attention, the
    baseline of the paper's Appendix G. rate, scope, select, strength, tokens: the mask in
    training. layer: the ME Layer, instead of searching for it. fold, fold_scope: the mask in the
    weights afterwards, fold "none" for leaving it out. examples: train on so many rows, drawn at
    random. save: the merged checkpoint, an adapter, or both. output: the folder to write. push: a
    Hub repository. max_degradation, force: as in `convert`.
    """

    method: str = "sft"
    intervention: str = "wemask"
    rate: float = 0.1
    scope: str = "all"
    select: str = "weight"
    strength: float = 1.0
    tokens: str = "first"
    layer: int | None = None
    fold: str = "sink"
    fold_scope: str = "first"
    examples: int | None = None
    save: str = "merged"
    output: str | None = None
    push: str | None = None
    max_degradation: float = 0.1
    force: bool = False

    def __post_init__(self) -> None:
        """Raise BadSettings for values that make no sense whatever the model is."""
        for name, allowed in (
            ("method", METHODS),
            ("intervention", INTERVENTIONS),
            ("scope", SCOPES),
            ("select", SELECTIONS),
            ("tokens", TOKENS),
            ("fold", (*FOLDS, "none")),
            ("fold_scope", SCOPES),
            ("save", SAVES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise BadSettings(
                    f"{BLOCK}: {name} must be one of {', '.join(allowed)}; not {value!r}."
                )
        for name, kinds in (
            ("rate", (float, int)),
            ("strength", (float, int)),
            ("max_degradation", (float, int)),
            ("layer", (int, type(None))),
            ("examples", (int, type(None))),
            ("output", (str, type(None))),
            ("push", (str, type(None))),
            ("force", (bool,)),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise BadSettings(f"{BLOCK}: {name} cannot be {value!r}.")
        if self.intervention == "gated_attention" and (self.fold, self.save) != ("none", "adapter"):
            raise BadSettings(
                f"{BLOCK}: gated attention depends on the token, so it cannot be folded or merged; "
                "give fold: none and save: adapter."
            )
        check_rate(self.rate)
        check_strength(self.strength)
        if self.examples is not None and self.examples < 1:
            raise BadSettings(f"{BLOCK}: examples must be at least 1.")

    @property
    def masks(self) -> bool:
        """Whether training runs under the mask."""
        return self.intervention == "wemask"

    @property
    def folds(self) -> bool:
        """Whether a fold follows the training."""
        return self.masks and self.fold != "none"
