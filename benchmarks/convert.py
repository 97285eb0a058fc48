"""How fast `surgery convert` is against copying, hashing, and loading with transformers.

Everything is measured in one run, in turns, on a checkpoint made for the purpose; see README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from processes import Run, run, timed, wait_for_idle

HERE = Path(__file__).resolve().parent
LAYER = 1
GAIN = f"model.layers.{LAYER + 1}.input_layernorm.weight"
BUFFER = 1024 * 1024
HELP_REPEATS = 5

COPY, SYNCED, HAND, SURGERY, HASH = "a", "a'", "b", "c", "d"
LABELS = {
    COPY: "cp -r",
    SYNCED: "cp -r, then sync OUT/* OUT",
    HAND: "transformers: load, edit, save",
    SURGERY: "surgery convert --no-check",
    HASH: "sha256 (this process, 1 thread)",
}


@dataclass(frozen=True)
class Target:
    """A figure that must stay below a limit; `typical` is the same figure from the medians."""

    name: str
    figure: float
    limit: float
    unit: str
    typical: float | None = None
    typical_limit: float | None = None

    @property
    def met(self) -> bool:
        return self.figure <= self.limit

    def __str__(self) -> str:
        text = f"{self.name}: {self.figure:.2f} of {self.limit:.2f} {self.unit}"
        if self.typical is not None and self.typical_limit is not None:
            text += f" (medians: {self.typical:.2f} of {self.typical_limit:.2f})"
        return f"{'met   ' if self.met else 'MISSED'}  {text}"


def read(folder: Path, use: Callable[[memoryview], object]) -> None:
    """Every byte of a folder, a buffer at a time."""
    buffer = memoryview(bytearray(BUFFER))
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                use(buffer[:count])


class Bench:
    """The contenders over one checkpoint. patience: seconds to wait for an idle machine."""

    def __init__(self, source: Path, surgery: str, patience: float) -> None:
        self.source, self.output, self.patience = source, source.parent / "output", patience
        layer, here, there = str(LAYER), str(self.source), str(self.output)
        by_hand = [sys.executable, str(HERE / "by_transformers.py")]
        convert = [surgery, "convert", here, "--layer", layer, "--no-check", "--quiet"]
        synced = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
        self.commands = {
            COPY: ["cp", "-r", here, there],
            SYNCED: ["sh", "-c", synced, "sh", here, there],
            HAND: [*by_hand, here, layer, there],
            SURGERY: [*convert, "-o", there],
        }

    def measure(self, contender: str) -> Run:
        """One run with a fresh output, which is removed afterwards.

        All start alike: earlier writes are on disk and the source is in the page cache.
        """
        os.sync()
        wait_for_idle(self.patience)
        read(self.source, lambda _bytes: None)
        try:
            if contender == HASH:
                digest = hashlib.sha256()
                return timed(lambda: read(self.source, digest.update))
            return run(self.commands[contender])
        finally:
            shutil.rmtree(self.output, ignore_errors=True)

    def require_same_edit(self) -> None:
        """Stop unless (b) and (c) write the same gain: else they are not worth comparing."""
        gains = []
        for contender in (HAND, SURGERY):
            run(self.commands[contender])
            gains.append(tensor(self.output, GAIN))
            shutil.rmtree(self.output)
        if gains[0] != gains[1] or gains[0] == tensor(self.source, GAIN):
            raise SystemExit("surgery and transformers do not write the same edit.")


def tensor(folder: Path, name: str) -> bytes:
    """The stored bytes of one tensor, from whichever safetensors file has it."""
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(length)).get(name)
            if entry is not None:
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                return file.read(end - begin)
    raise SystemExit(f"{folder} has no tensor {name}.")


def make_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """A checkpoint, made by another process (which needs numpy); its bytes."""
    free = shutil.disk_usage(folder.parent).free
    if free < 2.1e9 * gigabytes:
        raise SystemExit(f"{folder.parent} needs {2.1 * gigabytes:.1f} GB free.")
    maker = [sys.executable, str(HERE / "big_checkpoint.py"), str(folder)]
    run([*maker, "--gigabytes", str(gigabytes), "--shards", str(shards)])
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """A new folder inside the one given, or the system's for temporary files; removed in the end.

    The folder decides which disk is measured.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="surgery-benchmark-", dir=folder) as name:
        yield Path(name)


def note(message: str) -> None:
    """Progress, beside the results."""
    print(message, file=sys.stderr, flush=True)


def measure_all(bench: Bench, repeats: int) -> dict[str, list[Run]]:
    """Every contender in turns, each round starting with another one."""
    runs: dict[str, list[Run]] = {contender: [] for contender in LABELS}
    order = list(LABELS)
    for number in range(repeats):
        for contender in (*order[number % len(order) :], *order[: number % len(order)]):
            found = bench.measure(contender)
            runs[contender].append(found)
            others = "" if found.others is None else f"  others {found.others:.2f} cores"
            note(f"round {number + 1}  {found.seconds:7.2f} s{others}  {LABELS[contender]}")
    return runs


def best(runs: list[Run]) -> float:
    return min(run.seconds for run in runs)


def middle(runs: list[Run]) -> float:
    return median(run.seconds for run in runs)


def peak(runs: list[Run]) -> float | None:
    """MiB, of the run that took most."""
    peaks = [run.peak for run in runs if run.peak is not None]
    return max(peaks) / 2**20 if peaks else None


def others(runs: list[Run]) -> float | None:
    """Cores that others used beside the best run."""
    return min(runs, key=lambda run: run.seconds).others


def targets(runs: dict[str, list[Run]], peaks: dict[str, float], helps: list[Run]) -> list[Target]:
    """What `surgery convert` has to keep."""

    def copying(pick: Callable[[list[Run]], float]) -> float:
        return 1.15 * max(pick(runs[COPY]), pick(runs[HASH])) + 0.5

    def by_hand(pick: Callable[[list[Run]], float]) -> float:
        return 0.5 * pick(runs[HAND])

    ours, usual = best(runs[SURGERY]), middle(runs[SURGERY])
    found = [
        Target("c <= 1.15 max(a, d) + 0.5 s", ours, copying(best), "s", usual, copying(middle)),
        Target("c <= 0.5 b", ours, by_hand(best), "s", usual, by_hand(middle)),
    ]
    found += [
        Target(f"peak memory of c at {size}", memory, 400, "MiB") for size, memory in peaks.items()
    ]
    return [*found, Target("surgery --help", best(helps), 0.3, "s", middle(helps), 0.3)]


def table(runs: dict[str, list[Run]]) -> str:
    """Seconds, ratios, computing, memory and company, one contender a line."""
    headings = ("best", "median", "c/this", "medians", "CPU", "memory", "others")
    lines = [" " * 36 + "".join(f"{heading:>10}" for heading in headings)]
    for contender, label in LABELS.items():
        found = runs[contender]
        memory, company = peak(found), others(found)
        cells = (
            f"{best(found):.2f} s",
            f"{middle(found):.2f} s",
            f"{best(runs[SURGERY]) / best(found):.2f}",
            f"{middle(runs[SURGERY]) / middle(found):.2f}",
            f"{min(run.cpu for run in found):.2f} s",
            f"{memory:.0f} MiB" if memory is not None else "",
            f"{company:.2f}" if company is not None else "",
        )
        lines.append(f"{contender:4}{label:32}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("wemask-surgery", "numpy", "torch", "transformers", "safetensors")
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False
    )
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "filesystem": kind.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def find_surgery() -> str:
    """The installed script: beside this interpreter, else on the path."""
    beside = Path(sys.executable).parent / "surgery"
    found = str(beside) if beside.is_file() else shutil.which("surgery")
    if found is None:
        raise SystemExit("surgery is not installed; run: pip install -e .")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.2, help="size of the checkpoint")
    parser.add_argument(
        "--also-gigabytes", type=float, help="measure the memory of surgery at this size too"
    )
    parser.add_argument("--shards", type=int, default=8, help="files the weights are spread over")
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="before each run, wait at most so long for others to leave the machine idle",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and say which targets are met; the exit status says nothing about them."""
    arguments = parse()
    surgery = find_surgery()
    helps = [run([surgery, "--help"]) for _ in range(HELP_REPEATS)]
    peaks: dict[str, float] = {}
    with workplace(arguments.folder) as folder:
        where = machine(folder)
        source = folder / "source"
        note(f"making {arguments.gigabytes} GB in {folder}")
        size = make_checkpoint(source, arguments.gigabytes, arguments.shards)
        bench = Bench(source, surgery, arguments.wait)
        # Also the untimed first round, in which a virtual machine gets its memory from the host.
        bench.require_same_edit()
        runs = measure_all(bench, arguments.repeats)
        peaks[f"{size / 1e9:.2f} GB"] = peak(runs[SURGERY]) or 0.0
        shutil.rmtree(source)
        if arguments.also_gigabytes:
            note(f"making {arguments.also_gigabytes} GB in {folder}")
            other = make_checkpoint(source, arguments.also_gigabytes, arguments.shards)
            found = bench.measure(SURGERY)
            peaks[f"{other / 1e9:.2f} GB"] = peak([found]) or 0.0
            note(f"{found.seconds:7.2f} s  {LABELS[SURGERY]} at {other / 1e9:.2f} GB")
    where["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    report(runs, targets(runs, peaks, helps), size, where, as_json=arguments.json)


def report(
    runs: dict[str, list[Run]],
    found: list[Target],
    size: int,
    where: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print the results."""
    if as_json:
        value = {
            "machine": where,
            "bytes": size,
            "runs": {LABELS[name]: [vars(run) for run in runs[name]] for name in runs},
            "targets": [{**vars(target), "met": target.met} for target in found],
        }
        print(json.dumps(value, indent=2))
        return
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    print(f"{size / 1e9:.2f} GB, best and median of {len(runs[COPY])}")
    print(
        f"{where['cores']} cores, {where['filesystem']}, {where['system']}, "
        f"Python {where['python']}, {versions}"
    )
    print(f"load average {where['load_average']} before, {where['load_average_after']} after\n")
    print(table(runs) + "\n")
    for target in found:
        print(target)


if __name__ == "__main__":
    main()
