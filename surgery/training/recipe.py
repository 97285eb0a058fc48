"""Training recipes: TRL's YAML vocabulary, and one block of ours.

A recipe is a flat map of the fields of TRL's configurations (`SFTConfig`, `DPOConfig` or
`GRPOConfig`, `ModelConfig`, `ScriptArguments`, `DatasetMixtureConfig`), parsed by TRL itself, and a
block `surgery:` with the fields of `Treatment`. Without the block, `trl sft --config` reads it too.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from surgery.errors import BadSettings, SurgeryError
from surgery.files import plain_yaml
from surgery.files.paths import expanded
from surgery.files.text import read_json, read_text
from surgery.models.loading import quiet
from surgery.outputs.treatment import BLOCK, Treatment

# Fields that may name a file of JSON, which is read here: bounded, and from no device.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
# Fields that training sets itself, or that would break what the output promises, and why.
_REFUSED = {
    "output_dir": "the folder to write is output in the block surgery",
    "push_to_hub": "the repository to push to is push in the block surgery",
    "resume_from_checkpoint": "resume with --resume",
    "hub_token": "recipes are kept with the result; the token is taken from the environment",
}
_REFUSED_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("use_peft", False, "only LoRA is trained here, so that norms stay as they are"),
    ("use_dora", True, "DoRA's magnitudes cannot be merged and folded exactly"),
    ("load_in_4bit", True, "the merge needs the unquantised weights"),
    ("load_in_8bit", True, "the merge needs the unquantised weights"),
    ("save_only_model", True, "--resume needs the optimiser's state"),
    ("auto_find_batch_size", True, "a resumed run could not repeat the batches"),
    ("streaming", True, "the rows are counted"),
    ("dataset_streaming", True, "the rows are counted"),
)


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    keys: TRL's part, as written. treatment: our block. arguments: the configuration of the
    method's trainer; model, script, mixture: TRL's ModelConfig and dataset configurations.
    """

    name: str
    keys: Mapping[str, Any]
    treatment: Treatment
    arguments: Any
    model: Any
    script: Any
    mixture: Any

    def record(self) -> dict[str, Any]:
        """The recipe as data, for the card, the manifest and for telling a changed one."""
        block = {field.name: getattr(self.treatment, field.name) for field in fields(Treatment)}
        return {**self.keys, BLOCK: block}


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file; BadSettings where it is no plain YAML map."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise BadSettings(f"The recipe {path} cannot be read: {error}.") from error
    try:
        found = plain_yaml.load(text)
    except ValueError as error:
        raise BadSettings(f"The recipe {path} is not valid YAML: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise BadSettings(f"The recipe {path} is no map of keys to values.")
    return found


def parse_recipe(raw: Mapping[str, Any], name: str, output: Path) -> Recipe:
    """A recipe from its keys; checkpoints of training go below `output`.

    Raises BadSettings, naming the nearest key for an unknown one.
    """
    treatment = _treatment(raw.get(BLOCK), name)
    keys = copy.deepcopy({key: value for key, value in raw.items() if key != BLOCK})
    kinds = _kinds(treatment.method)
    known = {field.name for kind in kinds for field in fields(kind)}
    _require_known(keys, {*known, BLOCK}, name)
    for key, reason in _REFUSED.items():
        if key in keys:
            raise BadSettings(f"{name}: {key} cannot be given: {reason}.")
    typed = _typed(keys, kinds, name)
    for key, value, reason in _REFUSED_VALUES:
        if typed.get(key) is value:
            raise BadSettings(f"{name}: {key}: {str(value).lower()} is not possible: {reason}.")
    _refuse_trained_modules(typed, name)
    if treatment.masks and typed.get("use_vllm"):
        raise BadSettings(
            f"{name}: use_vllm is not possible under the mask: vLLM runs no hooks, so the rollouts "
            "would come from another model than the one that is trained."
        )
    plain = {key: typed[key] for key, value in keys.items() if isinstance(value, int | float)}
    given = {**copy.deepcopy(keys), **plain, "use_peft": True, "output_dir": str(output)}
    arguments, model, script, mixture = _parse(kinds, given, name)
    if model.model_name_or_path is None:
        raise BadSettings(f"{name}: model_name_or_path is missing.")
    if not mixture.datasets and not script.dataset_name:
        raise BadSettings(f"{name}: give dataset_name or datasets to train on.")
    return Recipe(name, keys, treatment, arguments, model, script, mixture)


def _treatment(block: Any, name: str) -> Treatment:
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise BadSettings(f"{name}: the block {BLOCK} is no map of keys to values.")
    _require_known(block, {field.name for field in fields(Treatment)}, f"{name}, block {BLOCK}")
    return Treatment(**block)


def _require_known(keys: Iterable[str], known: set[str], where: str) -> None:
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise BadSettings(f"{where}: there is no key {key!r}; did you mean {nearest!r}?")


def _typed(keys: Mapping[str, Any], kinds: tuple[Any, ...], name: str) -> dict[str, Any]:
    """The values as what TRL's fields say they are; BadSettings where one cannot be that."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    plain = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    hints = {key: hint for kind in kinds for key, hint in get_type_hints(kind).items()}
    typed = {}
    for key, value in keys.items():
        try:
            typed[key] = TypeAdapter(hints[key], config=plain).validate_python(value)
        except ValidationError as error:
            if isinstance(value, str):  # TRL reads words in its own way, as from a command line
                typed[key] = value
                continue
            reason = error.errors()[0]["msg"]
            raise BadSettings(f"{name}: {key} cannot be {value!r:.200}: {reason}.") from error
    return typed


def _refuse_trained_modules(keys: Mapping[str, Any], name: str) -> None:
    """Whole modules beside LoRA: norms would undo the fold, others cannot be merged as LoRA."""
    trained = keys.get("lora_modules_to_save") or []
    trained = [trained] if isinstance(trained, str) else trained
    norms = [module for module in trained if "norm" in module or module.startswith("ln_")]
    if norms:
        raise BadSettings(
            f"{name}: lora_modules_to_save: {norms[0]} would train a norm, and with it the zeros "
            "that the fold puts there; leave it out."
        )
    for key in ("lora_modules_to_save", "lora_target_parameters"):
        if keys.get(key):
            raise BadSettings(f"{name}: {key} cannot be merged and folded; use LoRA on linears.")


def _kinds(method: str) -> tuple[Any, ...]:
    try:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl
    except ImportError as error:
        raise SurgeryError(
            "Training needs further packages, or newer ones: pip install 'wemask-surgery[train]' "
            f"({in_a_line(error)})."
        ) from error
    configs = {"sft": "SFTConfig", "dpo": "DPOConfig", "grpo": "GRPOConfig"}
    return (
        getattr(trl, configs[method]),
        trl.ModelConfig,
        trl.ScriptArguments,
        trl.DatasetMixtureConfig,
    )


def _parse(kinds: tuple[Any, ...], keys: dict[str, Any], name: str) -> tuple[Any, ...]:
    from trl import TrlParser

    class Parser(TrlParser):
        """Says what is wrong in one sentence instead of printing its usage."""

        def error(self, message: str) -> Any:
            raise BadSettings(f"{name}: {message}.")

    import torch

    if not torch.accelerator.is_available():
        keys = {"use_cpu": True, "dataloader_pin_memory": False, **keys}
    # Every LoRA weight takes part in every pass, which distributed training need not check.
    keys = {"ddp_find_unused_parameters": False, **keys}
    for key in _FILES:
        value = keys.get(key)
        if value is not None and not isinstance(value, dict) and not str(value).startswith("{"):
            try:
                keys[key] = read_json(expanded(str(value)))  # a number is no open file's either
            except SurgeryError as error:
                raise BadSettings(f"{name}: {key}: {error}") from error
    parser = Parser(kinds)
    parser.set_defaults_with_config(**keys)
    try:
        with quiet():
            return tuple(parser.parse_args_into_dataclasses(args=[]))
    except SurgeryError:
        raise
    except Exception as error:  # some value that another program's checks did not expect
        raise BadSettings(f"{name}: {in_a_line(error)}") from error


def in_a_line(error: Exception) -> str:
    """What a library said, short enough to print."""
    text = " ".join(str(error).split())
    known = isinstance(error, ValueError | ImportError | NotImplementedError)
    return (text if known and text else repr(error))[:1000]
