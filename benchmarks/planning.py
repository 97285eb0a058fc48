"""How long planning takes for 10,000 tensors and for 500 shards: python benchmarks/planning.py"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_load import many

REPEATS = 3


def main() -> None:
    """The whole command with --dry-run, best of three, against `surgery --version`."""
    with tempfile.TemporaryDirectory() as folder:
        start = best([sys.executable, "-m", "surgery", "--version"])
        print(f"surgery --version {start:25.2f} s")
        for shards, each in ((1, 10_000), (500, 20)):
            source = many(Path(folder) / str(shards), shards, each)
            words = ["convert", str(source), "--layer", "1", "--no-check", "--dry-run", "-q"]
            seconds = best([sys.executable, "-m", "surgery", *words])
            print(f"{shards * each:,} tensors in {shards:3} shards {seconds:14.2f} s")


def best(words: list[str]) -> float:
    """The shortest of several runs."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    main()
