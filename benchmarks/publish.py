"""How much travels when a large Hub model is converted there: `convert --push-to-hub --remote`.

A sharded Llama on a loopback Hub server, its massive activation planted at layer 2; all layers
after the first few are holes in sparse files, which read as zeros and hand the residual stream on.
Norm fold, scope first, once with the layer given and once located on the way.

    python benchmarks/publish.py --gigabytes 30
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

EMERGENCE, MADE = 2, 4
SHARD_BYTES = 1_000_000_000
# Wanted: at most this share of the model, and one shard in either direction.
ALLOWED = 0.03


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint, holes and all; returns the bytes of its weights."""
    import tiny_models
    import torch

    from surgery.checkpoint import Origin, open_checkpoint

    seed = folder.with_name("seed")
    tiny_models.save(
        "llama",
        seed,
        layer=EMERGENCE,
        layers=MADE,
        dtype=torch.bfloat16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    source = open_checkpoint(seed, Origin("directory", "seed", "seed"))
    last = f"model.layers.{MADE - 1}."
    repeated = [name for name in source.tensors if name.startswith(last)]
    layer_bytes = sum(source.tensors[name].size for name in repeated)
    depth = MADE + round((gigabytes * 1e9 - source.size) / layer_bytes)
    folder.mkdir()
    for name in source.side_files:
        if name != "model.safetensors.index.json":
            (folder / name).write_bytes((seed / name).read_bytes())
    config = json.loads((seed / "config.json").read_text())
    config["num_hidden_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: (name, True) for name in source.tensors}
    for layer in range(MADE, depth):
        prefix = f"model.layers.{layer}."
        tensors |= {prefix + name[len(last) :]: (name, False) for name in repeated}
    shards: list[list[str]] = [[]]
    size = 0
    for name, (old, _) in tensors.items():
        if size > SHARD_BYTES:
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
            entry = source.tensors[tensors[name][0]]
            offsets = [position, position + entry.size]
            shape = list(entry.shape)
            header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": offsets}
            position = offsets[1]
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as written:
            written.write(struct.pack("<Q", len(raw)) + raw)
            for name in names:
                old, real = tensors[name]
                if real:
                    written.write(source.read_bytes(old))
                else:
                    written.seek(source.tensors[old].size, os.SEEK_CUR)
            written.truncate(8 + len(raw) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Measure and print."""
    from hub_server import HubServer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=30.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary) / "model"
        total = make(folder, arguments.gigabytes)
        changed = max(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{total / 1e9:.1f} GB of weights, shards of at most {changed / 1e9:.2f} GB\n")
        print("| layer | seconds | from the Hub | to the Hub | beyond one shard, of the model |")
        print("| --- | --- | --- | --- | --- |")
        with HubServer(Path(temporary) / "server") as server:
            server.add_repo("some/model", folder)
            for name, given in (("given", ["--layer", str(EMERGENCE)]), ("located", [])):
                env = {**os.environ, **server.env(), "HF_HOME": str(Path(temporary) / name)}
                sent, received = server.bytes_sent, server.bytes_received
                start = time.perf_counter()
                subprocess.run(
                    [
                        *(sys.executable, "-m", "surgery", "convert", "some/model", "--remote"),
                        *("--push-to-hub", f"me/{name}", "--quiet", *given),
                    ],
                    env=env,
                    check=True,
                )
                seconds = time.perf_counter() - start
                down, up = server.bytes_sent - sent, server.bytes_received - received
                beyond = (max(0, down - changed) + max(0, up - changed)) / total
                met = "met" if beyond <= ALLOWED else f"more than {ALLOWED:.0%}"
                print(
                    f"| {name} | {seconds:.0f} | {down / 1e9:.2f} GB | {up / 1e9:.2f} GB | "
                    f"{beyond:.1%} ({met}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
