"""Training a LoRA under the mask with TRL: the trainer, its figures, its checkpoints."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from surgery.errors import BadSettings, SurgeryError
from surgery.files.checkpoint import Checkpoint
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.models.gated_attention import GATE, add_gates, gated
from surgery.models.loading import (
    load_tokenizer,
    quiet,
    stock_model,
)
from surgery.models.masking import wemask
from surgery.models.names import StoredNames
from surgery.reporter import Reporter
from surgery.training.data import load_data
from surgery.training.lora import closed
from surgery.training.recipe import Recipe, in_a_line
from surgery.training.tokens import check_tokens

# The figures of the mask, by the names they have in logs and trackers.
ENERGY = "mask_energy"
DRIFT = "sink_drift"


@dataclass(frozen=True)
class Trained:
    """What training did. history: the trainer's logs, by step. seconds: of this run alone."""

    adapter: Path
    steps: int
    seconds: float
    rows: int
    evaluation_rows: int
    processes: int
    trainable: int
    history: tuple[dict[str, Any], ...]


class MaskFigures:
    """What the mask takes away while training, seen by `wemask`'s watcher.

    Over the first real token of each row: the share of the attention input's energy that lies in
    S, and 1 − cosine between its mean now and when training began; means over target layers.
    """

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._energy: dict[int, torch.Tensor] = {}
        self._direction: dict[int, torch.Tensor] = {}
        self._start: dict[int, torch.Tensor] = {}

    def watch(self, layer: int, states: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Add the first real tokens among these attention inputs, without waiting for a device."""
        if positions is None:
            return
        with torch.no_grad():
            rows = torch.arange(len(states), device=states.device)
            x = states[rows, positions.int().argmax(1)].float() * positions.any(1, keepdim=True)
            self._add(self._energy, layer, x.square().sum(0))
            self._add(self._direction, layer, x.sum(0))

    @staticmethod
    def _add(sums: dict[int, torch.Tensor], layer: int, value: torch.Tensor) -> None:
        sums[layer] = sums[layer] + value if layer in sums else value

    def figures(self) -> dict[str, float]:
        """The figures since the last call; empty when no sequence began."""
        shares, drifts = [], []
        for layer, energy in self._energy.items():
            if not energy.any():
                continue
            direction = self._direction[layer]
            chosen = list(self._mask.dimensions[layer])
            shares.append(float(energy[chosen].sum() / energy.sum()))
            start = self._start.setdefault(layer, direction)
            cosine = torch.cosine_similarity(start.double().cpu(), direction.double().cpu(), dim=0)
            drifts.append(max(0.0, 1 - float(cosine)))
        self._energy, self._direction = {}, {}
        if not shares:
            return {}
        return {ENERGY: sum(shares) / len(shares), DRIFT: sum(drifts) / len(drifts)}

    @property
    def start(self) -> dict[int, torch.Tensor]:
        """The mean attention input when training began, by layer; kept across a resume."""
        return self._start


def train(
    recipe: Recipe,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    mask: Mask | None,
    closed_inputs: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    resume: bool,
    reporter: Reporter,
) -> Trained | None:
    """Train as the recipe says and save the adapter below `folder`; None on all but the main rank.

    mask: None for a baseline. Collective: every rank calls it.
    """
    from transformers import set_seed

    arguments = recipe.arguments
    set_seed(arguments.seed)  # the adapter's random start comes before the trainer seeds anything
    with _said_by_libraries(recipe):
        model = _load(recipe, checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=_trusts(recipe))
    _no_bars()
    with arguments.main_process_first(local=False):
        train_rows, evaluation_rows = load_data(recipe)
    last = last_checkpoint(folder / "checkpoints") if resume else None
    figures = MaskFigures(mask) if mask is not None else None
    if figures is not None and last is not None:
        figures.start.update(_read_start(last))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Libraries warn about names that other libraries still use; a user can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        if mask is not None and figures is not None:
            stack.enter_context(
                wemask(
                    model,
                    mask,
                    recipe.treatment.tokens,
                    anatomy=anatomy,
                    watch=None if arguments.torch_compile else figures.watch,
                )
            )
        gates = recipe.treatment.intervention == "gated_attention"
        if gates:
            add_gates(model)
        stored = StoredNames(checkpoint, model)
        with _said_by_libraries(recipe):
            trainer = _trainer(
                recipe, model, tokenizer, train_rows, evaluation_rows, figures, gates
            )
            check_tokens(trainer)
        stack.enter_context(gated(trainer.model) if gates else nullcontext())
        stack.enter_context(closed(trainer.model, closed_inputs))
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        _check_mergeable(trainer.model, stored, anatomy)
        begun = time.monotonic()
        with _said_by_libraries(recipe), _progress(trainer, figures, reporter):
            if last is not None:
                reporter.say(f"Resuming from {last.name}")
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        rows = len(train_rows), len(evaluation_rows) if evaluation_rows is not None else 0
        trained = _saved(trainer, folder / "adapter", time.monotonic() - begun, rows, trainable)
        main = arguments.process_index == 0
        trainer.accelerator.end_training()
        return trained if main else None


def _saved(
    trainer: Any, adapter: Path, seconds: float, rows: tuple[int, int], trainable: int
) -> Trained:
    """Save the adapter, on every rank; what the training was."""
    trainer.save_model(str(adapter))
    trainer.accelerator.wait_for_everyone()
    return Trained(
        adapter,
        trainer.state.global_step,
        seconds,
        *rows,
        trainer.args.world_size,
        trainable,
        tuple(dict(row) for row in trainer.state.log_history),
    )


@contextmanager
def _said_by_libraries(recipe: Recipe) -> Iterator[None]:
    """BadSettings for what TRL, PEFT, transformers and torch raise while doing as a recipe says.

    What a disk refuses is left as it is.
    """
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        if disk_failed(error):
            raise
        raise BadSettings(f"{recipe.name}: {in_a_line(error)}") from error


def disk_failed(error: BaseException) -> bool:
    """Whether an error is a disk's, said by Python, safetensors or `torch.save`."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_SAVE)
    return said or isinstance(error, OSError | SafetensorError)


# By what fails first.
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container.cc", "iostream error")


def _load(recipe: Recipe, checkpoint: Checkpoint) -> Any:
    options: dict[str, Any] = {"dtype": recipe.model.dtype or "auto"}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    with quiet():
        return stock_model(checkpoint.folder, _trusts(recipe), **options)


def _trusts(recipe: Recipe) -> bool:
    return bool(getattr(recipe.arguments, "trust_remote_code", False))


def _no_bars() -> None:
    """The libraries' own bars and tables off; ours says what is going on."""
    import datasets
    from transformers.utils import logging as library

    datasets.disable_progress_bars()
    library.set_verbosity_error()


def _trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Any,
    evaluation: Any,
    figures: MaskFigures | None,
    gates: bool,
) -> Any:
    import trl
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl.trainer.utils import get_peft_config

    class WithFigures:
        """Adds the mask's figures to every log of the training loss."""

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            found = figures.figures() if figures is not None and "loss" in logs else {}
            super().log({**logs, **found}, start_time)  # type: ignore[misc]

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            arguments: Any = self.args  # type: ignore[attr-defined]
            if figures is not None and arguments.process_index == 0:
                step = self.state.global_step  # type: ignore[attr-defined]
                _write_start(Path(arguments.output_dir) / f"checkpoint-{step}", figures.start)
            # Last, because it ends with the state that says that a checkpoint is complete.
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    kinds = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}
    method = recipe.treatment.method
    lora = get_peft_config(recipe.model)
    if gates and lora is not None:
        lora.modules_to_save = [GATE]
        lora.exclude_modules = [GATE]
    options: dict[str, Any] = {}
    if method == "grpo":
        from surgery.training.rewards import exact_answer

        options["reward_funcs"] = exact_answer
    recipe.arguments.disable_tqdm = True
    kind = type(f"Masked{kinds[method].__name__}", (WithFigures, kinds[method]), {})
    trainer = kind(
        model=model,
        args=recipe.arguments,
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=lora,
        **options,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _check_mergeable(model: Any, stored: StoredNames, anatomy: Anatomy) -> None:
    """Raise BadSettings, before any time is spent, for weights that could not be merged later.

    Norms before attention, which hold the fold's zeros, are among them.
    """
    norms = {found.norm for found in anatomy.inputs if found is not None}
    for name, parameter in model.get_base_model().named_parameters():
        module, _, rest = name.partition(".lora_")
        if not parameter.requires_grad or f".{GATE}." in name:
            continue
        if name.rpartition(".")[0] in norms:
            raise BadSettings(f"{name} would train, and with it the zeros that the fold needs.")
        if rest.partition(".")[0] not in ("A", "B") or f"{module}.weight" not in stored:
            raise BadSettings(
                f"{module} would train, which cannot be merged into the checkpoint's own tensors; "
                "leave it out of lora_target_modules."
            )
        stored.of(f"{module}.weight")


@contextmanager
def _progress(trainer: Any, figures: MaskFigures | None, reporter: Reporter) -> Iterator[None]:
    """A bar over the steps, and a line for each log."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        advance: Callable[[int], None]

        def __init__(self) -> None:
            self.done = 0
            self.stack = ExitStack()

        def on_train_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            self.advance = self.stack.enter_context(reporter.bar("Training", state.max_steps))

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            self.advance(state.global_step - self.done)
            self.done = state.global_step

        def on_log(self, _arguments: Any, state: Any, _control: Any, logs: Any, **_: Any) -> None:
            line = log_line(state.global_step, state.max_steps, logs)
            if line:
                reporter.say(line)

    bar = Bar()
    trainer.add_callback(bar)
    try:
        yield
    finally:
        bar.stack.close()


_SHOWN = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "reward": "reward",
    "rewards/margins": "margin",
    ENERGY: "masked energy",
    DRIFT: "sink drift",
}


def log_line(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """A log as one line for people; empty for logs without a loss."""
    parts = [
        f"{words} {float(logs[key]):.4g}"
        for key, words in _SHOWN.items()
        if key in logs and isinstance(logs[key], int | float | str)
    ]
    if not parts or not {"loss", "eval_loss"} & set(logs):
        return ""
    return f"Step {step} of {steps}: {', '.join(parts)}"


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the trainer writes its state last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and _complete(path / "trainer_state.json"):
            found.append((int(number), path))
    return max(found)[1] if found else None


def _complete(state: Path) -> bool:
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _write_start(folder: Path, start: Mapping[int, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({layer: value.cpu() for layer, value in start.items()}, folder / "sink_start.pt")


def _read_start(folder: Path) -> dict[int, torch.Tensor]:
    path = folder / "sink_start.pt"
    return torch.load(path, weights_only=True) if path.is_file() else {}


def training_versions() -> dict[str, str]:
    """Versions of the libraries that train."""
    found = {}
    for package in ("trl", "peft", "accelerate", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
