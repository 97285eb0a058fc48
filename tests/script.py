"""Running the `surgery` command as people do: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_script(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess[str]:
    """`python -m surgery …`, stdout and stderr captured as text."""
    return subprocess.run(
        [sys.executable, "-m", "surgery", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        **options,
    )
