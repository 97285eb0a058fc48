"""A lock on a folder that ends with the process which holds it, on every system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

# Of the file that is locked beside a folder, in place of the folder's own suffix.
LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder while the block runs; False where the file system has no locks.

    POSIX locks the folder itself, which may be renamed meanwhile. Elsewhere a folder cannot be
    opened, and a file beside it is locked, for as long as it has that name.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false.
        OSError: The folder cannot be opened.
    """
    if fcntl is None:
        with _locked_beside(folder.with_suffix(LOCK), wait=wait) as sure:
            yield sure
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sure = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            sure = False
        yield sure
    finally:
        os.close(descriptor)


@contextmanager
def _locked_beside(path: Path, *, wait: bool) -> Iterator[bool]:
    import filelock

    lock = filelock.FileLock(path)
    sure = True
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise BlockingIOError(f"{path} is locked") from error
    except (OSError, NotImplementedError):
        sure = False
    try:
        yield sure
    finally:
        with suppress(OSError):  # another process has it open by now
            lock.release()
            path.unlink(missing_ok=True)
