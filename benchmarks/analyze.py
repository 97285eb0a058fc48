"""How long locating takes, and how much it reads: the whole model against a stream of layers.

Makes checkpoints of each size whose massive activation emerges at each of the given layers, all
layers after it alike, and measures wall time, bytes read and peak memory, every time in a process
of its own, in one run. The full way depends on the size alone, so it runs once for each.

    python benchmarks/analyze.py --gigabytes 3 6 --layers 2 8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from planted import make

SHARD_BYTES = 500_000_000

ONE_RUN = """
import json, resource, sys, time
import surgery
start, computed = time.perf_counter(), time.process_time()
found = surgery.analyze(sys.argv[1], stream=sys.argv[2] == "stream", dtype=sys.argv[3])
streamed = found.streamed
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "cpu": time.process_time() - computed,
    "layer": found.emergence.layer,
    "layers_run": streamed.layers_run if streamed else found.anatomy.depth,
    "read": streamed.bytes_read if streamed else found.checkpoint.size,
    "size": found.checkpoint.size,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


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
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8], help="ME Layers to plant")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--stream-only", action="store_true", help="leave out the full load")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, analysis in {arguments.dtype}\n")
    print(
        "| checkpoint | ME Layer | way | layers run | seconds | of computing | read | peak memory |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    limits = []
    for gigabytes in arguments.gigabytes:
        for layer in arguments.layers:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
                folder = Path(temporary) / "model"
                # In a process of its own: children inherit the peak memory of their parent.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    layer_bytes = pool.submit(make, folder, gigabytes, layer, SHARD_BYTES).result()
                full = layer == arguments.layers[0] and not arguments.stream_only
                for way in ("stream", "full") if full else ("stream",):
                    result = run(folder, way, arguments.dtype)
                    assert result["layer"] == layer, result
                    print(
                        f"| {result['size'] / 1e9:.2f} GB | {layer} | {way} | "
                        f"{result['layers_run']} | {result['seconds']:.1f} | {result['cpu']:.1f} | "
                        f"{result['read'] / 1e9:.2f} GB | {result['peak'] / 2**20:.0f} MiB |",
                        flush=True,
                    )
                    if way == "stream":
                        limits.append((result["peak"], layer_bytes))
    peak, layer_bytes = max(limits)
    # What a layer takes where it runs, not on disk.
    factor = 2 if arguments.dtype == "float32" else 1
    print(
        f"\nstream: at most {peak / 2**20:.0f} MiB. One layer is {layer_bytes / 2**20:.0f} MiB "
        f"on disk and {factor * layer_bytes / 2**20:.0f} MiB in {arguments.dtype}; three and 500 "
        f"MiB are {3 * layer_bytes / 2**20 + 500:.0f} and "
        f"{3 * factor * layer_bytes / 2**20 + 500:.0f} MiB."
    )


if __name__ == "__main__":
    main()
