"""Recipes: what is read from them, what is refused, and what data they train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import BadSettings
from surgery.files.resources import resource_folder
from surgery.outputs.treatment import Treatment
from surgery.training.data import conversation, final_answer, load_data, preference, problem
from surgery.training.recipe import Recipe, parse_recipe, read_recipe
from surgery.training.rewards import exact_answer

SHARED = Path(__file__).parents[3] / "shared" / "data"
RECIPES = sorted(path.stem for path in resource_folder("recipes").glob("*.yaml"))
LEAST: dict[str, Any] = {"model_name_or_path": "model", "dataset_name": "data"}


def parsed(tmp_path: Path, **keys: Any) -> Recipe:
    return parse_recipe({**LEAST, **keys}, "recipe.yaml", tmp_path)


# --------------------------------------------------------------------------------------------
# The recipes we ship
# --------------------------------------------------------------------------------------------


def test_all_recipes_are_there() -> None:
    assert RECIPES == [
        "dpo_safety",
        "grpo_math",
        "sft_baseline",
        "sft_gated_attention",
        "sft_instruction",
        "sft_math",
        "sft_safety",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_say_what_the_paper_says(name: str, tmp_path: Path) -> None:
    """The paper's batches, lengths, rate and scopes, and one seed for all."""
    path = resource_folder("recipes") / f"{name}.yaml"
    recipe = parse_recipe(read_recipe(path), path.name, tmp_path)
    arguments, treatment = recipe.arguments, recipe.treatment
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    paper = {"sft_instruction": 256, "sft_safety": 256, "dpo_safety": 8, "grpo_math": 256}
    assert batch == paper.get(name, 64)
    assert (treatment.rate, treatment.scope, treatment.tokens) == (0.1, "all", "first")
    assert treatment.fold_scope == ("all" if name == "sft_instruction" else "first")
    assert arguments.seed == 1
    assert recipe.model.lora_target_modules == "all-linear"
    if name == "grpo_math":
        assert arguments.max_completion_length == 256
    else:
        assert arguments.max_length == (1024 if name == "dpo_safety" else 4096)
    assert arguments.output_dir == str(tmp_path)


def test_the_baselines_differ_from_the_masked_recipe_in_the_block_alone() -> None:
    """Or the gain would be measured against something else."""
    folder = resource_folder("recipes")
    masked = read_recipe(folder / "sft_math.yaml")
    for name in ("sft_baseline", "sft_gated_attention"):
        baseline = read_recipe(folder / f"{name}.yaml")
        assert {**baseline, "surgery": None} == {**masked, "surgery": None}
        assert baseline["surgery"]["intervention"] != "wemask"


def test_accelerate_files_are_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    folder = resource_folder("recipes") / "accelerate"
    kinds = {
        path.stem: load_config_from_file(str(path)).distributed_type
        for path in folder.glob("*.yaml")
    }
    assert {name: str(kind).rpartition(".")[2] for name, kind in kinds.items()} == {
        "single": "NO",
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
    }


# --------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"learning_rat": 1}, "no key 'learning_rat'; did you mean 'learning_rate'"),
        ({"lora_alfa": 1}, "no key 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"surgery": {"fold_scop": "all"}}, "'fold_scop'; did you mean 'fold_scope'"),
        ({"surgery": {"fold": "nrom"}}, "fold must be one of norm, qkv, sink, none"),
        ({"surgery": {"method": "ppo"}}, "method must be one of sft, dpo, grpo"),
        ({"surgery": {"rate": "much"}}, "rate cannot be 'much'"),
        ({"surgery": {"rate": True}}, "rate cannot be True"),
        ({"surgery": {"rate": 1.5}}, "between 0 and 1"),
        ({"surgery": ["rate"]}, "no map"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"lr_scheduler_type": "up"}, "up is not a valid"),
        ({"output_dir": "x"}, "output in the block surgery"),
        ({"resume_from_checkpoint": "x"}, "resume with --resume"),
        ({"use_peft": False}, "only LoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"load_in_4bit": True}, "unquantised"),
        ({"load_in_8bit": "yes"}, "unquantised"),
        ({"hub_token": "hf_secret"}, "hub_token cannot be given: recipes are kept"),
        ({"seed": [1]}, "seed cannot be .1.: Input should be a valid integer"),
        ({"accelerator_config": "/dev/zero"}, "/dev/zero is not readable as JSON: it is no file"),
        ({"fsdp": "full_shard", "fsdp_config": 1}, "fsdp_config: 1 is not readable as JSON"),
        ({"dataset_streaming": 1}, "the rows are counted"),
        ({"lora_modules_to_save": 7}, "lora_modules_to_save cannot be 7"),
        ({"save_only_model": True}, "optimiser"),
        ({"lora_modules_to_save": ["input_layernorm"]}, "would train a norm"),
        ({"lora_modules_to_save": ["lm_head"]}, "cannot be merged and folded"),
        ({"use_vllm": True, "surgery": {"method": "grpo"}}, "vLLM runs no hooks"),
        ({"beta": 0.1}, "no key 'beta'"),  # which DPO has, SFT not
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"dataset_name": None}, "dataset_name or datasets"),
    ],
)
def test_what_is_refused(tmp_path: Path, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadSettings, match=sentence):
        parsed(tmp_path, **keys)


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    assert parsed(tmp_path, learning_rate="2e-5").arguments.learning_rate == 2e-5


def test_keys_are_kept_as_written(tmp_path: Path) -> None:
    keys = {"datasets": [{"path": "json", "data_files": "x.jsonl"}], "dataset_name": None}
    recipe = parsed(tmp_path, **keys)
    assert recipe.keys["datasets"] == keys["datasets"]
    assert json.loads(json.dumps(recipe.record()))["surgery"]["rate"] == 0.1
    assert set(recipe.record()["surgery"]) == {field.name for field in fields(Treatment)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "not valid YAML"),
        ("- a", "no map"),
        ("seed: 1\nseed: 2", "'seed' appears twice"),
        ("x: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("? [1, 2]\n: 3", "no"),
        ("seed: 0x" + "f" * 6000, "a number of 24000 bits is no setting"),
        (None, "cannot be read"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadSettings, match=sentence):
        read_recipe(path)


def test_one_sentence_at_the_terminal(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rat: 1\n")
    outcome = run("finetune", path, "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "did you mean 'learning_rate'" in outcome.sentence()
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [user("a"), assistant("b")]}, [user("a")], [assistant("b")]),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, [user("a")], [assistant("b")]),
        ({"inputs": "a", "targets": "b", "question": None}, [user("a")], [assistant("b")]),
        (
            {"question": "a", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
            [user("a")],
            [assistant("2+2 = 4\n#### 4")],
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b", "inputs": None},
            [{"role": "system", "content": "s"}, user("a")],
            [assistant("b")],
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            },
            [user("a"), assistant("b"), user("c")],
            [assistant("d")],
        ),
    ],
)
def test_conversations(row: dict[str, Any], prompt: list[Any], completion: list[Any]) -> None:
    assert conversation(row) == {"prompt": prompt, "completion": completion}


def test_other_rows() -> None:
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert preference(pair) == {
        "prompt": [user("a")],
        "chosen": [assistant("b")],
        "rejected": [assistant("c")],
    }
    row = {"question": "a", "answer": "it is\n#### 1,200"}
    assert problem(row) == {"prompt": [user("a")], "answer": "1200"}
    assert final_answer("12") == "12"
    for shape in (conversation, preference, problem):
        with pytest.raises(BadSettings, match="columns text"):
            shape({"text": "a"})
    with pytest.raises(BadSettings, match="transcript"):
        preference({"chosen": "hello", "rejected": "no"})


def test_data_of_different_columns_are_mixed(tmp_path: Path) -> None:
    """FLAN's and OpenOrca's columns in one training, and a random part of it."""
    flan, orca = tmp_path / "flan.jsonl", tmp_path / "orca.jsonl"
    flan.write_text("\n".join(json.dumps({"inputs": f"f{n}", "targets": "x"}) for n in range(5)))
    orca.write_text(
        "\n".join(
            json.dumps({"system_prompt": "", "question": f"o{n}", "response": "y"})
            for n in range(5)
        )
    )
    recipe = parsed(
        tmp_path,
        dataset_name=None,
        datasets=[{"path": "json", "data_files": str(path)} for path in (flan, orca)],
        surgery={"examples": 6},
    )
    rows, evaluation = load_data(recipe)
    assert evaluation is None
    assert len(rows) == 6
    asked = [row["prompt"][-1]["content"] for row in rows]
    assert len(set(asked)) == 6
    assert {text[0] for text in asked} == {"f", "o"}
    assert set(rows.column_names) == {"prompt", "completion"}


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("gsm8k_train.jsonl", "sft"),
        ("gsm8k_train.jsonl", "grpo"),
        ("hh_rlhf_dpo.jsonl", "dpo"),
        ("hh_rlhf_dpo.jsonl", "sft"),
        ("self_instruct_sft.jsonl", "sft"),
    ],
)
def test_real_rows(tmp_path: Path, file: str, method: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared data is not on this machine")
    recipe = parsed(
        tmp_path,
        dataset_name=None,
        datasets=[{"path": "json", "data_files": str(SHARED / file)}],
        test_split_size=0.1,
        eval_strategy="no" if method == "grpo" else "epoch",
        surgery={"method": method},
    )
    rows, evaluation = load_data(recipe)
    assert len(rows) > 150
    assert (evaluation is None) == (method == "grpo")
    for row in rows:
        assert row["prompt"][-1]["role"] == "user"


def test_missing_data_is_one_sentence(tmp_path: Path) -> None:
    recipe = parsed(
        tmp_path, dataset_name=None, datasets=[{"path": "json", "data_files": "/none.jsonl"}]
    )
    with pytest.raises(BadSettings, match="data cannot be loaded"):
        load_data(recipe)


# --------------------------------------------------------------------------------------------
# The reward
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("She has 72 clips.\n#### 72", "72", 1.0),
        ("She has 71 clips.", "72", 0.0),
        ("\\boxed{1{,}000}", "1000", 1.0),
        ("$\\frac{1}{2}$", "0.5", 1.0),
        ([{"role": "assistant", "content": "That makes 3.0 dollars"}], "3", 1.0),
        ("", "5", 0.0),
        ("I do not know.", "5", 0.0),
    ],
)
def test_exact_answer(completion: Any, answer: str, reward: float) -> None:
    assert exact_answer([completion], [answer], prompts=["q"]) == [reward]
