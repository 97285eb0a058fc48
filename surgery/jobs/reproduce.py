"""Repeating a conversion from its manifest, and comparing every hash."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from surgery.errors import BadSettings
from surgery.files.paths import expanded
from surgery.files.staging import temporary_sibling
from surgery.jobs.convert import convert
from surgery.outputs.describe import FileComparison
from surgery.outputs.manifest import Manifest
from surgery.outputs.registry import opened
from surgery.outputs.review import Review
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings


@dataclass(frozen=True)
class Reproduction:
    """A conversion repeated from its manifest.

    Attributes:
        files: every file, as recorded and as made again.
        versions_differ: versions then and now, by package, where they differ.
    """

    files: tuple[FileComparison, ...]
    versions_differ: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether every byte is the same."""
        return all(file.same for file in self.files)


def reproduce(
    folder: str | Path,
    *,
    base: str | None = None,
    stream: bool | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> Reproduction:
    """Convert again from the manifest (base commit, settings, seeds) and compare every hash.

    Args:
        folder: a converted checkpoint, or a .gguf file, which holds its manifest. The repeated one
            is written beside it and removed again.
        base: the base model, when it is not where the manifest says.
        stream: whether the base runs layer by layer; None for what suits its size.
        trust_remote_code: whether the base's own Python code may run.
        reporter: whom to tell.

    Raises:
        BadSettings: where the manifest asks to trust code and the caller does not, and for what
            was trained.
    """
    path = expanded(folder).resolve()
    kind, manifest = opened(path)
    kind.require_repeatable(path)
    settings, origin = manifest.settings, manifest.base
    if settings.trust_remote_code and not trust_remote_code:
        raise BadSettings(
            f"{path} was made with --trust-remote-code, which runs the base model's own Python "
            "code; read that, and give --trust-remote-code if you trust it."
        )
    review = Review(path, manifest, base, reporter=reporter)
    found = review.checkpoint.origin
    options = {known.name: getattr(settings, known.name) for known in fields(Settings)}
    options |= {
        "model": review.source,
        "calibration": review.calibration,
        "stream": stream,
        "revision": found.commit if found.kind == "hub" else None,
    }
    with temporary_sibling(path.with_name(f"{path.name}.again")) as temporary:
        made = convert(
            **options,
            output=temporary / kind.repeated_name(path, manifest),
            reporter=reporter,
            spoken_as=(settings.model, settings.revision, origin),
        )
        assert made.manifest is not None
        files = kind.compare(review, made.output, made.manifest)
    return Reproduction(files, _differing(manifest, made.manifest))


def _differing(manifest: Manifest, again: Manifest) -> dict[str, tuple[str, str]]:
    """Versions then and now, where they differ."""
    return {
        name: (version, again.versions.get(name, "absent"))
        for name, version in manifest.versions.items()
        if version != again.versions.get(name)
    }
