"""How much travels when a large Hub model is converted there: `convert --push-to-hub --remote`.

A sharded Llama on a loopback Hub server, its massive activation planted at layer 2; all layers
after the first few are holes in sparse files. Norm fold, scope first, once with the layer given and
once located on the way.

    python benchmarks/publish.py --gigabytes 30
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted import make

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

EMERGENCE = 2
SHARD_BYTES = 1_000_000_000
# Wanted: at most this share of the model, and one shard in either direction.
ALLOWED = 0.03


def main() -> None:
    """Measure and print."""
    from hub_server import HubServer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=30.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary) / "model"
        make(folder, arguments.gigabytes, EMERGENCE, SHARD_BYTES, holes=True)
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        total, changed = sum(sizes), max(sizes)
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
