"""A whole checked conversion: time and memory, layer by layer and loaded, against a yardstick.

Makes checkpoints of each size whose massive activation emerges at layer 6, all layers after it
alike, and converts each with every check, in a process of its own. The yardstick is what stock
transformers takes to load the same model in float32 and compute the perplexity of 4,096 tokens.
Sizes from `--sparse` on are files with holes, and run layer by layer alone.

    python benchmarks/convert_checked.py --gigabytes 3 8
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from planted import make
from processes import Run, run

LAYER = 6
SHARD_BYTES = 500_000_000
SURGERY = [sys.executable, "-m", "surgery", "convert"]
YARDSTICK = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(5, 250, (16, 256), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids]
print(torch.stack(losses).mean().exp())
"""


def converted(folder: Path, output: Path, fold: str, scope: str, *words: str) -> Run:
    """One checked conversion; `--force`, because an untrained model's figures mean nothing."""
    options = ["--fold", fold, "--scope", scope, "--output", str(output), "--overwrite", "--force"]
    return run([*SURGERY, str(folder), *options, "--quiet", *words])


def row(*cells: object) -> None:
    """Print a line of the table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[3.0])
    parser.add_argument("--sparse", type=float, default=32.0, help="sizes that are mostly holes")
    parser.add_argument("--loaded-up-to", type=float, default=4.0, help="sizes that are loaded too")
    parser.add_argument("--no-sink", action="store_true", help="leave out the sink fold")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores\n")
    row("checkpoint", "what", "seconds", "against the yardstick", "peak memory", "others' cores")
    row(*["---"] * 6)
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder, output = Path(temporary) / "model", Path(temporary) / "out"
            holes = gigabytes >= arguments.sparse
            # In a process of its own: children inherit the peak memory of their parent.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                made = pool.submit(make, folder, gigabytes, LAYER, SHARD_BYTES, holes=holes)
                layer_bytes = made.result()
            small = gigabytes <= arguments.loaded_up_to
            whole = run([sys.executable, "-c", YARDSTICK, str(folder)]) if small else None
            kinds = [("norm", "first")]
            if not (holes or arguments.no_sink):
                kinds.append(("sink", "all"))
            ways = ("--stream", "--load") if small else ("--stream",)
            name = f"{gigabytes:g} GB, layers of {2 * layer_bytes / 2**20:.0f} MiB in float32"
            if whole is not None:
                peak = f"{whole.peak / 2**20:.0f} MiB"
                row(name, "yardstick", f"{whole.seconds:.0f}", 1, peak, f"{whole.others:.1f}")
            for fold, scope in kinds:
                for way in ways:
                    done = converted(folder, output, fold, scope, way)
                    ratio = f"{done.seconds / whole.seconds:.2f}" if whole else ""
                    peak = f"{done.peak / 2**20:.0f} MiB"
                    what = f"{fold} {scope} {way}"
                    row(name, what, f"{done.seconds:.0f}", ratio, peak, f"{done.others:.1f}")


if __name__ == "__main__":
    main()
