"""The kinds of output: a new one is a file beside this one and a line here."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import BadCheckpoint
from surgery.files.checkpoint import Checkpoint
from surgery.files.generated import MANIFEST
from surgery.files.gguf_file import names_gguf, read_gguf, shards_of
from surgery.outputs.adapter import Adapter
from surgery.outputs.base import Output
from surgery.outputs.folder import Folder
from surgery.outputs.gguf import Gguf
from surgery.outputs.gguf_adapter import GgufAdapter
from surgery.outputs.gguf_container import read_embedded
from surgery.outputs.gguf_names import MANIFEST_KEY
from surgery.outputs.manifest import Manifest, read_manifest
from surgery.outputs.trained import Trained

OUTPUTS: tuple[Output, ...] = (Folder(), Trained(), Adapter(), Gguf(), GgufAdapter())


def output_for(form: str, target: Path | None) -> Output:
    """The kind of output that `--as` and the name of the output ask for."""
    if form == Folder.name and target is not None and names_gguf(target):
        form = Gguf.name
    return next(kind for kind in OUTPUTS if kind.name == form)


def recorded(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest of a checkpoint that surgery wrote, wherever its kind keeps it; else None.

    Raises:
        BadCheckpoint: where there is one that makes no sense.
    """
    if checkpoint.gguf is not None:
        if MANIFEST_KEY not in read_gguf(shards_of(checkpoint.gguf)[0]).values:
            return None
        return read_embedded(checkpoint.gguf)[0]
    held = (checkpoint.folder / MANIFEST).is_file()
    return read_manifest(checkpoint.folder) if held else None


def opened(path: Path) -> tuple[Output, Manifest]:
    """The kind of a written output, and its manifest.

    Raises:
        BadCheckpoint: where surgery did not write it.
    """
    manifest = read_embedded(path)[0] if path.is_file() else read_manifest(path)
    kind = next((kind for kind in OUTPUTS if kind.wrote(manifest, path)), None)
    if kind is None:
        raise BadCheckpoint(f"{path} is not what its manifest says it is.")
    return kind, manifest
