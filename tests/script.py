"""Starting processes, and the `surgery` command as people run it: in a process of its own.

Every process of a test is started here. A shell ignores SIGINT and SIGQUIT in what it runs in the
background, as `nohup` does SIGHUP, and what is started there inherits that: tests of signals would
wait for an end that never comes. So the children get the handlers that a terminal gives them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Of these, a shell or whoever started the tests may have chosen to ignore some.
_INTERRUPTING = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def default_signals() -> None:
    """Give this process the handlers that Python has at a terminal."""
    for number in _INTERRUPTING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(
    *words: object,
    env: Mapping[str, str | None] | None = None,
    before: Callable[[], None] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start a process that can be interrupted, wherever these tests were started.

    Args:
        words: The program and its arguments.
        env: What differs from this process's environment; what is None is not in it.
        before: Called in the new process before the program.
        options: As of `subprocess.Popen`.
    """

    def prepare() -> None:
        default_signals()
        if before is not None:
            before()

    environment = {**os.environ, **(env or {})}
    return subprocess.Popen(
        [str(word) for word in words],
        env={name: value for name, value in environment.items() if value is not None},
        preexec_fn=prepare,
        **options,
    )


def run(
    *words: object, check: bool = False, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`start` a program and wait for it; stdout and stderr are captured as text.

    Args:
        words: The program and its arguments.
        check: Whether to raise unless it succeeds.
        timeout: Seconds after which it is killed.
        options: As of `start`.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start(*words, **{**pipes, **options}) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def run_script(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`python -m surgery …`, stdout and stderr captured as text."""
    return run(sys.executable, "-m", "surgery", *arguments, cwd=cwd, env=env, **options)
