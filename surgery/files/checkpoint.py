"""The bytes of a checkpoint: which tensor lies where in which file, read from headers alone.

Nothing here loads a tensor that was not asked for, and nothing imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files import dtypes
from surgery.files.gguf_file import is_gguf
from surgery.files.ranges import LocalFiles, Ranges
from surgery.files.safetensors_file import TensorEntry, parse_header
from surgery.files.side_files import other_files
from surgery.files.text import read_json
from surgery.files.weights import ADAPTER_CONFIG, Weights, choose, require_described

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from, precise enough to fetch the same bytes again.

    Attributes:
        kind: "directory", "hub", "gguf" or "bin".
        name: What a person calls it: a Hub id, the name of a folder or file.
        typed: The source as the user gave it.
        commit: The Hub's commit.
        sha256: Of the file behind a GGUF source, or of all files behind one in another format.
        note: What else is to be said about it.
    """

    kind: str
    name: str
    typed: str
    commit: str | None = None
    sha256: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, described from its headers.

    Attributes:
        folder: Where its side files lie, and its weight files too unless they are `remote`.
        origin: Where it came from.
        config: Its config.json.
        weights: Which files hold its tensors.
        tensors: Its tensors by name.
        side_files: Names of the other files that belong to it, with "/" between folders.
        left_out: Names of files that do not, such as further copies of the weights.
        file_sizes: Bytes of each of its files.
        modified: When each local file was last changed, in nanoseconds.
        remote: What reads its weight files, where they are not in `folder`.
        made_from: The folder or files that the user has, where `folder` is a copy of them in
            another format.
    """

    folder: Path
    origin: Origin
    config: Mapping[str, Any]
    weights: Weights
    tensors: Mapping[str, TensorEntry]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    file_sizes: Mapping[str, int] = field(default_factory=dict)
    modified: Mapping[str, int] = field(default_factory=dict)
    remote: Ranges | None = None
    made_from: tuple[Path, ...] = ()

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files that hold its tensors."""
        return self.weights.files

    @property
    def sources(self) -> tuple[Path, ...]:
        """Folders and files that nothing may be written into."""
        return (self.folder, *self.made_from)

    @property
    def gguf(self) -> Path | None:
        """The .gguf file, or first shard, that all of it was read from."""
        return next((path for path in self.made_from if is_gguf(path)), None)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.file_sizes[name] for name in self.weight_files)

    def read(self, name: str) -> NDArray:
        """A tensor in its stored format, shape as stored.

        Raises:
            Unsupported: It is stored in an integer or sub-byte format.
            BadCheckpoint: Its file is shorter than the header says.
        """
        entry = self.tensors[name]
        if not dtypes.is_float(entry.dtype):
            raise Unsupported(
                f"The tensor {name} is stored as {entry.dtype}, which holds quantised values; "
                "convert the unquantised checkpoint instead."
            )
        return dtypes.decode(self.read_bytes(name), entry.dtype, entry.shape)

    def read_bytes(self, name: str) -> bytes:
        """The stored bytes of a tensor."""
        entry = self.tensors[name]
        return self.ranges.read(entry.file, entry.begin, entry.end)

    @property
    def ranges(self) -> Ranges:
        """Where byte ranges of the weight files are read from."""
        return self.remote if self.remote is not None else LocalFiles(self.folder)


def _no_config(folder: Path) -> str:
    return (
        f"{folder} has no config.json, so it is not a Hugging Face checkpoint; give a folder or a "
        "Hub id that holds one."
    )


def weights_in(folder: Path) -> Weights:
    """The weights that stock transformers takes from a folder; BadCheckpoint without any."""
    names = [path.name for path in folder.iterdir() if path.is_file()]

    def read(name: str) -> Any:
        check_links(folder, (name,))
        return read_json(folder / name)

    if "config.json" not in names and ADAPTER_CONFIG not in names:
        raise BadCheckpoint(_no_config(folder))
    config = read("config.json") if "config.json" in names else {}
    return choose(names, read, str(folder), config)


def open_checkpoint(
    folder: Path,
    origin: Origin,
    remote: Ranges | None = None,
    weights: Weights | None = None,
    include: Sequence[str] = (),
) -> Checkpoint:
    """Describe the safetensors checkpoint in a folder, or one whose weights are `remote`.

    Args:
        folder: Where it lies.
        origin: Where it came from.
        remote: What reads its weight files, where they are not in `folder`.
        weights: Which these are; by default those that transformers takes from the folder.
        include: Patterns of side files to carry beyond the usual ones.

    Raises:
        BadCheckpoint: A file is missing, truncated or disagrees with the index.
    """
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a directory.")
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(_no_config(folder))
    check_links(folder, ("config.json",))
    config = read_json(folder / "config.json")
    weights = weights or weights_in(folder)
    if weights.pickled:
        raise BadCheckpoint(f"{folder} holds {weights.entry}, and no safetensors.")
    weight_files = weights.files
    check_links(folder, weight_files)
    ranges = remote if remote is not None else LocalFiles(folder)
    tensors = _tensors(ranges, weight_files)
    if weights.weight_map is not None:
        _compare_index(weights.weight_map, tensors)
    side_files, left_out = other_files(folder, weights, include if remote is None else ())
    require_described(tensors, config, left_out, str(folder))
    check_links(folder, side_files)
    for name in side_files:
        path = folder / name
        if not path.is_file():  # reading from a pipe, say, would wait for ever
            raise BadCheckpoint(f"{path} is a broken link or no plain file; remove it.")
    sizes = {name: ranges.size(name) for name in weight_files}
    sizes |= {name: (folder / name).stat().st_size for name in side_files}
    local = (*(() if remote is not None else weight_files), *side_files)
    _log.debug("%s: %d tensors in %d files", folder, len(tensors), len(weight_files))
    return Checkpoint(
        folder,
        origin,
        config,
        weights,
        tensors,
        side_files,
        left_out,
        sizes,
        {name: (folder / name).stat().st_mtime_ns for name in local},
        remote,
    )


def _tensors(ranges: Ranges, files: Iterable[str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for name in files:
        header = parse_header(ranges, name)
        twice = next((tensor for tensor in header if tensor in tensors), None)
        if twice is not None:
            raise BadCheckpoint(f"{twice} is stored both in {tensors[twice].file} and {name}.")
        tensors |= header
    return tensors


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise BadCheckpoint for a file that is a link to somewhere outside its checkpoint.

    A stranger's checkpoint must not make this program read, and publish, a file of its user's.
    The Hub's cache is made of links to blobs beside its snapshots; those belong to it.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for name in names:
        target = (folder / name).resolve()
        if not target.is_relative_to(root) and target.parent != blobs:
            raise BadCheckpoint(
                f"{folder / name} is a link out of its checkpoint, to {target}; put the file "
                "itself there."
            )


def _compare_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None:
            raise BadCheckpoint(f"The index places {name} in {file}, whose header lacks it.")
        if entry.file != file:
            raise BadCheckpoint(f"The index places {name} in {file}, but it lies in {entry.file}.")
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise BadCheckpoint(f"{extra} lies in {tensors[extra].file} but the index omits it.")
