"""Reading, writing and copying at a position of an open file, with what the system offers.

Several threads use one descriptor. POSIX reads and writes at a position in one call; elsewhere the
position is set first, under a lock that all of them share.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress

from surgery.errors import BadCheckpoint

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

_FICLONE = 0x40049409  # Linux: share the extents of another file (reflink)
_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_POSITION = threading.Lock()


def read_at(descriptor: int, count: int, position: int) -> bytes:
    """At most `count` bytes from a position on; none at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, position)
    with _POSITION:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.read(descriptor, count)


def read_exactly(descriptor: int, view: memoryview, position: int) -> None:
    """Fill `view` with the bytes from a position on; BadCheckpoint where the file ends before."""
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [view[done:]], position + done)
        else:
            raw = read_at(descriptor, len(view) - done, position + done)
            count = len(raw)
            view[done : done + count] = raw
        if count == 0:
            raise BadCheckpoint(
                "A file became shorter while it was read; run the conversion again."
            )
        done += count


def write_exactly(descriptor: int, raw: memoryview, position: int) -> None:
    """Write all of `raw` from a position on."""
    done = 0
    while done < len(raw):
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, raw[done:], position + done)
            continue
        with _POSITION:
            os.lseek(descriptor, position + done, os.SEEK_SET)
            done += os.write(descriptor, raw[done:])


def copy_at(reader: int, writer: int, count: int, position: int) -> int:
    """Copy at most `count` bytes to the same position of another file, in the kernel if it can.

    Returns how many; 0 at the end of the file.
    """
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader, writer, count, position, position)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    raw = read_at(reader, count, position)
    write_exactly(writer, memoryview(raw), position)
    return len(raw)


def share_blocks(reader: int, writer: int) -> bool:
    """Let a file share the blocks of another, whole; False where the file system cannot."""
    if fcntl is None:
        return False
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError:
        return False
    return True


def begin_write_back(descriptor: int, position: int, count: int) -> None:
    """Let the disk work while more is hashed, so that the fsync in the end finds little to do.

    Linux takes the advice to start writing dirty pages (these are) and to drop clean ones.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
