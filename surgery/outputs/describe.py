"""Card and manifest: written into an output, and compared with those of the same one made again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.files.checkpoint import Checkpoint
from surgery.files.digests import file_sha256
from surgery.files.generated import CARD, FIGURE, MANIFEST
from surgery.files.text import write_text
from surgery.outputs.card import CHECKPOINT_CARD, CardKind, front_matter, render_card
from surgery.outputs.manifest import Manifest, write_manifest
from surgery.outputs.records import FileRecord


@dataclass(frozen=True)
class FileComparison:
    """One file, as recorded and as made again: two sha256, the second None where it is absent."""

    name: str
    recorded: str
    repeated: str | None

    @property
    def same(self) -> bool:
        """Whether every byte is the same."""
        return self.recorded == self.repeated


def hashed(folder: Path, name: str) -> FileRecord:
    """A file as the manifest records it."""
    path = folder / name
    return FileRecord(name, path.stat().st_size, file_sha256(path))


def describe(
    manifest: Manifest,
    folder: Path,
    base: Checkpoint,
    generated: Sequence[str],
    kind: CardKind = CHECKPOINT_CARD,
) -> Manifest:
    """Write card and manifest into a folder; the manifest with every generated file in it."""
    metadata = front_matter(base.folder / CARD)
    card = render_card(manifest, metadata, kind, figure=FIGURE in generated)
    write_text(folder / CARD, card)
    made = [hashed(folder, name) for name in generated if name != MANIFEST]
    manifest = replace(manifest, files=[*manifest.files, *made])
    write_manifest(manifest, folder)
    return manifest


def compare_files(
    manifest: Manifest, again: Path, repeated: Manifest, kind: CardKind = CHECKPOINT_CARD
) -> tuple[FileComparison, ...]:
    """Every file that a manifest names, and the same one in a folder that was made again."""
    hashes = {record.name: record.sha256 for record in repeated.files}
    if manifest.results is not None and CARD in hashes:
        # Results came after the conversion; the card must be the same but for them.
        with_results = replace(repeated, results=manifest.results)
        figure = (again / FIGURE).is_file()
        card = render_card(with_results, front_matter(again / CARD), kind, figure=figure)
        hashes[CARD] = hashlib.sha256(card.encode()).hexdigest()
    return tuple(
        FileComparison(record.name, record.sha256, hashes.get(record.name))
        for record in manifest.files
    )
