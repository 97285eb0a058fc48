"""Writing a plan: copy, patch in place, hash, and appear under the final name only when whole.

Memory is bounded by one block of one edited tensor, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint
from surgery.files import dtypes
from surgery.files.checkpoint import Checkpoint
from surgery.files.descriptors import (
    begin_write_back,
    copy_at,
    read_exactly,
    share_blocks,
    write_exactly,
)
from surgery.files.safetensors_file import TensorEntry
from surgery.files.staging import replacing
from surgery.folds.edits import Edit
from surgery.outputs.plan import FilePlan, Plan, check_output

# One step of copying. Small enough that hashing, which follows a step behind, finds the bytes in
# cache; large enough that the system calls do not count.
STEP = 8 * 1024 * 1024
_READ = 1024 * 1024

_log = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Written:
    """One written file.

    Attributes:
        name: Its name in the checkpoint.
        size: Its bytes.
        sha256: Of what was written.
        source_sha256: Of what it was copied from; the same where nothing was patched.
    """

    name: str
    size: int
    sha256: str
    source_sha256: str


def copy_plan(plan: Plan, folder: Path, progress: Progress = lambda _bytes: None) -> list[Written]:
    """Write every file of a plan into `folder`, in the plan's order; copying and hashing overlap.

    Where one file fails, or the program is interrupted, the others stop at their next block.

    Args:
        plan: What to write.
        folder: Where; it exists and holds none of the files.
        progress: Told the bytes of every step.

    Raises:
        BadCheckpoint: The source changes underneath, or an edited tensor holds values that are not
            finite.
    """
    ordered = sorted(plan.files, key=lambda file: -file.size)
    workers = max(2, min(4, os.cpu_count() or 2))
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = {
                file.name: pool.submit(_write_file, plan.checkpoint, file, folder, progress, stop)
                for file in ordered
            }
            wait(futures.values())
        except BaseException:  # before the pool waits for its threads
            stop.set()
            raise
    for future in futures.values():
        error = future.exception()
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return [futures[file.name].result() for file in plan.files]


class _Stopped(Exception):
    """In a thread: another one failed, or the program was interrupted."""


def _write_file(
    checkpoint: Checkpoint,
    file: FilePlan,
    folder: Path,
    progress: Progress,
    stop: threading.Event,
) -> Written:
    try:
        return _written(checkpoint, file, folder, progress, stop)
    except BaseException:
        stop.set()
        raise


def _written(
    checkpoint: Checkpoint,
    file: FilePlan,
    folder: Path,
    progress: Progress,
    stop: threading.Event,
) -> Written:
    source, target = checkpoint.folder / file.name, folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(target, "xb+") as writer:
        size = file.size
        _require_unchanged(checkpoint, file, reader.fileno())
        patches = _Patches(checkpoint, file.edits)
        ready = _Watermark(stop)
        hasher = _Hasher(reader.fileno(), writer.fileno(), size, patches.first, ready, progress)
        hasher.start()
        try:
            _copy(reader.fileno(), writer.fileno(), size, patches, ready)
        except BaseException:
            ready.fail()
            raise
        finally:
            hasher.join()
        if hasher.error is not None:
            raise hasher.error
        ready.require()
        _require_unchanged(checkpoint, file, reader.fileno())
    _log.debug("%s: %d bytes, %d edits", file.name, size, len(file.edits))
    return Written(file.name, size, hasher.written, hasher.source)


def _require_unchanged(checkpoint: Checkpoint, file: FilePlan, reader: int) -> None:
    """Raise BadCheckpoint when a source file is not the one that was planned with."""
    now = os.fstat(reader)
    if (now.st_size, now.st_mtime_ns) != (file.size, checkpoint.modified[file.name]):
        raise BadCheckpoint(
            f"{checkpoint.folder / file.name} changed while it was read; run the conversion again."
        )


class _Watermark:
    """How many bytes of a file have their final value; hashing waits for it."""

    def __init__(self, stop: threading.Event) -> None:
        self._condition = threading.Condition()
        self._position = 0
        self._failed, self._stop = False, stop

    @property
    def failed(self) -> bool:
        """Whether nobody needs the file any more: copying it failed, or all work is to stop."""
        return self._failed or self._stop.is_set()

    def require(self) -> None:
        """Raise _Stopped where nobody needs the file any more."""
        if self.failed:
            raise _Stopped

    def advance(self, position: int) -> None:
        with self._condition:
            self._position = position
            self._condition.notify_all()

    def fail(self) -> None:
        with self._condition:
            self._failed = True
            self._condition.notify_all()

    def wait_beyond(self, position: int) -> int | None:
        """The watermark once it exceeds `position`; None when copying failed."""
        with self._condition:
            self._condition.wait_for(lambda: self.failed or self._position > position)
            return None if self.failed else self._position


class _Hasher(threading.Thread):
    """sha256 of the written file and of its source, which are equal up to the first patch.

    From there on the source is hashed beside the written file, in a second thread: an early patch
    would otherwise double the time that a checkpoint of a single file takes.
    """

    def __init__(
        self,
        reader: int,
        writer: int,
        size: int,
        first_patch: int,
        ready: _Watermark,
        progress: Progress,
    ) -> None:
        super().__init__(daemon=True)
        self._reader, self._writer, self._size = reader, writer, size
        self._first_patch, self._ready, self._progress = first_patch, ready, progress
        self.error: BaseException | None = None
        self.written = self.source = ""

    def run(self) -> None:
        try:
            with ThreadPoolExecutor(1) as beside:
                self._hash(beside)
        except BaseException as error:
            self.error = error

    def _hash(self, beside: ThreadPoolExecutor) -> None:
        digest, view = hashlib.sha256(), memoryview(bytearray(_READ))
        position = available = begun = 0
        source: Future[str] | None = None
        while position < self._size and not self._ready.failed:
            if position == self._first_patch:
                source = beside.submit(self._hash_source, digest.copy())
            if position >= available:
                watermark = self._ready.wait_beyond(position)
                if watermark is None:
                    return
                available = watermark
            end = min(position + _READ, available)
            if source is None:
                end = min(end, self._first_patch)
            part = view[: end - position]
            read_exactly(self._writer, part, position)
            digest.update(part)
            self._progress(end - position)
            position = end
            if position - begun >= STEP:
                begin_write_back(self._writer, begun, position - begun)
                begun = position
        self.written = digest.hexdigest()
        self.source = source.result() if source is not None else self.written

    def _hash_source(self, digest: hashlib._Hash) -> str:
        """The sha256 of the source, given that of its bytes before the first patch."""
        view = memoryview(bytearray(_READ))
        for position in range(self._first_patch, self._size, _READ):
            if self._ready.failed:
                break
            part = view[: self._size - position]
            read_exactly(self._reader, part, position)
            digest.update(part)
        return digest.hexdigest()


class _Patches:
    """The edited tensors of one file, applied once the copy has passed them."""

    def __init__(self, checkpoint: Checkpoint, edits: tuple[Edit, ...]) -> None:
        entries = [(checkpoint.tensors[edit.tensor], edit) for edit in edits]
        self._pending = sorted(entries, key=lambda pair: pair[0].begin)
        self.first = self._pending[0][0].begin if self._pending else 2**63

    def apply(self, reader: int, writer: int, copied: int, ready: _Watermark) -> int:
        """Patch every tensor that lies wholly below `copied`; returns how much is final."""
        while self._pending and self._pending[0][0].end <= copied:
            entry, edit = self._pending.pop(0)
            for position, raw in edited_blocks(reader, entry, edit):
                ready.require()
                write_exactly(writer, raw, position)
        return min([copied, *(entry.begin for entry, _ in self._pending[:1])])


def edited_blocks(reader: int, entry: TensorEntry, edit: Edit) -> Iterator[tuple[int, memoryview]]:
    """Offsets and bytes of an edited tensor, block by block.

    Args:
        reader: The descriptor of the source's file.
        entry: Where the tensor lies in it.
        edit: What is done to it.

    Raises:
        BadCheckpoint: The tensor holds values that are not finite, or the edit gives such.
    """
    width = entry.size // max(1, entry.shape[0])

    def read(block: slice) -> NDArray:
        raw = bytearray((block.stop - block.start) * width)
        read_exactly(reader, memoryview(raw), entry.begin + block.start * width)
        rows = dtypes.decode(raw, entry.dtype, (block.stop - block.start, *entry.shape[1:]))
        if not dtypes.all_finite(rows):
            raise BadCheckpoint(
                f"{entry.name} holds values that are not finite; the checkpoint is damaged."
            )
        return rows

    for block, rows in edit.blocks(entry.shape, entry.dtype, read):
        if not dtypes.all_finite(rows):
            raise BadCheckpoint(f"The edit of {entry.name} does not fit into {entry.dtype}.")
        raw = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
        yield entry.begin + block.start * width, memoryview(raw.data)


def _copy(reader: int, writer: int, size: int, patches: _Patches, ready: _Watermark) -> None:
    if share_blocks(reader, writer):
        ready.advance(patches.apply(reader, writer, size, ready))
        return
    position = 0
    while position < size:
        ready.require()
        moved = copy_at(reader, writer, min(STEP, size - position), position)
        if moved == 0:
            raise BadCheckpoint("The source became shorter while it was read; run it again.")
        position += moved
        ready.advance(patches.apply(reader, writer, position, ready))


@contextmanager
def staging(output: Path, *sources: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of a checkpoint that becomes `output` when the block ends well."""
    with replacing(output, lambda: check_output(sources, output, overwrite=overwrite)) as folder:
        yield folder
