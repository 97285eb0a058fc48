"""Output that appears under its name only when it is finished, whatever happens before."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import BadSettings, SurgeryError

_PART, _OLD = ".part", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(output: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` when the block ends well.

    check: called just before, raises where `output` must not be created or replaced. On any error
    the sibling is removed, parents made for it too, and `output` stays what it was. What a killed
    process left behind is removed first.
    """
    try:
        with temporary_sibling(output) as folder:
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)
            yield folder
            sync_tree(folder)
            check()
            put(folder, output)
    except OSError as error:
        raise BadSettings(f"Writing {output} failed: {error.strerror or error}.") from error


@contextmanager
def temporary_sibling(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, removed at the end unless it was renamed.

    It is locked while the block runs, so that another process can tell it from one whose process
    was killed. Parents made for it are removed on an error.
    """
    made = [parent for parent in output.parents if not parent.exists()]
    folder: Path | None = None
    lock: int | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(output)
        while folder is None or lock is None:
            name = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=_PART, dir=output.parent)
            folder = Path(name)
            lock = _lock(folder)
        yield folder
    except BaseException:
        _remove(folder)
        for parent in made:
            with suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise
    finally:
        if lock is not None:
            _remove(folder)
            os.close(lock)


def remove_stale(output: Path) -> None:
    """Remove what killed processes left beside `output`; put back what one had moved away."""
    try:
        entries = [entry for entry in os.scandir(output.parent) if entry.name[:1] == "."]
    except OSError:
        return
    for entry in entries:
        mine = entry.name.startswith(f".{output.name}.") and entry.is_dir(follow_symlinks=False)
        if mine and entry.name.endswith(_PART) and _abandoned(entry.path):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif mine and entry.name.endswith(_OLD):
            if os.path.lexists(output):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.rename(entry.path, output)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; BadSettings where one is in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BadSettings(f"Another process is working in {folder}; wait for it.") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None when another process took it for stale."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks: nothing is ever taken for stale there
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if not folder.is_dir():
        os.close(descriptor)
        return None
    return descriptor


def _abandoned(folder: str) -> bool:
    """Whether no process holds the folder's lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def put(folder: Path, output: Path) -> None:
    """Give a finished folder its name; what had that name before is removed, or named `folder`."""
    if not os.path.lexists(output):
        os.rename(folder, output)
    elif not _exchange(folder, output):
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=_OLD, dir=output.parent))
        os.rename(output, old)
        try:
            os.rename(folder, output)
        except OSError as error:
            os.rename(old, output)
            raise SurgeryError(f"{output} could not be replaced: {error.strerror}.") from error
        shutil.rmtree(old)
    _sync_folder(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


def sync_tree(folder: Path) -> None:
    """Wait until a folder's files and names are on the disk."""
    for root, _directories, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
