"""How long locating takes, and how much it reads: the whole model against a stream of layers.

Makes checkpoints whose massive activation emerges early (layer 2), all layers after it alike, and
measures wall time, bytes read and peak memory of each way in a process of its own, in one run.

    python benchmarks/analyze.py --gigabytes 3 6
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

EMERGENCE, MADE = 2, 4
SHARD_BYTES = 500_000_000

ONE_RUN = """
import json, resource, sys, time
import surgery
start = time.perf_counter()
found = surgery.analyze(sys.argv[1], stream=sys.argv[2] == "stream", dtype=sys.argv[3])
streamed = found.streamed
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "layer": found.emergence.layer,
    "layers_run": streamed.layers_run if streamed else found.anatomy.depth,
    "read": streamed.bytes_read if streamed else found.checkpoint.size,
    "size": found.checkpoint.size,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


def make(folder: Path, gigabytes: float) -> int:
    """A planted Llama of about that size; returns the bytes of one decoder layer."""
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
            shutil.copyfile(seed / name, folder / name)
    config = json.loads((seed / "config.json").read_text())
    config["num_hidden_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: name for name in source.tensors}
    for layer in range(MADE, depth):
        tensors |= {f"model.layers.{layer}." + name[len(last) :]: name for name in repeated}
    _write(folder, source, tensors)
    shutil.rmtree(seed)
    return layer_bytes


def _write(folder: Path, source, tensors: dict[str, str]) -> None:
    """Shards holding each tensor under its new name, with the bytes of the old one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, old in tensors.items():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += source.tensors[old].size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name in names:
            entry = source.tensors[tensors[name]]
            offsets = [position, position + entry.size]
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
            position = offsets[1]
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as written:
            written.write(struct.pack("<Q", len(raw)) + raw)
            for name in names:
                written.write(source.read_bytes(tensors[name]))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(folder: Path, way: str, dtype: str) -> dict[str, float]:
    """One analysis in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_RUN, str(folder), way, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[3.0, 6.0])
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, analysis in {arguments.dtype}")
    print("| checkpoint | way | layers run | seconds | read | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary) / "model"
            layer_bytes = make(folder, gigabytes)
            results = {way: run(folder, way, arguments.dtype) for way in ("stream", "full")}
        for way, result in results.items():
            assert result["layer"] == EMERGENCE, result
            print(
                f"| {result['size'] / 1e9:.2f} GB | {way} | {result['layers_run']} | "
                f"{result['seconds']:.1f} | {result['read'] / 1e9:.2f} GB "
                f"({result['read'] / result['size']:.0%}) | {result['peak'] / 2**20:.0f} MiB |"
            )
        limit = 3 * layer_bytes + 500 * 2**20
        peak = results["stream"]["peak"]
        met = "met" if peak <= limit else "NOT met"
        print(
            f"\nstream: {results['full']['seconds'] / results['stream']['seconds']:.1f} times "
            f"faster; peak memory {peak / 2**20:.0f} MiB of {limit / 2**20:.0f} MiB allowed "
            f"(three layers of {layer_bytes / 2**20:.0f} MiB plus 500 MiB): {met}\n"
        )


if __name__ == "__main__":
    main()
