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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
LAYER = 1
GAIN = f"model.layers.{LAYER + 1}.input_layernorm.weight"
BUFFER = 1024 * 1024
HELP_REPEATS = 5

COPY, SYNCED, HAND, SURGERY, HASH = "a", "a'", "b", "c", "d"
LABELS = {
    COPY: "cp -r",
    SYNCED: "cp -r, then sync of every file",
    HAND: "transformers: load, edit, save",
    SURGERY: "surgery convert --no-check",
    HASH: "sha256, one thread (in process)",
}


@dataclass(frozen=True)
class Run:
    """One timed run. peak: bytes of resident memory at most, None where it is not of interest."""

    seconds: float
    peak: int | None = None


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


def run(command: list[str]) -> Run:
    """Run a program to its end; the peak is that of this one child, not of all children.

    A child starts as a copy of this process and inherits its peak, which is why nothing here
    imports numpy: about 20 MiB is the least that can be seen.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _pid, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{command} failed: {errors.read().decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * unit)


def hash_files(folder: Path) -> Run:
    """One sha256 pass over every byte of a folder."""
    start = time.perf_counter()
    for _chunk in _chunks(folder, hashlib.sha256().update):
        pass
    return Run(time.perf_counter() - start)


def _chunks(folder: Path, use: Callable[[memoryview], None]) -> Iterator[int]:
    buffer = memoryview(bytearray(BUFFER))
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                use(buffer[:count])
                yield count


def settle(source: Path) -> None:
    """Earlier writes on disk and the source in the page cache: the same start for everybody."""
    os.sync()
    for _chunk in _chunks(source, lambda _view: None):
        pass


class Bench:
    """The contenders over one checkpoint."""

    def __init__(self, source: Path, surgery: str) -> None:
        self.source, self.surgery = source, surgery
        self.output = source.parent / "output"

    def measure(self, contender: str) -> Run:
        """One run with a fresh output, which is removed afterwards."""
        settle(self.source)
        try:
            return self._run(contender)
        finally:
            shutil.rmtree(self.output, ignore_errors=True)

    def _run(self, contender: str) -> Run:
        if contender == HASH:
            return hash_files(self.source)
        if contender == COPY:
            return Run(run(["cp", "-r", str(self.source), str(self.output)]).seconds)
        if contender == SYNCED:
            first = run(["cp", "-r", str(self.source), str(self.output)])
            files = [str(path) for path in sorted(self.output.iterdir())]
            return Run(first.seconds + run(["sync", *files, str(self.output)]).seconds)
        return run(self.commands[contender])

    @property
    def commands(self) -> dict[str, list[str]]:
        """The contenders that are programs with memory of interest."""
        layer = str(LAYER)
        by_hand = [sys.executable, str(HERE / "by_transformers.py")]
        convert = [self.surgery, "convert", str(self.source), "--layer", layer, "--no-check"]
        return {
            HAND: [*by_hand, str(self.source), layer, str(self.output)],
            SURGERY: [*convert, "--quiet", "-o", str(self.output)],
        }

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


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """A checkpoint, made by another process (which needs numpy); its bytes."""
    free = shutil.disk_usage(folder.parent).free
    if free < 2.1e9 * gigabytes:
        raise SystemExit(f"{folder.parent} needs {2.1 * gigabytes:.1f} GB free.")
    maker = [sys.executable, str(HERE / "big_checkpoint.py"), str(folder)]
    run([*maker, "--gigabytes", str(gigabytes)])
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
            note(f"round {number + 1}  {found.seconds:7.2f} s  {LABELS[contender]}")
    return runs


def best(runs: list[Run]) -> float:
    return min(run.seconds for run in runs)


def middle(runs: list[Run]) -> float:
    return median(run.seconds for run in runs)


def peak(runs: list[Run]) -> float | None:
    """MiB, of the run that took most."""
    peaks = [run.peak for run in runs if run.peak is not None]
    return max(peaks) / 2**20 if peaks else None


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
    """Seconds, ratios and memory, one contender a line."""
    lines = [
        f"{'':38}{'best':>9}{'median':>9}{'c / this':>10}{'medians':>9}{'peak memory':>14}",
    ]
    for contender, label in LABELS.items():
        found = runs[contender]
        memory = peak(found)
        lines.append(
            f"{contender:4}{label:34}{best(found):7.2f} s{middle(found):7.2f} s"
            f"{best(runs[SURGERY]) / best(found):10.2f}{middle(runs[SURGERY]) / middle(found):9.2f}"
            + (f"{memory:10.0f} MiB" if memory is not None else "")
        )
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
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    parser.add_argument("--repeats", type=int, default=3)
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
        size = make_checkpoint(source, arguments.gigabytes)
        bench = Bench(source, surgery)
        # Also the untimed first round, in which a virtual machine gets its memory from the host.
        bench.require_same_edit()
        runs = measure_all(bench, arguments.repeats)
        peaks[f"{size / 1e9:.2f} GB"] = peak(runs[SURGERY]) or 0.0
        shutil.rmtree(source)
        if arguments.also_gigabytes:
            note(f"making {arguments.also_gigabytes} GB in {folder}")
            other = make_checkpoint(source, arguments.also_gigabytes)
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
            "seconds": {LABELS[name]: [run.seconds for run in runs[name]] for name in runs},
            "peak_mib": {LABELS[name]: peak(runs[name]) for name in (HAND, SURGERY)},
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
