"""A Hub model's weights as byte ranges, without downloading its files."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.errors import BadCheckpoint
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE
from surgery.files.ranges import Ranges
from surgery.patient.hub import hub_words

# Requests under way at once; each costs a round trip, not bandwidth.
_PARALLEL = 8
_STEP = 8 * 1024 * 1024
# Bytes of disk that reading ahead never takes.
_ROOM = 64 * 1024 * 1024
# What describes a model, next to its weights, and what generated files take the place of.
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", CARD, FIGURE, LOSS_FIGURE]

_log = logging.getLogger(__name__)


class HubRanges:
    """Byte ranges of the files of one commit, read through huggingface_hub's file system.

    `bytes_read` counts what came from the Hub, and nothing that was in its cache.
    """

    def __init__(self, repo: str, commit: str) -> None:
        from huggingface_hub import HfFileSystem

        self._files = HfFileSystem()
        self._repo, self._commit = repo, commit
        self._root = f"{repo}@{commit}"
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def fetch_small(self, names: Sequence[str]) -> Path:
        """The folder with the small files among `names`, fetched unless they are in the cache."""
        import huggingface_hub

        def here(name: str) -> bool:
            known = huggingface_hub.try_to_load_from_cache(self._repo, name, revision=self._commit)
            return isinstance(known, str)

        missing = [name for name in names if not here(name)]
        folder = Path(
            huggingface_hub.snapshot_download(
                self._repo, revision=self._commit, allow_patterns=SMALL_FILES
            )
        )
        fetched = [folder / name for name in missing if (folder / name).is_file()]
        self.bytes_read += sum(path.stat().st_size for path in fetched)
        return folder

    def size(self, file: str) -> int:
        """Bytes of a file; BadCheckpoint when the commit has none of that name."""
        if file not in self._sizes:
            try:
                self._sizes[file] = int(self._files.info(f"{self._root}/{file}")["size"])
            except OSError as error:
                raise BadCheckpoint(f"{self._root} has no file {file}.") from error
            except Exception as error:  # an answer of another shape
                raise BadCheckpoint(
                    f"Reading {self._root}/{file} failed: {hub_words(error)}"
                ) from error
        return self._sizes[file]

    def read(self, file: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` up to `end`; BadCheckpoint when they do not arrive."""
        if begin == end:
            return b""
        try:
            # Without a cache, which would read ahead by megabytes.
            with self._files.open(f"{self._root}/{file}", "rb", cache_type="none") as opened:
                opened.seek(begin)
                raw: bytes = opened.read(end - begin)
        except Exception as error:  # the file system passes on what its HTTP client raises
            raise BadCheckpoint(
                f"Reading {self._root}/{file} failed: {hub_words(error)}"
            ) from error
        if len(raw) != end - begin:
            raise BadCheckpoint(f"{self._root}/{file} ends early on the Hub.")
        with self._lock:
            self.bytes_read += len(raw)
        _log.debug("%s/%s: bytes %d to %d", self._root, file, begin, end)
        return raw

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges at once, in the order asked for."""
        with ThreadPoolExecutor(_PARALLEL) as pool:
            return list(pool.map(lambda wanted: self.read(*wanted), ranges))


class KeptRanges:
    """The byte ranges of another reader, each of them read once and kept in a folder.

    What the disk has no room for is not kept.
    """

    def __init__(self, ranges: Ranges, folder: Path) -> None:
        self._ranges, self._folder = ranges, folder
        self._known: dict[str, list[tuple[int, int]]] = {}

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self._ranges.size(file)

    def read(self, file: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` up to `end`."""
        return self.read_many([(file, begin, end)])[0]

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Several ranges, in the order asked for; what is not kept yet is read at once."""
        missing = [(file, *gap) for file, *wanted in ranges for gap in self._gaps(file, *wanted)]
        needed = sum(end - begin for _, begin, end in missing)
        if needed and shutil.disk_usage(self._folder).free < needed + _ROOM:
            return self._ranges.read_many(ranges)
        self._keep(missing)
        found = []
        for file, begin, end in ranges:
            with open(self._path(file), "rb") as kept:
                kept.seek(begin)
                found.append(kept.read(end - begin))
        return found

    def move(self, file: str, target: Path, advance: Callable[[int], None]) -> None:
        """Make a whole file of what is kept of it, and put it elsewhere; nothing of it stays."""
        size = self.size(file)
        for begin in range(0, size, _STEP):
            end = min(begin + _STEP, size)
            self._keep([(file, *gap) for gap in self._gaps(file, begin, end)])
            advance(end - begin)
        shutil.move(self._path(file), target)
        del self._known[file]

    def _keep(self, missing: Sequence[tuple[str, int, int]]) -> None:
        for (file, begin, end), raw in zip(missing, self._ranges.read_many(missing), strict=True):
            with open(self._path(file), "rb+") as kept:
                kept.seek(begin)
                kept.write(raw)
            self._known[file].append((begin, end))

    def _path(self, file: str) -> Path:
        path = self._folder / file.replace("/", "%2F")
        path.touch()
        return path

    def _gaps(self, file: str, begin: int, end: int) -> list[tuple[int, int]]:
        """What of a range is not kept."""
        gaps, position = [], begin
        for first, last in sorted(self._known.setdefault(file, [])):
            if first > position:
                gaps.append((position, min(first, end)))
            position = max(position, last)
            if position >= end:
                return [gap for gap in gaps if gap[0] < gap[1]]
        return [gap for gap in (*gaps, (position, end)) if gap[0] < gap[1]]
