"""What an edit overwrites, kept small, and put back.

Gains and biases lie in the manifest. Scaled columns and rank-one edits overwrite more than a JSON
file should hold: on request they go into a safetensors file, the columns alone for `columns`, the
whole tensor for `rank_one`, whose rounding loses bits that no formula brings back.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint
from surgery.files import dtypes
from surgery.files.checkpoint import Checkpoint
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE, MANIFEST
from surgery.files.ranges import LocalFiles
from surgery.files.safetensors_file import TensorEntry, parse_header, write_safetensors
from surgery.files.text import LARGEST_TEXT
from surgery.folds.edits import Edit


def needs_file(edits: Iterable[Edit]) -> list[Edit]:
    """The edits whose originals the manifest does not hold."""
    return [edit for edit in edits if not edit.small]


def undo_size(checkpoint: Checkpoint, edits: Iterable[Edit]) -> int:
    """Bytes of the tensors in the file that `write_undo` makes; 0 where it makes none."""
    kept = [(edit, checkpoint.tensors[edit.tensor]) for edit in needs_file(edits)]
    return sum(
        math.prod(edit.kept_shape(entry.shape)) * dtypes.BITS[entry.dtype] // 8
        for edit, entry in kept
    )


def write_undo(path: Path, checkpoint: Checkpoint, edits: Sequence[Edit]) -> None:
    """Keep in a file what these edits overwrite and the manifest does not hold."""
    kept = {edit.tensor: edit for edit in needs_file(edits)}

    def read(name: str) -> bytes:
        stored = _bits(checkpoint.read_bytes(name), checkpoint.tensors[name])
        return kept[name].kept(stored).tobytes()

    shapes = {
        name: (entry.dtype, edit.kept_shape(entry.shape))
        for name, edit in kept.items()
        for entry in (checkpoint.tensors[name],)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, shapes, read, {"format": "pt", "surgery": "undo"})


class UndoFile:
    """The originals in a file that `write_undo` made."""

    def __init__(self, path: Path) -> None:
        self._files, self._name = LocalFiles(path.parent), path.name
        self._entries = parse_header(self._files, path.name)

    def original(self, edit: Edit, entry: TensorEntry, edited: bytes) -> bytes:
        """The tensor before the edit; `edited` are its present bytes.

        Raises BadCheckpoint where the file lacks it or holds it in another shape.
        """
        kept = self._entries.get(edit.tensor)
        expected = (entry.dtype, edit.kept_shape(entry.shape))
        if kept is None or (kept.dtype, kept.shape) != expected:
            raise BadCheckpoint(
                f"The undo file does not hold the original values of {edit.tensor}."
            )
        raw = self._files.read(self._name, kept.begin, kept.end)
        return edit.inverse(_bits(edited, entry), _bits(raw, kept)).tobytes()


def _bits(raw: bytes, entry: TensorEntry) -> NDArray:
    """A tensor's elements as unsigned integers, which copy any format unchanged."""
    width = dtypes.BITS[entry.dtype] // 8
    return np.frombuffer(raw, dtype=f"<u{width}").reshape(entry.shape)


def replaced_files(checkpoint: Checkpoint) -> dict[str, str]:
    """The base's own files in whose place generated ones come, packed for the manifest.

    Raises BadCheckpoint for one that is too large to be a card, a manifest or a figure.
    """
    found, files = {}, LocalFiles(checkpoint.folder)
    for name in (CARD, MANIFEST, FIGURE, LOSS_FIGURE):
        path = checkpoint.folder / name
        if path.is_file():
            if path.stat().st_size > LARGEST_TEXT:
                raise BadCheckpoint(f"{path} is larger than any such file; take it away.")
            found[name] = pack_file(files.read(name, 0, path.stat().st_size))
    return found


def pack_file(raw: bytes) -> str:
    """A small file as base64 of its deflated bytes."""
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def unpack_file(text: str) -> bytes:
    """What `pack_file` packed; ValueError for anything else."""
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(
            base64.b64decode(text.encode("ascii"), validate=True), LARGEST_TEXT
        )
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflate.eof:
        raise ValueError("a packed file is cut off, or larger than any such file")
    return raw
