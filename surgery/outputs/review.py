"""A written output that is looked at again: its manifest, and the base it was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files.checkpoint import Checkpoint
from surgery.outputs.manifest import Manifest
from surgery.outputs.places import Places, recalled
from surgery.patient.patient import Patient
from surgery.patient.source import DEMO, existing, resolve
from surgery.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Review:
    """An output on the table again.

    Attributes:
        path: the folder or file.
        manifest: what it says of itself.
        base: the base model, when it is not where the manifest says.
        device: to compare logits on; None for the best there is.
        trust_remote_code: whether the base's own Python code may run.
        reporter: whom to tell.
        stream: as `Loading` has it.
    """

    path: Path
    manifest: Manifest
    base: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    reporter: Reporter = SILENT
    stream: bool | None = None

    @cached_property
    def places(self) -> Places:
        """Where on this machine lies what the manifest names by its last part."""
        return recalled(self.manifest)

    @property
    def source(self) -> str:
        """What leads to the base: what the user names, a Hub id, or where it lay.

        Raises:
            BadCheckpoint: when it does not lie there any more, or nobody here knows where.
        """
        origin = self.manifest.base
        if self.base is not None:
            return self.base
        if origin.kind == "hub":
            return origin.name
        for place in (self.places.model, origin.typed):
            if place is not None and (place == DEMO or existing(place) is not None):
                return place
        raise BadCheckpoint(
            f"the base {origin.typed} is not at hand (no such folder or file here); give it with "
            "--base."
        )

    @property
    def calibration(self) -> str | None:
        """The calibration text, as far as it is at hand."""
        return self.places.calibration or self.manifest.settings.calibration

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base: the one that the user names, or the one of the manifest.

        Raises:
            BadCheckpoint: when it cannot be had, or is not the recorded one.
        """
        origin, say = self.manifest.base, self.reporter.say
        include = self.manifest.settings.include
        revision = origin.commit if origin.kind == "hub" and self.base is None else None
        try:
            found = resolve(self.source, revision, say, include)
        except SurgeryError as error:
            if self.base is not None or origin.kind == "hub" or "is not at hand" in str(error):
                raise
            raise BadCheckpoint(
                f"the base {origin.typed} is not at hand ({str(error).rstrip('.')}); give it with "
                "--base."
            ) from error
        if origin.sha256 and found.origin.sha256 and origin.sha256 != found.origin.sha256:
            raise BadCheckpoint(
                f"{found.origin.typed} is not the file this was made from (another sha256)."
            )
        return found

    def patient(self, checkpoint: Checkpoint | None = None) -> Patient:
        """The base, or another checkpoint, loaded as the conversion loaded it."""
        loading = replace(
            self.manifest.settings.loading,
            device=self.device,
            calibration=self.calibration,
            trust_remote_code=self.trust_remote_code,
            stream=self.stream,
        )
        return Patient(checkpoint or self.checkpoint, loading, self.reporter)
