"""Recipes of tiny models and a few rows, for tests in which it does not matter what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from surgery.files.resources import resource_folder
from surgery.training.recipe import read_recipe
from surgery.training.smoke import make_small

_ROW = {"prompt": "The keeper counted 365 steps.", "completion": " Bread and coffee."}


def write_rows(path: Path, amount: int) -> Path:
    """Rows without turns, because the tokenizer of the tiny models has no chat template."""
    path.write_text("\n".join([json.dumps(_ROW)] * amount))
    return path


def least_recipe(path: Path, model: Path | str, block: dict[str, Any], **keys: Any) -> Path:
    """Two steps with a large learning rate; no key that is not needed."""
    raw = {
        "model_name_or_path": str(model),
        "datasets": [
            {"path": "json", "data_files": str(write_rows(path.parent / "rows.jsonl", 4))}
        ],
        "dtype": "float32",
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "lora_target_modules": "all-linear",
        **keys,
        "surgery": block,
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def shipped_recipe(
    path: Path, name: str, block: dict[str, Any], *, model: Path | None = None, **keys: Any
) -> Path:
    """A shipped recipe as `--smoke` makes it, with some keys changed.

    Args:
        path: The file to write.
        name: Of the recipe.
        block: Keys of its block `surgery` to change.
        model: Trained on plain rows instead of the cut of the demo model; a recipe for SFT only.
        **keys: Other keys to change.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if model is not None:
            rows = write_rows(path.parent / "rows.jsonl", 8)
            patch.setattr("surgery.training.smoke._prepared", lambda _method: (model, rows))
        raw = make_small(read_recipe(resource_folder("recipes") / f"{name}.yaml"))
    raw = {**raw, **keys, "surgery": {**raw["surgery"], **block}}
    path.write_text(yaml.safe_dump(raw))
    return path
