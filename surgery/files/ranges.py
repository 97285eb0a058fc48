"""Byte ranges of weight files, on this disk or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from surgery.errors import BadCheckpoint


class Ranges(Protocol):
    """Where the bytes of a checkpoint's weight files come from."""

    def size(self, file: str) -> int:
        """Bytes of a file; BadCheckpoint where there is none of that name."""

    def read(self, file: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` up to `end`; BadCheckpoint where it is shorter."""

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges (file, begin, end), in the order asked for."""


class LocalFiles:
    """Byte ranges of the files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, file: str) -> int:
        """Bytes of a file; BadCheckpoint where it is not there."""
        try:
            return (self._folder / file).stat().st_size
        except OSError as error:
            raise BadCheckpoint(
                f"The shard {file} is missing from {self._folder}; fetch it again."
            ) from error

    def read(self, file: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` up to `end`; BadCheckpoint where it is shorter."""
        path = self._folder / file
        try:
            with open(path, "rb") as opened:
                opened.seek(begin)
                raw = opened.read(end - begin)
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}.") from error
        if len(raw) != end - begin:
            raise BadCheckpoint(f"{path} ends early; fetch it again.")
        return raw

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges (file, begin, end), in the order asked for."""
        return [self.read(*wanted) for wanted in ranges]
