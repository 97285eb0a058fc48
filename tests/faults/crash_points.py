"""A process that dies, or an operation that fails, at every step that touches the disk.

A job is run once to count its steps (opening for writing, writing, copying, renaming, removing,
locking, flushing), then once per step in a forked process in which that step does not happen: the
process is killed, or the call raises. What remains is for the caller to judge. The steps can also
be those that read below a folder.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_EVENTS = (
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
    "fcntl.flock",
    "tempfile.mkdtemp",
    "tempfile.mkstemp",
)
_CALLS = ("pwrite", "copy_file_range", "sendfile", "fsync", "fdatasync")
_READS = ("pread", "preadv", "copy_file_range", "sendfile")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
KILLED = -signal.SIGKILL

Job = Callable[[], None]


class _Steps:
    def __init__(self, at: int, action: Callable[[], None], reading: Path | None) -> None:
        self.seen, self.at, self.action, self.reading = 0, at, action, reading

    def step(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.action()

    def install(self) -> None:
        def audit(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
            if self.reading is not None:
                if event == "open" and not writes and str(args[0]).startswith(f"{self.reading}/"):
                    self.step()
            elif writes or event in _EVENTS:
                self.step()

        sys.addaudithook(audit)
        for name in _CALLS if self.reading is None else _READS:
            honest = getattr(os, name, None)
            if honest is not None:
                setattr(os, name, self._counted(honest))

    def _counted(self, honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.step()
            return honest(*args, **options)

        return call


def kill() -> None:
    """The end of the process, without any cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Callable[[], None]:
    """An operation that fails, with an errno."""

    def action() -> None:
        raise OSError(number, os.strerror(number))

    return action


def interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def count(job: Job, reading: Path | None = None) -> int:
    """How many steps a job has; the job is done, in a process of its own.

    reading: instead of the steps that write, those that read below this folder.
    """
    reader, writer = os.pipe()

    def counted() -> None:
        steps = _Steps(-1, kill, reading)
        steps.install()
        job()
        os.write(writer, str(steps.seen).encode())

    code = in_child(counted)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert code == 0, f"the job fails when nothing is done to it: {code}"
    return int(text)


def run_until(job: Job, at: int, action: Callable[[], None], reading: Path | None = None) -> int:
    """Run a job whose step number `at` (from 1) does not happen; its exit code."""

    def disturbed() -> None:
        _Steps(at, action, reading).install()
        job()

    return in_child(disturbed)


def in_child(job: Job) -> int:
    """Exit code of a job in a forked process: 0, that of its SurgeryError, 130, or -signal."""
    from surgery.errors import SurgeryError

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            job()
            code = 0
        except SurgeryError as error:
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def left_beside(output: Path) -> set[str]:
    """Names in the folder of an output, the output's aside."""
    return {path.name for path in output.parent.iterdir()} - {output.name}


def points(job: Job, reset: Callable[[], None], reading: Path | None = None) -> Iterator[int]:
    """The number of every step, each after a reset."""
    reset()
    total = count(job, reading)
    for at in range(1, total + 1):
        reset()
        yield at
