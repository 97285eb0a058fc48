"""What a user asks of a conversion: the one source of the options' names, defaults and help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from surgery.errors import BadSettings
from surgery.folds.base import Fold
from surgery.folds.registry import FOLDS, fold_named
from surgery.method.mask import SCOPES, SELECTIONS, Selection
from surgery.models.loading import DTYPES
from surgery.patient.patient import Loading
from surgery.patient.repository import repository_name

# What `--as` may be: the kinds of output that are no question of MODEL or --output.
FORMS = ("checkpoint", "adapter", "gguf-adapter")


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field that is an option of the command line.

    Args:
        default: of the option, of the function and in the manifest.
        help: one line for `--help`.
        facts: `choices`: the values allowed; `metavar`; `name`: how the option is called where that
            is not the field's name; `shown`: whether the help shows the default (True); `repeated`:
            whether several values are given by several options.
    """
    return field(default=default, metadata={"help": help, **facts})


def spelled(known: Field[Any]) -> str:
    """A field as it is spelled on the command line."""
    name: str = known.metadata.get("name", f"--{known.name.replace('_', '-')}")
    return name


@dataclass(frozen=True)
class Settings:
    """The arguments of a conversion; every field but the first is an option of `convert`.

    Attributes:
        model: a folder, a Hub id (`name@revision`), a .gguf file or "demo".
        rate: share of dimensions to mask, in (0, 1).
        scope: "first" masks the first layer after the ME Layer, "all" every later one.
        fold: how the mask is folded into weights.
        select: how dimensions are chosen.
        strength: γ; 1 masks, 0 changes nothing.
        layer: the ME Layer, from 0, instead of searching for it.
        layers: target layers, instead of those after an ME Layer.
        revision: branch, tag or commit of a Hub model.
        seed: of the random selection.
        calibration: file of text in place of the bundled prompts.
        calibration_tokens: tokens that calibration sees.
        check: whether to trace, measure and compare logits.
        check_tokens: tokens the quality gate measures on.
        max_degradation: allowed rise of perplexity over base, as a share.
        fixed: whether to measure all of these tokens even where fewer decide.
        force: whether to write despite the quality gate.
        device: of the analysis.
        dtype: of the analysis.
        stream: whether the model runs layer by layer from its files; None for what suits its size.
        trust_remote_code: whether the checkpoint's own Python code may run.
        push_to_hub: repository to upload to afterwards.
        undo_file: whether to keep what the edits overwrite beside the weights.
        include: patterns of the base's files to carry beyond those that a loader or reader needs.
        form: the kind of output.
    """

    model: str
    rate: float = option(0.1, "Share of dimensions to mask.")
    scope: str = option(
        "first", "Mask the first layer after the ME Layer, or all after it.", choices=SCOPES
    )
    fold: str = option(
        "norm",
        "norm, qkv: every token. sink: the massive token alone (the paper's method).",
        choices=tuple(FOLDS),
    )
    select: str = option(
        "weight", "How dimensions are chosen; weight is the paper's.", choices=SELECTIONS
    )
    strength: float = option(1.0, "1 masks, 0 changes nothing.")
    layer: int | None = option(None, "The ME Layer, instead of searching for it.", metavar="M")
    layers: tuple[int, ...] | None = option(
        None, "Target layers, such as 7 or 7,9-11.", metavar="LIST"
    )
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    seed: int = option(0, "For --select random.")
    calibration: str | None = option(
        None, "Text or JSONL in place of the bundled prompts.", metavar="FILE"
    )
    calibration_tokens: int = option(6144, "Tokens that --fold sink and --select activation see.")
    check: bool = option(True, "Skip trace, quality gate and logit comparison.", name="--no-check")
    check_tokens: int = option(4096, "Tokens the gate measures on, at most.")
    fixed: bool = option(False, "Measure on all --check-tokens, even where fewer decide.")
    max_degradation: float = option(0.1, "Allowed rise of perplexity over base, as a share.")
    force: bool = option(False, "Write despite the quality gate; the card says so.")
    device: str | None = option(None, "Of the analysis, such as cpu or cuda:0.  [default: best]")
    dtype: str = option(
        "float32", "Of the analysis; the written dtype is the source's.", choices=DTYPES
    )
    stream: bool | None = option(
        None,
        "Run layer by layer from the files, or load the model whole.  [default: load what takes at "
        "most a third of the memory]",
        name="--stream/--load",
    )
    trust_remote_code: bool = option(False, "Run the checkpoint's own Python code. Read it first.")
    push_to_hub: str | None = option(None, "Upload afterwards (private).", metavar="REPO")
    undo_file: bool = option(
        False, "Keep what qkv and sink overwrite, for `surgery revert` without the base."
    )
    include: tuple[str, ...] = option(
        (),
        "Carry more of the base's files, such as 'docs/*'; may be repeated.",
        metavar="PATTERN",
        repeated=True,
    )
    form: str = option(
        "checkpoint",
        "With --fold sink: a PEFT or llama.cpp LoRA of rank 1 for the untouched base.",
        choices=FORMS,
        name="--as",
    )

    def __post_init__(self) -> None:
        """Raise BadSettings for values that make no sense whatever the model is."""
        for known in fields(self):
            allowed, value = known.metadata.get("choices"), getattr(self, known.name)
            if allowed is not None and value not in allowed:
                allowed = ", ".join(allowed)
                raise BadSettings(f"{spelled(known)} must be one of {allowed}; not {value!r}.")
        self.selection  # noqa: B018  (which checks itself)
        if self.layer is not None and self.layers is not None:
            raise BadSettings("Give either --layer (the ME Layer) or --layers (targets), not both.")
        if self.check_tokens < 1 or self.calibration_tokens < 1:
            raise BadSettings("--check-tokens and --calibration-tokens must be at least 1.")
        if self.push_to_hub is not None:
            repository_name(self.push_to_hub)
        if not 0 <= self.max_degradation < math.inf:
            raise BadSettings(
                "--max-degradation must be a finite number and not negative; to write a checkpoint "
                "however bad it is, give --force."
            )

    @classmethod
    def gathered(cls, values: Mapping[str, Any]) -> Settings:
        """The settings among the local variables of a function that spells them out."""
        return cls(
            **{known.name: values[known.name] for known in fields(cls) if known.name in values}
        )

    @property
    def fold_used(self) -> Fold:
        """The fold of that name."""
        return fold_named(self.fold)

    @property
    def loading(self) -> Loading:
        """How the model is opened."""
        return Loading(
            self.revision,
            self.device,
            self.dtype,
            self.trust_remote_code,
            self.calibration,
            self.calibration_tokens,
            self.stream,
        )

    @property
    def selection(self) -> Selection:
        """How dimensions are chosen."""
        return Selection(self.rate, self.select, self.strength, self.seed)

    @property
    def targets_given(self) -> bool:
        """Whether nothing is left to locate."""
        return self.layer is not None or self.layers is not None

    @property
    def needs_no_weights(self) -> bool:
        """Whether the headers and the gains tell all that these settings ask for."""
        return (
            self.targets_given
            and not self.check
            and not self.fold_used.linear
            and self.select == "weight"
        )

    def recorded(self) -> dict[str, Any]:
        """As the manifest keeps them: a device of this machine says nothing elsewhere."""
        kept = asdict(self)
        kept["layers"] = list(self.layers) if self.layers is not None else None
        kept["include"] = list(self.include)
        kept.pop("device")
        kept.pop("stream")
        return kept

    def check_layers(self, depth: int) -> None:
        """Raise BadSettings for layers that a model of this depth does not have."""
        if self.layer is not None and not 0 <= self.layer < depth - 1:
            raise BadSettings(
                f"--layer {self.layer} is not a layer with one after it: the model has layers 0 to "
                f"{depth - 1}."
            )
        for layer in self.layers or ():
            if not 0 <= layer < depth:
                raise BadSettings(f"--layers names {layer}; the model has layers 0 to {depth - 1}.")
        if self.layers is not None and not self.layers:
            raise BadSettings("--layers names no layer.")
