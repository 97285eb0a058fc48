"""Running a program for its time and memory, and how busy the machine was with others meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# Cores that others use on a machine that counts as idle; the system's own writing takes some.
IDLE = 0.2


@dataclass(frozen=True)
class Run:
    """One timed run.

    cpu: its own seconds of computing. others: cores that everybody else used on average, the
    system's write-back among them; None where the system does not tell. peak: bytes of resident
    memory at most, None for work that was done in this process.
    """

    seconds: float
    cpu: float
    others: float | None
    peak: int | None = None


def run(command: list[str]) -> Run:
    """Run a program to its end, or stop with what it said.

    The peak is that of this one child, not of all children. A child starts as a copy of this
    process and inherits its peak: keep numpy out of whoever calls this.
    """
    with tempfile.TemporaryFile() as errors:
        busy, start = _busy(), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _pid, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{command} failed: {errors.read().decode(errors='replace')}")
    cpu = usage.ru_utime + usage.ru_stime
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, cpu, _others(busy, seconds, cpu), usage.ru_maxrss * unit)


def timed(work: Callable[[], None]) -> Run:
    """Do something in this process."""
    busy, start, computed = _busy(), time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - computed
    return Run(seconds, cpu, _others(busy, seconds, cpu))


def wait_for_idle(limit: float) -> None:
    """Return when others have let the machine be for a second, or after `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        others = timed(lambda: time.sleep(1)).others
        if others is None or others <= IDLE:
            return


def _busy() -> float | None:
    """Seconds of computing by all programs and the system since it started, on Linux."""
    if not _STAT.is_file():
        return None
    # user, nice, system, idle, iowait, irq, softirq, ...
    fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:8]]
    return float(sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _others(before: float | None, seconds: float, own: float) -> float | None:
    after = _busy()
    if before is None or after is None:
        return None
    return max(0.0, (after - before - own) / seconds)
