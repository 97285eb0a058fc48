"""Training that is killed, and training in two processes: the same weights as without either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from surgery.finetuning import finetune
from surgery.recipe import read_recipe
from surgery.resources import resource_folder
from surgery.smoke import make_small
from surgery.training import last_checkpoint

RECIPES = resource_folder("recipes")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def recipe_file(path: Path, name: str = "sft_math", **keys: Any) -> Path:
    """A small recipe whose adapter is all that is wanted; A[:, S] closed in all masked layers."""
    raw = make_small(read_recipe(RECIPES / f"{name}.yaml"))
    raw |= {"save_steps": 100, "learning_rate": 1e-2, **keys}
    raw["surgery"] |= {"tokens": "every", "fold": "none", "save": "adapter"}
    path.write_text(yaml.safe_dump(raw))
    return path


def trained(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "training" / "adapter" / "adapter_model.safetensors")


def losses(output: Path) -> list[float]:
    record = json.loads((output / "training" / "record.json").read_text())
    return [row["loss"] for row in record["history"] if "loss" in row]


def launch(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# --------------------------------------------------------------------------------------------
# Killed and resumed
# --------------------------------------------------------------------------------------------


def kill_and_resume(tmp_path: Path, recipe: Path, kill_after: int) -> None:
    """SIGKILL once a checkpoint is complete, then --resume; compare with a run left alone."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = launch(["surgery", "finetune", str(recipe), "-o", str(broken)])
    checkpoints = broken / "training" / "checkpoints"
    finetune(recipe, output=whole)  # meanwhile
    deadline = time.monotonic() + 240
    while last_checkpoint(checkpoints) is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, said
    reached = last_checkpoint(checkpoints)
    assert reached is not None
    assert reached.name == f"checkpoint-{kill_after}"
    assert not (broken / "adapter").exists()
    # What a kill in the middle of a checkpoint leaves: it must not be resumed from.
    (checkpoints / "checkpoint-99").mkdir()
    finetune(recipe, output=broken, resume=True)
    one, other = trained(whole), trained(broken)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name
    assert losses(whole) == losses(broken)


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Dropout, order of data, schedule and optimiser included: equal to the last bit."""
    recipe = recipe_file(tmp_path / "r.yaml", lora_dropout=0.1, save_steps=4, max_steps=7)
    kill_and_resume(tmp_path, recipe, 4)


@pytest.mark.full
@pytest.mark.parametrize("name", ["dpo_safety", "grpo_math"])
def test_a_killed_preference_or_reinforcement_training_resumes(tmp_path: Path, name: str) -> None:
    recipe = recipe_file(tmp_path / "r.yaml", name, lora_dropout=0.1, save_steps=4, max_steps=7)
    kill_and_resume(tmp_path, recipe, 4)


# --------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """`accelerate launch -m surgery finetune` with the shipped DDP and FSDP2 files (gloo)."""
    one = recipe_file(tmp_path / "one.yaml", lora_dropout=0.0, per_device_train_batch_size=4)
    two = recipe_file(tmp_path / "two.yaml", lora_dropout=0.0, per_device_train_batch_size=2)
    port = 29500 + os.getpid() % 1000
    said = {}
    for kind in ("ddp", "fsdp2"):
        words = ["accelerate.commands.launch", "--config_file", f"{RECIPES}/accelerate/{kind}.yaml"]
        words += ["--num_processes", "2", "--mixed_precision", "no"]
        words += ["--main_process_port", str(port)]
        words += ["-m", "surgery", "finetune", str(two), "-o", str(tmp_path / kind)]
        process = launch(words)
        if kind == "ddp":
            finetune(one, output=tmp_path / "single")
        said[kind] = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said[kind]
        port += 1
    expected = trained(tmp_path / "single")
    assert max(np.abs(expected[name]).max() for name in expected if "lora_B" in name) > 1e-2
    masks = json.loads((tmp_path / "single" / "training" / "masks.json").read_text())
    for kind in ("ddp", "fsdp2"):
        found = trained(tmp_path / kind)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() < 1e-3, (kind, name)
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "single"), rel=1e-4)
        for layer, chosen in masks[0]["dimensions"].items():
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
            assert not found[name][:, chosen].any()
        record = json.loads((tmp_path / kind / "training" / "record.json").read_text())
        assert record["processes"] == 2
        assert record["verification"]["passed"]
        # One process speaks for both.
        assert said[kind].count("Step 3 of 3") == 1
