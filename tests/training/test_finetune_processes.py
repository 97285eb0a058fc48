"""Training that is killed, and training in two processes: the same weights as without either.

By default the process that dies is a fork, in the middle of a training of a tiny model; processes
of their own, and the cut of the demo model, are for full runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import script
import tiny_models
from hub_server import HubServer
from safetensors.numpy import load_file
from script import run_script
from small_recipes import least_recipe, shipped_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from crash_points import KILLED, in_child, interrupt, kill

from surgery.files.resources import resource_folder
from surgery.jobs.finetune import finetune
from surgery.reporter import Reporter
from surgery.training.trainer import last_checkpoint

RECIPES = resource_folder("recipes")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def recipe_file(path: Path, name: str = "sft_math", model: Path | None = None, **keys: Any) -> Path:
    """A small recipe whose adapter is all that is wanted; A[:, S] closed in all masked layers."""
    block = {"tokens": "every", "fold": "none", "save": "adapter"}
    keys = {"save_steps": 100, "learning_rate": 1e-2, **keys}
    return shipped_recipe(path, name, block, model=model, **keys)


def trained(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "training" / "adapter" / "adapter_model.safetensors")


def losses(output: Path) -> list[float]:
    record = json.loads((output / "training" / "record.json").read_text())
    return [row["loss"] for row in record["history"] if "loss" in row]


def launch(words: list[str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return script.start(sys.executable, "-m", *words, env=ENVIRONMENT, **pipes)


# --------------------------------------------------------------------------------------------
# Killed and resumed
# --------------------------------------------------------------------------------------------


def require_same(whole: Path, broken: Path) -> None:
    """The same adapter to the last bit, and the same losses at every step."""
    one, other = trained(whole), trained(broken)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name
    assert losses(whole) == losses(broken)


class AtStep(Reporter):
    """Does something once a step was taken and told, before anything of it is stored."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.begins, self.action = f"Step {step} ", action

    def say(self, message: str) -> None:
        if message.startswith(self.begins):
            self.action()


@pytest.fixture(scope="module")
def left_alone(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]
) -> tuple[Path, Path]:
    """A recipe for a tiny model, and what a training that nothing happens to writes."""
    folder = tmp_path_factory.mktemp("left-alone")
    recipe = recipe_file(
        folder / "r.yaml",
        model=tiny("llama", layer=2, layers=6),
        lora_dropout=0.1,
        save_steps=2,
        max_steps=4,
    )
    finetune(recipe, output=folder / "whole")
    return recipe, folder / "whole"


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_stopped_training_resumes_to_the_same_weights(
    left_alone: tuple[Path, Path],
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """Between two checkpoints; dropout, order of data, schedule and optimiser go on as if not."""
    (recipe, whole), broken = left_alone, tmp_path / "broken"
    if how == "killed":
        dying = AtStep(3, kill)
        assert in_child(lambda: finetune(recipe, output=broken, reporter=dying) and None) == KILLED
    else:
        with monkeypatch.context() as patch:
            stopping = AtStep(3, interrupt)
            patch.setattr("surgery.commands.terminal.Terminal.say", lambda _, m: stopping.say(m))
            stopped = run("finetune", recipe, "-o", broken)
        assert stopped.code == 130
        said = "Interrupted; go on from the last checkpoint with --resume."
        assert stopped.stderr.splitlines()[-1] == said
        assert [entry.name for entry in broken.iterdir()] == ["training"]
    checkpoints = broken / "training" / "checkpoints"
    reached = last_checkpoint(checkpoints)
    assert reached is not None
    assert reached.name == "checkpoint-2"
    assert not (broken / "adapter").exists()
    (checkpoints / "checkpoint-99").mkdir()  # begun when the process died
    begun = AtStep(1, lambda: pytest.fail("a step was taken again"))
    finetune(recipe, output=broken, resume=True, reporter=begun)
    require_same(whole, broken)


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
    require_same(whole, broken)


@pytest.mark.full
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Dropout, order of data, schedule and optimiser included: equal to the last bit."""
    recipe = recipe_file(tmp_path / "r.yaml", lora_dropout=0.1, save_steps=4, max_steps=7)
    kill_and_resume(tmp_path, recipe, 4)


@pytest.mark.full
def test_a_terminated_training_says_how_to_go_on(tmp_path: Path) -> None:
    """SIGTERM, as a queue sends it: one sentence; checkpoints stay, and nothing half-written."""
    recipe = recipe_file(tmp_path / "r.yaml", save_steps=1, max_steps=400)
    out = tmp_path / "out"
    process = launch(["surgery", "finetune", str(recipe), "-o", str(out), "-q"])
    while last_checkpoint(out / "training" / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert said.splitlines()[-1] == "Interrupted; go on from the last checkpoint with --resume."
    assert "Traceback" not in said
    assert [entry.name for entry in out.iterdir()] == ["training"]


@pytest.mark.full
def test_a_killed_preference_training_resumes(tmp_path: Path) -> None:
    recipe = recipe_file(
        tmp_path / "r.yaml", "dpo_safety", lora_dropout=0.1, save_steps=4, max_steps=7
    )
    kill_and_resume(tmp_path, recipe, 4)


@pytest.mark.full
def test_an_interrupted_reinforcement_training_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts are sampled, so the generators of random numbers go on where they stopped.

    Six layers never find an exact answer; here longer words are rewarded, so that there is
    something to learn.
    """
    recipe = recipe_file(
        tmp_path / "r.yaml", "grpo_math", lora_dropout=0.1, save_steps=3, max_steps=5
    )
    calls = []
    stop_at = 0

    def reward(completions: list[Any], **_columns: Any) -> list[float]:
        calls.append(completions)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return [len(turns[-1]["content"]) / 10 for turns in completions]

    monkeypatch.setattr("surgery.training.rewards.exact_answer", reward)
    finetune(recipe, output=tmp_path / "whole")
    whole = list(calls)
    calls.clear()
    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, output=tmp_path / "broken")
    stop_at = 0
    finetune(recipe, output=tmp_path / "broken", resume=True)
    assert calls[5:] == whole[3:]  # the same completions
    one, other = trained(tmp_path / "whole"), trained(tmp_path / "broken")
    assert any(np.abs(value).max() > 1e-3 for name, value in one.items() if "lora_B" in name)
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


# --------------------------------------------------------------------------------------------
# From the Hub and back
# --------------------------------------------------------------------------------------------


def head(hub: HubServer, repo: str) -> str:
    commit = hub.repo(repo).at("main")
    assert commit is not None
    return commit.sha


@pytest.mark.full
def test_adapters_name_the_model_they_belong_to(tmp_path: Path) -> None:
    """Trained from the Hub and pushed to it: the base, its commit, and all that was written."""
    source = tiny_models.save("qwen3", tmp_path / "Qwen3-4B", layer=6, layers=12)
    name = "Qwen/Qwen3-4B"
    block = {"fold": "norm", "save": "both", "force": True, "push": "me/trained"}
    norm = least_recipe(tmp_path / "norm.yaml", name, block, max_steps=1)
    block = {"fold": "none", "save": "adapter"}
    none = least_recipe(tmp_path / "none.yaml", name, block, max_steps=1)
    with HubServer(tmp_path / "server", token="hf_canary") as hub:
        hub.add_repo("Qwen/Qwen3-4B", source)
        env = {**hub.env(), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_canary"}
        configs = {}
        for recipe in (norm, none):
            out = tmp_path / recipe.stem
            done = run_script("finetune", str(recipe), "-o", str(out), env={**env, **ENVIRONMENT})
            assert done.returncode == 0, done.stderr
            assert "layer 6" in done.stdout
            configs[recipe.stem] = json.loads((out / "adapter" / "adapter_config.json").read_text())
        commit = head(hub, "me/trained-adapter-base")
        assert configs["norm"]["base_model_name_or_path"] == "me/trained-adapter-base"
        assert configs["norm"]["revision"] == commit
        assert configs["none"]["base_model_name_or_path"] == "Qwen/Qwen3-4B"
        assert configs["none"]["revision"] == head(hub, "Qwen/Qwen3-4B")
        for repo in ("me/trained", "me/trained-adapter", "me/trained-adapter-base"):
            assert hub.repo(repo).private
        served = json.loads(hub.files("me/trained-adapter")["adapter_config.json"].read_text())
        assert served == configs["norm"]
        assert "surgery.json" in hub.files("me/trained")
        card = (tmp_path / "norm" / "adapter" / "README.md").read_text()
        assert "me/trained-adapter-base" in card


# --------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------


@pytest.mark.full
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
