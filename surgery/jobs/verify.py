"""Looking at a converted checkpoint again: verify it, repeat it, render its card anew."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError
from surgery.files.checkpoint import Checkpoint, check_links
from surgery.files.digests import file_sha256
from surgery.files.generated import CARD, FIGURE, MANIFEST
from surgery.files.gguf_file import shards_of
from surgery.files.staging import temporary_sibling, write_whole
from surgery.jobs.convert import behaviour, convert
from surgery.method.mask import Mask
from surgery.outputs.card import front_matter, render_card
from surgery.outputs.gguf_conversion import read_embedded
from surgery.outputs.manifest import FileRecord, Manifest, read_manifest, write_manifest
from surgery.outputs.plan import edits_by_file
from surgery.outputs.results import results_for
from surgery.outputs.verification import (
    Verification,
    verify_edits,
    verify_files,
    verify_originals,
    verify_structure,
    verify_untouched,
)
from surgery.patient.analysis import examine
from surgery.patient.quantised import dequantised
from surgery.patient.source import resolve
from surgery.patient.subject import Subject
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings


def base_of(manifest: Manifest, base: str | None = None, reporter: Reporter = SILENT) -> Checkpoint:
    """The checkpoint a manifest says it was made from, or the one the user names.

    Raises BadCheckpoint when it cannot be had or is not the recorded one.
    """
    origin = manifest.base
    if base is not None:
        found = resolve(base, say=reporter.say)
    elif origin.kind == "hub":
        found = resolve(origin.name, origin.commit, say=reporter.say)
    else:
        try:
            found = resolve(origin.typed, say=reporter.say)
        except SurgeryError as error:
            raise BadCheckpoint(
                f"the base {origin.typed} is not at hand ({str(error).rstrip('.')}); give it with "
                "--base."
            ) from error
    if origin.sha256 and found.origin.sha256 and origin.sha256 != found.origin.sha256:
        raise BadCheckpoint(
            f"{found.origin.typed} is not the file this was made from (another sha256)."
        )
    return found


def settings_of(manifest: Manifest, **changes: Any) -> Settings:
    """The settings of a conversion, from its manifest."""
    known = {key: value for key, value in manifest.settings.items() if key in _FIELDS}
    if known.get("layers") is not None:
        known["layers"] = tuple(known["layers"])
    try:
        return Settings(**{**known, **changes})
    except TypeError as error:
        raise BadCheckpoint(f"The manifest's settings are damaged: {error}.") from error


_FIELDS = set(Settings.__dataclass_fields__)


def verify(
    folder: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> Verification:
    """Prove a written checkpoint against its base: bytes, edits, stock load, logits.

    folder: a converted checkpoint, or a .gguf file, which holds its manifest. base: the base model,
    when it is not where the manifest says. The result says which checks held; `require()` raises
    VerificationFailed. Raises BadCheckpoint when there is no manifest or no base, BadSettings for a
    base of a .gguf file, which holds its own.
    """
    path = Path(folder)
    manifest = read_embedded(path)[0] if path.is_file() else read_manifest(path)
    settings = settings_of(manifest, device=device, trust_remote_code=trust_remote_code)
    adapter = settings.form != "checkpoint"
    if path.is_file() and not adapter:
        from surgery.outputs.products import verify_gguf

        if base is not None:
            raise BadSettings(f"{path.name} holds what restores its base; leave out --base {base}.")
        return verify_gguf(path, settings, reporter)
    checkpoint = base_of(manifest, base, reporter)
    if adapter:
        from surgery.outputs.products import verify_adapter, verify_gguf_adapter

        plain = dequantised(checkpoint, reporter.say)
        anatomy = examine(plain, trust_remote_code=trust_remote_code)
        if path.is_file():
            return Verification((verify_gguf_adapter(path, manifest, plain, anatomy),))
        files = verify_files(path, manifest.files)
        if not files.passed:
            return Verification((files,))
        checks = verify_adapter(path, manifest, plain, anatomy, settings, reporter)
        return Verification((files, *checks))
    if manifest.training is not None:
        from surgery.training.trained import verify_trained

        anatomy = examine(checkpoint, trust_remote_code=trust_remote_code)
        return verify_trained(path, manifest, checkpoint, anatomy)
    edits = manifest.rebuilt_edits()
    reporter.say("Comparing bytes")
    checks = [verify_files(path, manifest.files), verify_structure(checkpoint, path)]
    if all(check.passed for check in checks[1:]):
        edits_by_file(checkpoint, edits)  # a damaged manifest may name anything
        checks.append(verify_edits(checkpoint, path, edits))
        checks.append(verify_untouched(checkpoint, path, edits))
        originals = {
            record.tensor: base64.b64decode(record.original)
            for record in manifest.edits
            if record.original is not None
        }
        if originals:
            checks.append(verify_originals(checkpoint, originals))
        plain = dequantised(checkpoint, reporter.say)
        anatomy = examine(plain, trust_remote_code=trust_remote_code)
        mask = Mask(
            manifest.hidden_size,
            settings.select,
            manifest.strength,
            {layer: tuple(chosen) for layer, chosen in manifest.dimensions.items()},
        )
        subject = Subject(plain, settings, reporter)
        checks += behaviour(subject, anatomy, mask, edits, path, settings)
    return Verification(tuple(checks))


@dataclass(frozen=True)
class FileComparison:
    """One file, as recorded and as made again."""

    name: str
    recorded: str
    repeated: str | None

    @property
    def same(self) -> bool:
        return self.recorded == self.repeated


@dataclass(frozen=True)
class Reproduction:
    """A conversion repeated from its manifest."""

    files: tuple[FileComparison, ...]
    versions_differ: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        return all(file.same for file in self.files)


def reproduce(
    folder: str | Path,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter = SILENT,
) -> Reproduction:
    """Convert again from the manifest (base commit, settings, seeds) and compare every hash.

    folder: a converted checkpoint, or a .gguf file, which holds its manifest. The repeated one is
    written beside it and removed again. Raises BadSettings where the manifest asks to trust code
    and the caller does not.
    """
    path = Path(folder).resolve()
    single = path.is_file()
    manifest = read_embedded(path)[0] if single else read_manifest(path)
    if manifest.training is not None:
        raise BadSettings(
            f"{path} was trained; run its recipe again with surgery finetune instead."
        )
    if manifest.settings.get("trust_remote_code") and not trust_remote_code:
        raise BadSettings(
            f"{path} was made with --trust-remote-code, which runs the base model's own Python "
            "code; read that, and give --trust-remote-code if you trust it."
        )
    checkpoint = base_of(manifest, base, reporter)
    origin = manifest.base
    typed = base or (origin.name if origin.kind == "hub" else origin.typed)
    options = {
        name: value
        for name, value in vars(settings_of(manifest)).items()
        if name not in ("model", "revision", "device")
    }
    revision = checkpoint.origin.commit if checkpoint.origin.kind == "hub" else None
    with temporary_sibling(path.with_name(f"{path.name}.again")) as temporary:
        name = "again"
        if single:  # a converted .gguf names its files in its manifest
            name = manifest.files[0].name if manifest.files else path.name
        output = temporary / name
        made = convert(
            typed,
            revision=revision,
            output=output,
            reporter=reporter,
            spoken_as=(str(manifest.settings["model"]), manifest.settings.get("revision"), origin),
            **options,
        )
        again = made.manifest
        assert again is not None
        differ = {
            name: (manifest.versions[name], again.versions.get(name, "absent"))
            for name in manifest.versions
            if manifest.versions[name] != again.versions.get(name)
        }
        if single:  # whose hashes nothing records: they are those of the files at hand
            pairs = zip(shards_of(path), shards_of(made.output), strict=True)
            files = [FileComparison(a.name, file_sha256(a), file_sha256(b)) for a, b in pairs]
            return Reproduction(tuple(files), differ)
        repeated = {record.name: record.sha256 for record in again.files}
        if manifest.results is not None and CARD in repeated:
            # Results came after the conversion; the card must be the same but for them.
            with_results = replace(again, results=manifest.results)
            figure = (output / FIGURE).is_file()
            card = render_card(with_results, front_matter(output / CARD), figure=figure)
            repeated[CARD] = hashlib.sha256(card.encode()).hexdigest()
    return Reproduction(
        tuple(
            FileComparison(record.name, record.sha256, repeated.get(record.name))
            for record in manifest.files
        ),
        differ,
    )


def refresh_card(folder: str | Path, *, results: str | Path | None = None) -> Path:
    """Render the card again from the manifest, which is all it needs; returns its path.

    results: a results file of `compare`, whose figures for this checkpoint the manifest and the
    card then hold; BadSettings when it was not measured on it, and for a .gguf file. Metadata
    inherited from the base card is kept from the present card.
    """
    path = Path(folder)
    if path.suffix == ".gguf" and path.is_file():
        raise BadSettings(
            f"{path} has no card: a .gguf file carries its provenance inside, and surgery inspect "
            "shows it."
        )
    check_links(path, (MANIFEST, CARD, FIGURE))
    manifest = read_manifest(path)
    if results is not None:
        manifest = replace(manifest, results=results_for(Path(results), manifest))
    figure = (path / FIGURE).is_file()
    card = render_card(manifest, front_matter(path / CARD), figure=figure).encode()
    known = {record.name for record in manifest.files}
    if CARD not in known:
        raise BadSettings(f"{path} was not written with a card.")
    write_whole(path / CARD, card)
    record = FileRecord(CARD, len(card), hashlib.sha256(card).hexdigest())
    files = [record if known_file.name == CARD else known_file for known_file in manifest.files]
    write_manifest(replace(manifest, files=files), path)
    return path / CARD
