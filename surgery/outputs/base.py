"""The protocol of a kind of output: where an edit goes, and how it is looked at again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from surgery.errors import BadSettings
from surgery.files.checkpoint import Checkpoint
from surgery.outputs.card import CHECKPOINT_CARD, CardKind
from surgery.outputs.checks import Check, Verification
from surgery.outputs.describe import FileComparison
from surgery.outputs.manifest import Manifest
from surgery.outputs.operation import Operation
from surgery.outputs.plan import Plan
from surgery.outputs.review import Review
from surgery.settings import Settings


@dataclass(frozen=True)
class Request:
    """What is asked for, before anything is loaded.

    Attributes:
        checkpoint: of the base, as it is stored.
        settings: of the conversion.
        target: where the output is to be.
        overwrite: whether an earlier conversion may be replaced.
    """

    checkpoint: Checkpoint
    settings: Settings
    target: Path
    overwrite: bool


@dataclass(frozen=True)
class Restored:
    """A base that was restored from an output.

    Attributes:
        source: where the original values came from: "manifest", "undo file" or "base".
        files: how many were restored, each with the base's sha256.
        not_carried: files of the base that the conversion had left out, so that they are not here
            either.
    """

    source: str
    files: int
    not_carried: tuple[str, ...] = ()


class Output(ABC):
    """A kind of output; `surgery.outputs.registry` holds one object of each."""

    name: ClassVar[str]
    # Whether it is a file with its provenance inside, without a card.
    one_file: ClassVar[bool] = False
    card: ClassVar[CardKind] = CHECKPOINT_CARD

    @abstractmethod
    def default_path(self, stem: str, words: Sequence[str]) -> Path:
        """Where it goes when nobody says: from the base's name and words for the settings."""

    @abstractmethod
    def accept(self, request: Request) -> None:
        """Refuse, before anything is loaded, what can never be written.

        Raises:
            BadSettings, Unsupported or BadCheckpoint: with the reason and a way out.
        """

    @abstractmethod
    def plan(self, operation: Operation, target: Path, *, overwrite: bool) -> Plan:
        """Decide every file of the output and check all that can be checked; writes nothing."""

    @abstractmethod
    def write(
        self, plan: Plan, manifest: Manifest, operation: Operation
    ) -> tuple[Verification, Manifest]:
        """Write what was planned, verified before it gets its name.

        Raises:
            VerificationFailed: where it is not what it was to be; then nothing is left behind.
        """

    @abstractmethod
    def wrote(self, manifest: Manifest, path: Path) -> bool:
        """Whether an output at a path, with this manifest, is of this kind."""

    @abstractmethod
    def checks(self, review: Review) -> Sequence[Check]:
        """Prove a written output against its base."""

    @abstractmethod
    def restore(self, review: Review, target: Path) -> Restored:
        """Write the base again, byte for byte, checked against the recorded hashes."""

    def require_repeatable(self, path: Path) -> None:  # noqa: B027  (most are)
        """Raise BadSettings where no conversion makes such an output again."""

    def repeated_name(self, _path: Path, _manifest: Manifest) -> str:
        """The name under which a repeated output is written for comparison."""
        return "again"

    @abstractmethod
    def compare(
        self, review: Review, again: Path, repeated: Manifest
    ) -> tuple[FileComparison, ...]:
        """Every file of an output beside the same conversion made again."""


def no_undo_of_adapter(path: Path) -> BadSettings:
    """Why an adapter is not reverted."""
    return BadSettings(
        f"{path} is an adapter, which changes no byte of its base; there is nothing to undo."
    )


def require_low_rank(request: Request) -> None:
    """Raise BadSettings unless the edit is an adapter's: a low-rank update that does something."""
    settings = request.settings
    if not settings.fold_used.low_rank:
        raise BadSettings(
            f"--as {settings.form} needs --fold sink: the other folds are no low-rank updates."
        )
    if settings.strength == 0.0:
        raise BadSettings("At --strength 0 there is nothing for an adapter to hold; give another.")


def refuse_what_folders_have(request: Request) -> None:
    """Raise BadSettings for files beside the weights, of what has none beside it."""
    if request.settings.undo_file:
        raise BadSettings(
            "--undo-file is for checkpoint folders: a .gguf file is undone from its own metadata, "
            "and an adapter changes no byte of its base; leave it out."
        )
    if request.settings.include:
        raise BadSettings(
            "--include is for checkpoint folders: a .gguf file is one file, and an adapter carries "
            "nothing of its base; leave it out."
        )
