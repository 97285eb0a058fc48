"""Rendering the model card again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from surgery.errors import BadSettings
from surgery.files.checkpoint import check_links
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE, MANIFEST
from surgery.files.gguf_file import is_gguf
from surgery.files.paths import expanded
from surgery.files.staging import write_whole
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.manifest import write_manifest
from surgery.outputs.places import shown_data, shown_origin, shown_settings
from surgery.outputs.records import FileRecord
from surgery.outputs.registry import opened
from surgery.outputs.results import results_for


def refresh_card(folder: str | Path, *, results: str | Path | None = None) -> Path:
    """Render the card again from the manifest, which is all it needs; returns its path.

    Metadata inherited from the base card is kept from the present card.

    Args:
        folder: a converted checkpoint.
        results: a results file of `compare`, whose figures for this checkpoint the manifest and the
            card then hold.

    Raises:
        BadSettings: when the results were not measured on this checkpoint, and for a .gguf file.
    """
    path = expanded(folder)
    if is_gguf(path):
        raise BadSettings(
            f"{path} has no card: a .gguf file carries its provenance inside, and surgery inspect "
            "shows it."
        )
    check_links(path, (MANIFEST, CARD, FIGURE))
    kind, manifest = opened(path)
    known = {record.name: record.sha256 for record in manifest.files}
    if results is not None:
        manifest = replace(manifest, results=results_for(expanded(results), known))
    # An earlier version wrote down paths as they were typed.
    manifest = replace(
        manifest,
        base=shown_origin(manifest.base),
        settings=shown_settings(manifest.settings, manifest.base),
        training=shown_data(manifest.training),
    )
    card = render_card(
        manifest,
        front_matter(path / CARD),
        kind.card,
        figure=(path / FIGURE).is_file(),
        loss_figure=(path / LOSS_FIGURE).is_file(),
    ).encode()
    if CARD not in known:
        raise BadSettings(f"{path} was not written with a card.")
    write_whole(path / CARD, card)
    record = FileRecord(CARD, len(card), hashlib.sha256(card).hexdigest())
    files = [record if file.name == CARD else file for file in manifest.files]
    write_manifest(replace(manifest, files=files), path)
    return path / CARD
