"""sha256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

_STEP = 1024 * 1024


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_STEP)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
