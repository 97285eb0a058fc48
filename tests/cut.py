"""A few layers of the demo model: real weights and a real tokenizer, at a sixth of the time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import surgery

# The first layers of SmolLM2-135M-Instruct. Its massive activation emerges at layer 11, which no
# cut of six layers keeps alive, so conversions of the cut name their layer.
KEPT = (0, 1, 2, 3, 4, 5)
LAYER = 2


def six_layer_cut(folder: Path, kept: tuple[int, ...] = KEPT) -> Path:
    """Write a checkpoint of these layers of the demo model."""
    source = surgery.resolve("demo").folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, folder / file.name)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            head = ".".join(name.split(".")[:3]) + "."
            if not name.startswith("model.layers."):
                tensors[name] = tensor
            elif head in place:
                tensors[place[head] + name[len(head) :]] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = len(kept)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in kept]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
