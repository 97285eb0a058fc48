"""A process that dies, or an operation that fails, at every step that touches the disk.

A job is run once to count its steps (opening for writing, writing, copying, renaming, removing,
locking, flushing), then once per step in a forked process in which that step does not happen: the
process is killed, or the call raises. What remains is for the caller to judge. The steps can also
be those that read below a folder.

All steps of a job are many, so that most runs of the tests try a sample: the first and the last
step, one of each kind, and others by chance, the same ones every time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from script import default_signals

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
        self.at, self.action, self.reading = at, action, reading
        self.kinds: list[str] = []

    def step(self, kind: str) -> None:
        self.kinds.append(kind)
        if len(self.kinds) == self.at:
            self.action()

    def install(self) -> None:
        def audit(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
            if self.reading is not None:
                if event == "open" and not writes and str(args[0]).startswith(f"{self.reading}/"):
                    self.step(event)
            elif writes or event in _EVENTS:
                self.step(event)

        sys.addaudithook(audit)
        for name in _CALLS if self.reading is None else _READS:
            honest = getattr(os, name, None)
            if honest is not None:
                setattr(os, name, self._counted(name, honest))

    def _counted(self, name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.step(name)
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
    """How many steps a job has; see `kinds`."""
    return len(kinds(job, reading))


def kinds(job: Job, reading: Path | None = None) -> list[str]:
    """What each step of a job is; the job is done, in a process of its own.

    reading: instead of the steps that write, those that read below this folder.
    """
    reader, writer = os.pipe()

    def counted() -> None:
        steps = _Steps(-1, kill, reading)
        steps.install()
        job()
        os.write(writer, json.dumps(steps.kinds).encode())

    code = in_child(counted)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert code == 0, f"the job fails when nothing is done to it: {code}"
    found: list[str] = json.loads(text)
    return found


def sample(of: list[str], size: int) -> list[int]:
    """Numbers of steps, in order: the first, the last, one of each kind, and others by chance."""
    chance = random.Random(len(of))
    chosen = {1, len(of)}
    for kind in sorted(set(of)):
        chosen.add(chance.choice([at for at, other in enumerate(of, 1) if other == kind]))
    rest = [at for at in range(1, len(of) + 1) if at not in chosen]
    chosen.update(chance.sample(rest, min(len(rest), max(0, size - len(chosen)))))
    return sorted(chosen)


def run_until(job: Job, at: int, action: Callable[[], None], reading: Path | None = None) -> int:
    """Run a job whose step number `at` (from 1) does not happen; its exit code."""

    def disturbed() -> None:
        _Steps(at, action, reading).install()
        job()

    return in_child(disturbed)


def in_child(job: Job) -> int:
    """Exit code of a job in a forked process: 0, that of its SurgeryError, 130, or -signal."""
    return end_of(begin_child(job))


def begin_child(job: Job) -> int:
    """Begin a job in a forked process, with the signal handlers of a terminal; the process's id."""
    from surgery.errors import SurgeryError

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            default_signals()
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
    return child


def end_of(child: int) -> int:
    """Wait for what `begin_child` began; its exit code."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def left_beside(output: Path) -> set[str]:
    """Names in the folder of an output, the output's aside."""
    return {path.name for path in output.parent.iterdir()} - {output.name}


def points(
    job: Job, reset: Callable[[], None], reading: Path | None = None, size: int | None = None
) -> Iterator[int]:
    """The number of every step, or of a sample of this size, each after a reset."""
    reset()
    found = kinds(job, reading)
    for at in range(1, len(found) + 1) if size is None else sample(found, size):
        reset()
        yield at
