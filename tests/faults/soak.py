"""Commands stopped at random moments: python tests/faults/soak.py --minutes 60

Each trial runs one command as a user would, stops it with SIGKILL, SIGTERM or SIGINT after a random
part of the time it takes, and checks: the source is unchanged, no output is wrong, a polite signal
leaves no temporary files, and the same command run again succeeds without cleaning up by hand.
`--trials N` stops after N; `--seed` repeats a run's choices (not its timing).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import tiny_models  # noqa: E402
from hub_server import HubServer  # noqa: E402
from script import run_script, start  # noqa: E402

# The largest share of a command's usual time at which it is stopped.
LATEST = 1.1


class Finding(AssertionError):
    """Something that must not happen."""


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def require(true: bool, words: str) -> None:
    """Raise a Finding unless `true`."""
    if not true:
        raise Finding(words)


def whole(folder: Path) -> None:
    """A converted checkpoint is exactly what its manifest says."""
    present = digests(folder)
    require("surgery.json" in present, f"{sorted(present)}: no manifest in an output")
    stated = json.loads((folder / "surgery.json").read_text())["files"]
    expected = {record["name"]: record["sha256"] for record in stated}
    present.pop("surgery.json")
    require(present == expected, "the files of an output are not those of its manifest")


@dataclass(frozen=True)
class Scenario:
    """A command and how to judge what it left.

    prepare: puts the state before it in place. judge: raises a Finding; gets whether the command
    has come to its end. beside: folder that must hold no temporary files after a polite signal.
    ends: how the same command may end afterwards. again: the command that goes on, where that is
    another one. earliest: the share of its usual time before which it is left alone.
    """

    name: str
    words: tuple[str, ...]
    prepare: Callable[[], None]
    judge: Callable[[bool], None]
    beside: Path
    ends: tuple[int, ...] = (0,)
    again: Callable[[], tuple[str, ...]] | None = None
    earliest: float = 0.0

    def left(self) -> list[str]:
        """Temporary files and folders."""
        return sorted(path.name for path in self.beside.rglob(".*"))


def scenarios(root: Path, hub: HubServer) -> list[Scenario]:
    """Every command that writes."""
    source = tiny_models.save("llama", root / "source", shards=3)
    large = enlarged(root / "large", source)
    work = root / "work"
    quick = ("--layer", "3", "--no-check", "--quiet")
    earlier = root / "earlier"
    surgery("convert", str(source), *quick, "--rate", "0.5", "-o", str(earlier))

    def empty() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

    def occupied() -> None:
        empty()
        shutil.copytree(earlier, work / "out")

    def output_whole(ended: bool) -> None:
        out = work / "out"
        if out.exists():
            whole(out)
        else:
            require(not ended, "no output after success")

    def never_gone(ended: bool) -> None:
        require((work / "out").exists(), "an earlier output is gone")
        whole(work / "out")

    def reverted(ended: bool) -> None:
        out = work / "base"
        if out.exists():
            base = digests(out)
            kept = {name: value for name, value in digests(source).items() if name in base}
            require(base == kept and "config.json" in base, "a restored base differs")
        else:
            require(not ended, "no output after success")

    def pushed(ended: bool) -> None:
        served = {}
        if "tester/model" in hub.repos:
            served = hub.files("tester/model")
        names = set(served) - {".gitattributes"}
        require(names == set() or names == set(digests(earlier)), f"half a commit: {sorted(names)}")
        require(bool(names) or not ended, "nothing was pushed")

    def forgotten() -> None:
        empty()
        hub.repos.pop("tester/model", None)

    def swept(ended: bool) -> None:
        if ended:
            rows = json.loads((work / "out" / "results.json").read_text())["points"]
            require(len(rows) == 4, f"{len(rows)} points instead of 4")

    out = str(work / "out")
    sweep = ("--rates", "0.05,0.1", "--scopes", "first", "--folds", "norm,qkv")
    sweep += ("--selects", "weight", "--layer", "3", "--check-tokens", "256", "--quiet")
    convert = ("convert", str(large), *quick)
    return [
        Scenario("convert", (*convert, "-o", out, "--overwrite"), empty, output_whole, work),
        Scenario("overwrite", (*convert, "-o", out, "--overwrite"), occupied, never_gone, work),
        Scenario(
            "convert, checked",
            ("convert", str(source), "--quiet", "--check-tokens", "256", "-o", out, "--overwrite"),
            empty,
            output_whole,
            work,
        ),
        Scenario(
            "revert",
            ("revert", str(earlier), "--output", str(work / "base")),
            empty,
            reverted,
            work,
            (0, 2),
        ),
        Scenario("push", ("push", str(earlier), "tester/model"), forgotten, pushed, work),
        Scenario("sweep", ("sweep", str(source), *sweep, "-o", out), empty, swept, work / "none"),
        *finetunes(root, source, work),
    ]


def finetunes(root: Path, source: Path, work: Path) -> list[Scenario]:
    """A training, and what follows a training that is done: merging, folding, verifying."""
    rows, recipe, done = root / "rows.jsonl", root / "recipe.json", root / "trained"
    row = {"prompt": "The keeper counted 365 steps.", "completion": " Bread and coffee."}
    rows.write_text("\n".join([json.dumps(row)] * 4))
    keys = {
        "model_name_or_path": str(source),
        "datasets": [{"path": "json", "data_files": str(rows)}],
        "dtype": "float32",
        "bf16": False,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "lora_target_modules": "all-linear",
        "surgery": {"layer": 3, "fold": "norm", "save": "both", "force": True},
    }
    recipe.write_text(json.dumps(keys))  # which is YAML too
    out = work / "out"
    words = ("finetune", str(recipe), "-o", str(out), "--quiet")
    products = ("base", "adapter", "model")

    def empty() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

    def trained() -> None:
        empty()
        shutil.copytree(done, out)
        for name in products:
            shutil.rmtree(out / name)

    def again() -> tuple[str, ...]:
        return (*words, "--resume") if (out / "training").is_dir() else words

    def weights(folder: Path) -> dict[str, str]:
        kept = ("model.safetensors", "adapter_model.safetensors", "adapter_config.json")
        return {name: digest for name, digest in digests(folder).items() if name in kept}

    def judge(ended: bool) -> None:
        present = [name for name in products if (out / name).exists()]
        require(not ended or present == list(products), f"of the products there are {present}")
        require("adapter" not in present or "base" in present, "an adapter without its base")
        for name in present:
            require(weights(out / name) == expected[name], f"{name} is another one")
            if name != "adapter":
                whole(out / name)

    empty()
    surgery(*words)
    shutil.copytree(out, done)
    expected = {name: weights(done / name) for name in products}
    resumed = (*words, "--resume")
    return [
        Scenario("finetune", words, empty, judge, work, again=again),
        Scenario("finetune, merging", resumed, trained, judge, work, earliest=0.4),
    ]


def enlarged(folder: Path, source: Path) -> Path:
    """A copy with more bytes to copy than the system takes in one step."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    tensors = load_file(folder / first)
    tensors["mtp.ballast"] = np.random.default_rng(0).random((1500, 10_000), np.float32)
    index["weight_map"]["mtp.ballast"] = first
    save_file(tensors, folder / first, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def surgery(*words: str, env: dict[str, str] | None = None) -> float:
    """Run a command to its end; how many seconds it took."""
    start = time.monotonic()
    done = run_script(*words, timeout=600, env={**(env or {}), "OMP_NUM_THREADS": "1"})
    require(done.returncode == 0, f"surgery {' '.join(words)}: {done.returncode} {done.stderr}")
    return time.monotonic() - start


def trial(
    scenario: Scenario, delay: float, number: signal.Signals, env: dict[str, str], sources: Path
) -> str:
    """One command, stopped; how it ended."""
    before = digests(sources)
    scenario.prepare()
    env = {**env, "OMP_NUM_THREADS": "1"}
    process = start(
        *(sys.executable, "-m", "surgery", *scenario.words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        _, errors = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    code = process.returncode
    require("canary" not in errors, "a token on stderr")
    require(digests(sources) == before, "the source has changed")
    scenario.judge(code == 0)
    if number != signal.SIGKILL and code not in (0, -number):
        # Python itself may be interrupted before the program has begun.
        begun = "surgery" in errors or "Interrupted" in errors or "Terminated" in errors
        if begun:
            wanted = {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
            require(code == wanted, f"exit code {code} after {number.name}: {errors}")
            require("Traceback" not in errors, errors)
    if number != signal.SIGKILL and code in (130, 143):
        require(not scenario.left(), f"left behind after {number.name}: {scenario.left()}")
    again = run_script(*(scenario.again or (lambda: scenario.words))(), timeout=600, env=env)
    require(again.returncode in scenario.ends, f"run again: {again.returncode} {again.stderr}")
    scenario.judge(True)
    if again.returncode == 0:
        require(not scenario.left(), f"left behind after the second run: {scenario.left()}")
    return "finished before" if code == 0 else f"stopped by {number.name}"


def main() -> None:
    """Trials until the time or the number is used up; exits with 1 after a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one scenario")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    end = time.monotonic() + 60 * arguments.minutes
    counts: Counter[tuple[str, str]] = Counter()
    findings = 0
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder) / "server") as hub:
        root = Path(folder) / "sources"
        root.mkdir()
        env = {**hub.env(), "HF_HOME": str(Path(folder) / "home")}
        cases = [
            scenario for scenario in scenarios(root, hub) if arguments.only in (None, scenario.name)
        ]
        usual = {}
        for scenario in cases:
            scenario.prepare()
            usual[scenario.name] = surgery(*scenario.words, env=env)
        done = 0
        while time.monotonic() < end and (arguments.trials is None or done < arguments.trials):
            scenario = cases[done % len(cases)]
            number = chance.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            delay = chance.uniform(scenario.earliest, LATEST) * usual[scenario.name]
            try:
                how = trial(scenario, delay, number, env, root / "source")
            except Finding as found:
                findings += 1
                how = "FINDING"
                print(f"{scenario.name}, {number.name} after {delay:.3f} s: {found}", flush=True)
            counts[scenario.name, how] += 1
            done += 1
    for (name, how), count in sorted(counts.items()):
        print(f"{name:18} {how:22} {count:5}")
    stopped = sum(count for (_, how), count in counts.items() if how.startswith("stopped"))
    killed = sum(count for (_, how), count in counts.items() if how.endswith("SIGKILL"))
    print(
        f"{done} trials, {stopped} stopped in the middle, {killed} of them by SIGKILL, "
        f"{findings} findings"
    )
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
