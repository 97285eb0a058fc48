"""A written output that is looked at again: its manifest, and the base it was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files.checkpoint import Checkpoint
from surgery.outputs.manifest import Manifest
from surgery.patient.patient import Patient
from surgery.patient.source import resolve
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
    """

    path: Path
    manifest: Manifest
    base: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    reporter: Reporter = SILENT

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base: the one that the user names, or the one of the manifest.

        Raises:
            BadCheckpoint: when it cannot be had, or is not the recorded one.
        """
        origin, say = self.manifest.base, self.reporter.say
        include = self.manifest.settings.include
        if self.base is not None:
            found = resolve(self.base, say=say, include=include)
        elif origin.kind == "hub":
            found = resolve(origin.name, origin.commit, say, include)
        else:
            try:
                found = resolve(origin.typed, say=say, include=include)
            except SurgeryError as error:
                raise BadCheckpoint(
                    f"the base {origin.typed} is not at hand ({str(error).rstrip('.')}); give it "
                    "with --base."
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
            trust_remote_code=self.trust_remote_code,
        )
        return Patient(checkpoint or self.checkpoint, loading, self.reporter)
