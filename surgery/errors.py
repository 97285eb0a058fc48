"""What can go wrong, in words for the person at the terminal.

Every error here becomes one sentence on stderr and the exit code of its class.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What a library said, its first line; what it is where it said nothing."""
    return str(error).strip().partition("\n")[0] or repr(error)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which cleans up as an interruption from the keyboard does."""


class SurgeryError(Exception):
    """A failure the user can act on: says what is wrong and what to do."""

    exit_code = 1


class BadSettings(SurgeryError):
    """Settings that contradict each other or ask for nothing."""

    exit_code = 2


class NoEmergence(SurgeryError):
    """The model has no Massive Emergence Layer, or the prompts disagree about it."""

    exit_code = 3


class QualityGate(SurgeryError):
    """The folded model is worse than allowed."""

    exit_code = 4


class VerificationFailed(SurgeryError):
    """A written checkpoint is not what its manifest says."""

    exit_code = 5


class Unsupported(SurgeryError):
    """An architecture, fold or container that cannot be edited truthfully."""

    exit_code = 6


class BadCheckpoint(SurgeryError):
    """A source that is missing, truncated, inconsistent or not a checkpoint."""

    exit_code = 7
