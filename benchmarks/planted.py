"""A sharded Llama of any size whose massive activation emerges at a given layer.

The layers up to the one after the emergence are a tiny model's of the tests; those that follow are
copies of the last of them, or holes in sparse files, which read as zeros and hand the residual
stream on.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

_INDEX = "model.safetensors.index.json"


def make(
    folder: Path, gigabytes: float, layer: int, shard_bytes: int, *, holes: bool = False
) -> int:
    """Write the checkpoint; returns the bytes of one decoder layer."""
    import tiny_models
    import torch
    from transformers.utils import logging

    from surgery.files.checkpoint import Origin, open_checkpoint

    logging.disable_progress_bar()
    seed, made = folder.with_name("seed"), layer + 2
    tiny_models.save(
        "llama",
        seed,
        layer=layer,
        layers=made,
        dtype=torch.bfloat16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    source = open_checkpoint(seed, Origin("directory", "seed", "seed"))
    last = f"model.layers.{made - 1}."
    repeated = [name for name in source.tensors if name.startswith(last)]
    layer_bytes = sum(source.tensors[name].size for name in repeated)
    depth = made + round((gigabytes * 1e9 - source.size) / layer_bytes)
    folder.mkdir()
    for name in source.side_files:
        if name != _INDEX:
            shutil.copyfile(seed / name, folder / name)
    config = json.loads((seed / "config.json").read_text())
    config["num_hidden_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: name for name in source.tensors}
    for index in range(made, depth):
        tensors |= {f"model.layers.{index}." + name[len(last) :]: name for name in repeated}
    _write(folder, source, tensors, shard_bytes, holes)
    shutil.rmtree(seed)
    return layer_bytes


def _write(
    folder: Path, source: Any, tensors: dict[str, str], shard_bytes: int, holes: bool
) -> None:
    """Shards holding each tensor under its new name, with the bytes of the old one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, old in tensors.items():
        if size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += source.tensors[old].size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, position = {}, 0
        for name in names:
            entry = source.tensors[tensors[name]]
            offsets = [position, position + entry.size]
            shape = list(entry.shape)
            header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": offsets}
            position = offsets[1]
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as written:
            written.write(struct.pack("<Q", len(raw)) + raw)
            for name in names:
                old = tensors[name]
                if holes and name != old:
                    written.seek(source.tensors[old].size, os.SEEK_CUR)
                else:
                    written.write(source.read_bytes(old))
            written.truncate(8 + len(raw) + position)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
