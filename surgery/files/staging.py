"""Output that appears under its name only when it is finished, whatever happens before."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from surgery.errors import BadSettings, SurgeryError
from surgery.files.locks import LOCK, locked
from surgery.files.text import write_text

_PART, _OLD = ".part", ".old"
# In a temporary folder: the names of its files, which are about to be put beside it.
_READY = ".ready"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Windows opens no folders, and there nothing need be done for a name to be on the disk.
_FOLDERS_OPEN = hasattr(os, "O_DIRECTORY")

_log = logging.getLogger(__name__)


@contextmanager
def replacing(output: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` when the block ends well.

    On any error the sibling is removed, parents made for it too, and `output` stays what it was.
    What a killed process left behind is removed first.

    Args:
        output: The folder to make or replace.
        check: Called just before; raises where `output` must not be created or replaced.

    Raises:
        BadSettings: The disk refuses.
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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(output)
        with _locked_folder(output) as folder:
            yield folder
    except BaseException:
        for parent in made:
            with suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


@contextmanager
def _locked_folder(output: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        folder: Path | None = None
        # Until it is locked, another process may take it for stale.
        while folder is None or not folder.is_dir():
            stack.close()
            name = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=_PART, dir=output.parent)
            folder = Path(name)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            with suppress(FileNotFoundError):
                stack.enter_context(locked(folder, wait=True))
        _log.debug("writing into %s", folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # while it is locked


def remove_stale(output: Path) -> bool:
    """Remove what killed processes left beside `output`; put back what one had moved away.

    Returns whether files that one had begun to put there are there now.
    """
    finished = False
    # As `tempfile.mkdtemp` names them: a folder that a user calls something like it stays.
    ours = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}({_PART}|{_OLD}|{LOCK})")
    try:
        entries = [Path(entry) for entry in os.scandir(output.parent) if entry.name[:1] == "."]
    except OSError:
        return False
    for entry in entries:
        if not ours.fullmatch(entry.name) or entry.is_symlink():
            continue
        if entry.suffix == LOCK:  # taken once more, it goes when it is left
            with suppress(OSError), locked(entry.with_suffix(_PART)):
                pass
        elif not entry.is_dir():
            continue
        elif entry.suffix == _PART:
            finished |= _remove_abandoned(entry)
        elif os.path.lexists(output):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                os.rename(entry, output)
    return finished


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; BadSettings where one is in it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError as error:
            raise BadSettings(f"Another process is working in {folder}; wait for it.") from error
        yield


def _remove_abandoned(folder: Path) -> bool:
    """Remove a temporary folder unless a process holds its lock.

    What `put_each` had begun with it is finished; returns whether there was such.
    """
    ready = False
    with suppress(OSError), locked(folder) as sure:
        if sure:
            _log.info("removing %s, which a killed process left behind", folder)
            ready = (folder / _READY).is_file()
            if ready:
                _put_ready(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return ready


def put(folder: Path, output: Path) -> None:
    """Give a finished folder its name; what had that name before is removed, or named `folder`."""
    if not os.path.lexists(output):
        os.rename(folder, output)
    elif not _exchange(folder, output):
        old = output.with_name(f".{output.name}.{secrets.token_hex(4)}{_OLD}")
        try:
            os.rename(output, old)
            os.rename(folder, output)
        except BaseException as error:  # an interruption, too: the name must not stay empty
            if not os.path.lexists(output):
                os.rename(old, output)
            if isinstance(error, OSError):
                words = f"{output} could not be replaced: {error.strerror}."
                raise SurgeryError(words) from error
            raise
        shutil.rmtree(old)
    _sync_folder(output.parent)
    _log.debug("%s is whole", output)


def write_whole(path: Path, raw: bytes) -> None:
    """Write a file that is the earlier one or the whole new one, wherever the process ends.

    A link of that name is replaced, not followed. What fails leaves nothing behind. Of several who
    write one file at a time, threads or processes, each writes all of its own, and the last stays.
    """
    _remove_abandoned_parts(path)
    with _locked_part(path) as part:
        part.write_bytes(raw)
        os.replace(part, path)


@contextmanager
def _locked_part(path: Path) -> Iterator[Path]:
    """A new file beside `path` of a name that nobody else has, removed unless it was renamed."""
    with ExitStack() as stack:
        part: Path | None = None
        # Until it is locked, another writer may take it for abandoned.
        while part is None or not part.exists():
            stack.close()
            part = path.with_name(f".{_stem(path)}.{secrets.token_hex(4)}{_PART}")
            with open(part, "xb"):
                stack.callback(part.unlink, missing_ok=True)
            with suppress(FileNotFoundError):
                stack.enter_context(locked(part, wait=True))
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)  # while it is locked


def _remove_abandoned_parts(path: Path) -> None:
    """Remove what killed writers of a file left beside it."""
    ours = re.compile(rf"\.{re.escape(_stem(path))}\.[a-z0-9_]{{8}}{_PART}")
    for entry in [Path(entry) for entry in os.scandir(path.parent)]:
        if not ours.fullmatch(entry.name) or entry.is_symlink() or not entry.is_file():
            continue
        with suppress(OSError), locked(entry) as sure:
            if sure:
                entry.unlink()


def _stem(path: Path) -> str:
    """As much of a file's name as leaves room for what a temporary name adds."""
    return path.name[:48]


def put_each(folder: Path, names: Sequence[str]) -> None:
    """Put the files of a finished temporary folder beside it, replacing what has their names.

    Files that belong together cannot be renamed in one step. The first of `names`, without which
    nobody reads the others, goes last; what a killed process has begun, `remove_stale` finishes.
    """
    if len(names) > 1:
        part = folder / f"{_READY}{_PART}"
        write_text(part, "\n".join(names))
        os.replace(part, folder / _READY)
        try:
            _put_ready(folder)
        except BaseException:
            _put_ready(folder)  # once more: half of them must not stay
            raise
    else:
        os.replace(folder / names[0], folder.parent / names[0])
    _sync_folder(folder.parent)


def _put_ready(folder: Path) -> None:
    names = [Path(name).name for name in (folder / _READY).read_bytes().decode().split("\n")]
    if (folder / names[0]).exists():
        # With an earlier one in its place, a mixture of two outputs could be read meanwhile.
        (folder.parent / names[0]).unlink(missing_ok=True)
    for name in reversed(names):
        if (folder / name).exists():
            os.replace(folder / name, folder.parent / name)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux; Windows names every library
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


def sync_tree(folder: Path) -> None:
    """Wait until a folder's files and names are on the disk."""
    for root, _directories, files in os.walk(folder):
        for name in files:
            # Windows flushes only what could be written.
            _sync(Path(root) / name, os.O_RDONLY if _FOLDERS_OPEN else os.O_RDWR)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if _FOLDERS_OPEN:
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
