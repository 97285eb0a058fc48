"""Coverage-guided fuzzing of every parser: python tests/fuzz/fuzz.py --inputs 1000000

Needs atheris (pip install atheris). Inputs that fail are kept in --findings; put them into
tests/fuzz/corpus/<parser>/ once mended, where the tests try them again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SECONDS_PER_INPUT, MEGABYTES = 10, 2048


def main() -> None:
    """Fuzz each target in a process of its own, the inputs shared out evenly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--only", help="one parser")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from targets import TARGETS, seeds

    names = [arguments.only] if arguments.only else list(TARGETS)
    share = -(-arguments.inputs // len(names))
    arguments.findings.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for number, data in enumerate(seeds(name)):
                (Path(folder) / str(number)).write_bytes(data)
            start = time.monotonic()
            done = subprocess.run(
                [
                    sys.executable,
                    str(HERE / "one_target.py"),
                    name,
                    folder,
                    f"-runs={share}",
                    f"-seed={arguments.seed + 1}",
                    f"-timeout={SECONDS_PER_INPUT}",
                    f"-rss_limit_mb={MEGABYTES}",
                    "-max_len=65536",
                    f"-artifact_prefix={arguments.findings}/{name}-",
                    "-print_final_stats=1",
                ],
                capture_output=True,
                text=True,
                check=False,
            )
        stats = {
            key: value.strip()
            for key, _, value in (
                line.removeprefix("stat::").partition(":")
                for line in done.stderr.splitlines()
                if line.startswith("stat::")
            )
        }
        print(
            f"{name:13} {int(stats.get('number_of_executed_units', 0)):>9,} inputs  "
            f"{time.monotonic() - start:6.0f} s  "
            f"{stats.get('peak_rss_mb', '?'):>5} MB  "
            f"{'ok' if done.returncode == 0 else 'FAILED'}",
            flush=True,
        )
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout[-2000:], done.stderr[-3000:], sep="\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
