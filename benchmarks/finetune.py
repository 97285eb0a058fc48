"""What training under the mask gains: recipes/sft_math.yaml against recipes/sft_baseline.yaml.

    python benchmarks/finetune.py DATA --model demo --output gain

DATA: a folder with train.jsonl and test.jsonl of GSM8K's columns. Both trainings have the same
model, data, order and seed; the baseline lacks the mask. Prints held-out losses as a Markdown table
and leaves both checkpoints for `surgery compare MODEL gain/sft_baseline/model gain/sft_math/model`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from surgery.commands.terminal import Terminal
from surgery.files.resources import resource_folder
from surgery.jobs.finetune import FineTuning, finetune
from surgery.training.recipe import read_recipe

RECIPES = ("sft_baseline", "sft_math")


def recipe_for(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A shipped recipe on this data, at a size that a CPU can bear."""
    raw = read_recipe(resource_folder("recipes") / f"{name}.yaml")
    raw.pop("dataset_config")
    return {
        **raw,
        "model_name_or_path": options.model,
        "dataset_name": str(options.data.resolve()),
        "dtype": "float32",
        "bf16": False,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": options.steps,
        "max_length": options.length,
        "eval_steps": max(1, options.steps // 4),
        "save_steps": max(1, options.steps // 4),
        "seed": options.seed,
        "report_to": "none",
    }


def losses(result: FineTuning, key: str) -> dict[int, float]:
    """A loss by step."""
    return {int(row["step"]): float(row[key]) for row in result.trained.history if key in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--output", type=Path, default=Path("gain"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    held_out = {}
    for name in RECIPES:
        path = options.output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe_for(name, options)), encoding="utf-8")
        output = options.output / name
        begun = (output / "training" / "recipe.json").is_file()
        result = finetune(path, output=output, resume=options.resume and begun, reporter=Terminal())
        if result is not None:
            held_out[name] = losses(result, "eval_loss")
    if not held_out:
        return
    print("| step | " + " | ".join(f"held-out loss, {name}" for name in held_out) + " |")
    print("| --- |" + " --- |" * len(held_out))
    for step in sorted(held_out[RECIPES[0]]):
        print(f"| {step} | " + " | ".join(f"{part[step]:.4f}" for part in held_out.values()) + " |")


if __name__ == "__main__":
    main()
