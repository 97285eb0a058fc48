"""How long a point of a sweep takes, against converting and evaluating that point by itself.

Both ways in turn, in one run: a sweep of the given rates, folds and selections under one loaded
model, and for some of its points what a user would do without it: `surgery convert` (without its
quality gate), then perplexity and KL of the written checkpoint against the base and the paper's
reference, as `surgery compare` finds them. Only the time of a point counts, not that of starting
Python: the separate way is measured in this process, after a first point that is not counted.

    python benchmarks/sweep.py --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import surgery

RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def swept(model: str, folder: Path, options: dict[str, Any]) -> tuple[float, float, list[Any]]:
    """Seconds and seconds of computing of a whole sweep, per point; its rows."""
    start, computed = time.perf_counter(), time.process_time()
    rows = surgery.sweep(model, output=folder, **options).rows
    seconds, cpu = time.perf_counter() - start, time.process_time() - computed
    return seconds / len(rows), cpu / len(rows), list(rows)


def separately(model: str, folder: Path, row: Any, layer: int, tokens: int) -> tuple[float, float]:
    """Seconds and seconds of computing of one point, written and evaluated."""
    point = row.point
    start, computed = time.perf_counter(), time.process_time()
    surgery.convert(
        model, output=folder, layer=layer, rate=point.rate, scope=point.scope, fold=point.fold,
        select=point.select, strength=point.strength, check=False, force=True,
    )  # fmt: skip
    found = surgery.compare(model, folder, check_tokens=tokens)
    seconds, cpu = time.perf_counter() - start, time.process_time() - computed
    measured = found.text[-1].perplexity
    assert abs(measured / row.figures["perplexity"] - 1) < 1e-3, (measured, row)
    return seconds, cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layer", type=int, default=11, help="the ME Layer, given to both ways")
    parser.add_argument("--scope", default="first", choices=["first", "all"])
    parser.add_argument("--check-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="points to convert separately")
    arguments = parser.parse_args()
    options = {
        "rates": RATES,
        "scopes": (arguments.scope,),
        "selects": ("weight",),
        "layer": arguments.layer,
        "check_tokens": arguments.check_tokens,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds, cpu, rows = swept(arguments.model, folder / "sweep", options)
        chosen = [rows[0], *rows[:: max(1, len(rows) // arguments.rounds)][: arguments.rounds]]
        each = [
            separately(
                arguments.model, folder / str(number), row, arguments.layer, arguments.check_tokens
            )
            for number, row in enumerate(chosen)
        ][1:]
    alone, alone_cpu = (statistics.median(column) for column in zip(*each, strict=True))
    print(f"{os.cpu_count()} cores, scope {arguments.scope}, {len(rows)} points")
    print("| | seconds per point | of computing |")
    print("| --- | --- | --- |")
    print(f"| sweep, loading included | {seconds:.2f} | {cpu:.2f} |")
    print(f"| convert and compare | {alone:.2f} | {alone_cpu:.2f} |")
    print(f"| ratio | {alone / seconds:.1f} | {alone_cpu / cpu:.1f} |")


if __name__ == "__main__":
    main()
