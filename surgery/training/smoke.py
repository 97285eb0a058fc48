"""A recipe made small: a cut of the demo model, a few rows made here, a few steps."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from surgery.files.safetensors_file import write_safetensors
from surgery.files.text import read_json, write_text
from surgery.files.weights import INDEX, SINGLE
from surgery.outputs.treatment import BLOCK
from surgery.patient.cache import cache_folder
from surgery.patient.source import resolve

LAYERS = 6
# In a cut of six layers nothing massive lasts; the demo model's early rise is at this layer.
EMERGENCE = 2
STEPS = 3

_THINGS = ("apples", "books", "chairs", "coins", "eggs", "lamps", "pears", "stones")
_TOPICS = ("bread", "rivers", "maps", "tea", "clocks", "snow", "bicycles", "bees")


def cut_demo(folder: Path, layers: int = LAYERS) -> Path:
    """The first layers of the demo model as a checkpoint of their own."""
    source = resolve("demo")
    folder.mkdir(parents=True, exist_ok=True)
    for name in source.side_files:
        if name != INDEX:
            shutil.copyfile(source.folder / name, folder / name)
    kept = {
        name: entry
        for name, entry in source.tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    shapes = {name: (entry.dtype, entry.shape) for name, entry in kept.items()}
    write_safetensors(folder / SINGLE, shapes, source.read_bytes, {"format": "pt"})
    config = read_json(folder / "config.json")
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    write_text(folder / "config.json", json.dumps(config))
    return folder


def smoke_rows(method: str) -> list[dict[str, Any]]:
    """Rows as the recipes' own data sets have them: GSM8K's for problems, chat for the rest."""
    if method == "grpo":
        return [
            {
                "question": f"Ann has {n} {thing} and gets {n + 3} more. How many has she now?",
                "answer": f"She has {n} + {n + 3} = {2 * n + 3} {thing}.\n#### {2 * n + 3}",
            }
            for n, thing in enumerate(_THINGS, 2)
        ]
    asked = [{"role": "user", "content": "Tell me one thing about {}."}]
    rows = []
    for topic in _TOPICS:
        prompt = [{**turn, "content": turn["content"].format(topic)} for turn in asked]
        good = [{"role": "assistant", "content": f"Many people know {topic} from home."}]
        bad = [{"role": "assistant", "content": "No."}]
        if method == "dpo":
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
        else:
            rows.append({"prompt": prompt, "completion": good})
    return rows


def _prepared(method: str) -> tuple[Path, Path]:
    """The cut and the rows, made once and kept beside other converted sources."""
    folder = cache_folder() / "smoke"
    model, data = folder / f"SmolLM2-{LAYERS}-layers", folder / f"{method}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not model.is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as part:
                os.rename(cut_demo(Path(part) / "cut"), model)
        lines = [json.dumps(row) for row in smoke_rows(method)]
        write_text(data, "\n".join(lines) + "\n")
    return model, data


def make_small(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe with model, data and lengths replaced, everything else as it is."""
    block = raw.get(BLOCK) or {}
    block = dict(block) if isinstance(block, Mapping) else {}
    method = str(block.get("method", "sft"))
    model, data = _prepared(method)
    dropped = {"dataset_name", "dataset_config", "dataset_test_split", "test_split_size"}
    dropped |= {
        "attn_implementation",
        "num_train_epochs",
        "model_revision",
        "max_completion_length",
    }
    keys = {key: value for key, value in raw.items() if key not in dropped}
    keys |= {
        "model_name_or_path": str(model),
        "datasets": [{"path": "json", "data_files": str(data)}],
        "dtype": "float32",
        "bf16": False,
        "packing": False,
        "max_steps": STEPS,
        "save_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "report_to": "none",
        "max_length": 64,
    }
    if method != "sft":
        keys.pop("packing")
    if method == "grpo":
        keys |= {"num_generations": 2, "max_completion_length": 8}
        keys["per_device_train_batch_size"] = 4  # of two prompts
        keys.pop("max_length")
        for key in ("generation_batch_size", "steps_per_generation"):
            keys.pop(key, None)
    # Such a stump of a model fails any gate.
    block |= {"layer": EMERGENCE, "force": True, "examples": None}
    block.pop("push", None)
    keys[BLOCK] = block
    return keys
