"""Keeping a process as small as what it holds."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Have glibc give freed blocks back at once, from here on.

    By default it keeps what was freed, up to some hundred megabytes as layers come and go. To be
    called before large blocks are allocated; does nothing with another C library.
    """
    trim_threshold, mmap_threshold = -1, -3  # mallopt's numbers for them, from malloc.h
    with suppress(OSError, AttributeError, TypeError):  # Windows: every library has a name
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 1 << 20)
        libc.mallopt(mmap_threshold, 1 << 20)
