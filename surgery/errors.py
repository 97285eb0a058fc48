"""What can go wrong, in words for the person at the terminal.

Every error here becomes one sentence on stderr and the exit code of its class.
"""

from __future__ import annotations

import re

# A line that only announces how many lines with reasons follow, two lines to each (pydantic's).
_COUNT = re.compile(r"\d+ validation errors? for ")
# What torch says last, behind several lines of advice that would be wrong here.
_REASONS = ("WeightsUnpickler error:",)
# Lines of one sentence, and errors that led to one another, at most.
_LINES, _CAUSES = 6, 8


def first_line(error: BaseException) -> str:
    """What a library said, as one line that has the reason; what it is where it said nothing.

    Often the first line only announces the reason: it ends in a colon, or is the beginning of a
    list. Then the next ones belong to it, or what the error was raised from.
    """
    chain = list(_chain(error))
    said = [_said(one) for one in chain]
    found = next((number for number, words in enumerate(said) if words), None)
    if found is None:
        return repr(error)
    sentence = said[found]
    for words in said[found + 1 :]:
        if not sentence.endswith(":"):
            break
        sentence = f"{sentence} {words}" if words else sentence
    return sentence


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those it was raised from, the nearest first."""
    found = [error]
    while len(found) < _CAUSES:
        last = found[-1]
        cause = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if cause is None or cause in found:
            break
        found.append(cause)
    return found


def _said(error: BaseException) -> str:
    """The words of one error; empty where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return ""
    for line in lines:
        if line.startswith(_REASONS):
            return line
    if isinstance(error, KeyError):  # which says the key alone
        return f"{type(error).__name__}: {lines[0]}"
    count = 3 if _COUNT.match(lines[0]) else 1
    while count < min(_LINES, len(lines)) and lines[count - 1].endswith((":", ",", ";")):
        count += 1
    return " ".join(lines[:count])


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
