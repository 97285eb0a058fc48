"""LoRA under a fold: what it must not read, its merge into stored weights, and its adapter files.

A is [rank, in], B [out, rank]; the update of a linear W, [out, in], is scale · B A.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files import dtypes
from surgery.files.checkpoint import Checkpoint
from surgery.files.staging import write_whole
from surgery.files.text import read_json
from surgery.folds.edits import SinkDirection
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."

Array32 = NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    """One linear's update. module: its path in the model. transposed: W is stored [in, out]."""

    module: str
    down: Array32
    up: Array32
    scale: float
    transposed: bool = False

    def delta(self) -> Array32:
        """scale · B A in float32, as W is stored."""
        product = np.float32(self.scale) * (self.up @ self.down)
        return product.T if self.transposed else product


# ---------------------------------------------------------------------------------------------
# While training
# ---------------------------------------------------------------------------------------------


def closed_inputs(
    anatomy: Anatomy, mask: Mask, zeroed: Sequence[int], tokens: str
) -> dict[str, tuple[int, ...]]:
    """The input dimensions that A must not read, by module path of a reader.

    S in the layers `zeroed`, whose input the fold will zero for every token: merged, A[:, S] would
    write the zeroed columns again, or keep its random start in columns that nothing trained. The
    same where every token is masked in training but no fold follows.
    """
    closed: dict[str, tuple[int, ...]] = {}
    for layer in mask.layers:
        if tokens == "every" or layer in zeroed:
            for reader in anatomy.at(layer).readers:
                closed[reader] = mask.dimensions[layer]
    return closed


@contextmanager
def closed(model: Any, inputs: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Keep A[:, S] at zero for the time of the block: zeroed now, and without gradient.

    model: a PEFT model that is not sharded yet. The branch's own input is zeroed in S, so the
    gradient of A is zero there under any wrapper, and no optimiser moves a zero without gradient,
    not even by weight decay.
    """
    handles = []
    base = model.get_base_model()
    for module, chosen in inputs.items():
        layer = base.get_submodule(module)
        for branch in getattr(layer, "lora_A", {}).values():
            with torch.no_grad():
                branch.weight[:, list(chosen)] = 0.0
            handles.append(branch.register_forward_pre_hook(_without(chosen)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(chosen: tuple[int, ...]) -> Callable[[Any, tuple], tuple]:
    factors: dict[tuple[Any, torch.dtype], torch.Tensor] = {}

    def hook(_module: Any, args: tuple) -> tuple:
        states = args[0]
        factor = factors.get((states.device, states.dtype))
        if factor is None:
            with torch.inference_mode(False):
                factor = torch.ones(states.shape[-1], device=states.device, dtype=states.dtype)
                factor[list(chosen)] = 0.0
            factors[(states.device, states.dtype)] = factor
        return (states * factor, *args[1:])

    return hook


# ---------------------------------------------------------------------------------------------
# Afterwards
# ---------------------------------------------------------------------------------------------


def read_adapter(folder: Path, transposed: Callable[[str], bool]) -> dict[str, LowRank]:
    """The updates in an adapter's files, by module path.

    transposed: whether a module stores its weight [in, out]. Raises Unsupported for anything that
    is not plain LoRA on linears.
    """
    from safetensors.numpy import load_file

    config = read_json(folder / CONFIG)
    tensors = load_file(folder / ADAPTER)
    found: dict[str, LowRank] = {}
    for name, down in tensors.items():
        module, kind = _split(name)
        if kind == "lora_B.weight":
            continue
        up = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
        if kind != "lora_A.weight" or up is None or down.ndim != 2:
            raise Unsupported(f"The adapter holds {name}, which is no LoRA of a linear.")
        rank = down.shape[0]
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        root = rank**0.5 if config.get("use_rslora") else rank
        found[module] = LowRank(
            module,
            down.astype(np.float32),
            up.astype(np.float32),
            alpha / root,
            transposed(module),
        )
    return found


def _split(name: str) -> tuple[str, str]:
    path, _, last = name.removeprefix(_PREFIX).rpartition(".")
    module, _, kind = path.rpartition(".")
    return module, f"{kind}.{last}"


def write_merged(
    checkpoint: Checkpoint,
    updates: Mapping[str, LowRank],
    stored: Callable[[str], str],
    folder: Path,
) -> list[str]:
    """A copy of a checkpoint with the updates added in float32 and rounded once.

    stored: the checkpoint's name of a parameter. Returns the names of the tensors that changed;
    every other byte is the source's.
    """
    for name in (*checkpoint.weight_files, *checkpoint.side_files):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, target)
    changed = []
    for module, update in updates.items():
        name = stored(f"{module}.weight")
        entry = checkpoint.tensors[name]
        before = checkpoint.read(name).astype(np.float32)
        delta = update.delta()
        if before.shape != delta.shape:
            raise BadCheckpoint(f"{name} has shape {before.shape}, its update {delta.shape}.")
        after = dtypes.round_once((before + delta).astype(np.float64), entry.dtype)
        if not dtypes.all_finite(after):
            raise BadCheckpoint(f"Training made {name} hold values that are not finite.")
        with open(folder / entry.file, "r+b") as file:
            file.seek(entry.begin)
            file.write(np.ascontiguousarray(after).tobytes())
        changed.append(name)
    return sorted(changed)


def with_sinks(
    updates: Mapping[str, LowRank],
    anatomy: Anatomy,
    mask: Mask,
    sinks: Mapping[int, SinkDirection],
    merged: Callable[[str], NDArray],
) -> dict[str, LowRank]:
    """Updates and sink fold as one adapter of the untouched base: one rank more per reader.

    The fold subtracts γ (W (m ⊙ c)) vᵀ, W merged: A gains the row v, B the column −γ W (m ⊙ c).
    merged: the merged weight of a module, as stored.
    """
    result = dict(updates)
    for layer in mask.layers:
        chosen = list(mask.dimensions[layer])
        sink = sinks[layer]
        for reader in anatomy.at(layer).readers:
            transposed = anatomy.input_axis == 0
            weight = merged(reader).astype(np.float64)
            weight = weight.T if transposed else weight
            column = -mask.strength * (weight[:, chosen] @ sink.center.astype(np.float64))
            down = sink.detector.astype(np.float32)[None]
            up = column.astype(np.float32)[:, None]
            known = updates.get(reader)
            if known is not None:
                down = np.concatenate([known.down, down])
                up = np.concatenate([np.float32(known.scale) * known.up, up], axis=1)
            result[reader] = LowRank(reader, down, up, 1.0, transposed)
    return result


def write_adapter(
    folder: Path, updates: Mapping[str, LowRank], base: str, revision: str | None
) -> None:
    """A PEFT adapter of these updates; scales other than 1 are multiplied into B."""
    from peft import LoraConfig
    from safetensors.numpy import save_file

    ranks = {module: update.down.shape[0] for module, update in updates.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(updates),
        inference_mode=True,
        fan_in_fan_out=any(update.transposed for update in updates.values()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    name_base(folder, base, revision)
    tensors = {}
    for module, update in updates.items():
        plain = replace(update, up=np.float32(update.scale) * update.up)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(plain.down)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(plain.up)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


def name_base(folder: Path, base: str, revision: str | None) -> None:
    """Have an adapter's configuration name the model it really belongs to."""
    config = read_json(folder / CONFIG)
    config |= {"base_model_name_or_path": base, "revision": revision}
    if isinstance(config.get("target_modules"), list):  # a set to PEFT, in another order each time
        config["target_modules"].sort()
    write_whole(folder / CONFIG, f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
