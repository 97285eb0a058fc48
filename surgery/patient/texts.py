"""The texts a model is observed, calibrated and measured on, and their tokens.

The bundled texts were written for this project; `calibration` is for locating and for the sink
direction, `heldout` for measuring.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import BadSettings, SurgeryError, first_line
from surgery.files.text import read_text

FOLDER = Path(__file__).parent / "data"
# The first lines of the bundled calibration text are one prompt of each kind, from about ten to
# over a thousand tokens (Appendix D).
LOCATING_PROMPTS = 8
# Tokens of context in calibration and measurement.
WINDOW = 256
# Longest prompt when locating.
LONGEST_PROMPT = 1100
# What names a data set rather than a file, and characters that surely make a token of its text.
HUB = "hub:"
_CHARACTERS = 12
# Shorter remainders of a text say little about a model.
SHORTEST = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        kind: What kind it is, such as "code"; "text" where nobody says.
        text: The text itself.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to observe a model on: what kind of text, the text, its tokens."""

    kind: str
    text: str
    tokens: tuple[int, ...]


def bundled(name: str) -> list[Text]:
    """The bundled texts "calibration" or "heldout"."""
    return read_texts(FOLDER / f"{name}.jsonl")


def read_texts(path: Path) -> list[Text]:
    """Texts from a JSONL file ("text", or "messages" with "content") or a plain text file.

    Raises:
        BadSettings: The file holds no usable text.
    """
    try:
        raw = read_text(path)
    except (OSError, ValueError) as error:
        raise BadSettings(f"The text file {path} cannot be read: {error}.") from error
    if path.suffix in (".jsonl", ".json"):
        texts = [_from_line(path, number, line) for number, line in _lines(raw)]
    else:
        texts = [Text("text", raw)]
    texts = [text for text in texts if text.text.strip()]
    if not texts:
        raise BadSettings(f"The text file {path} holds no text.")
    _log.debug("%s: %d texts", path, len(texts))
    return texts


def _lines(raw: str) -> list[tuple[int, str]]:
    lines = raw.splitlines()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _from_line(path: Path, number: int, line: str) -> Text:
    try:
        return _from_row(json.loads(line))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise BadSettings(
            f'{path}, line {number}: expected a JSON object with "text" or "messages".'
        ) from error


def _from_row(row: Any) -> Text:
    kind = str(row.get("kind", "text"))
    if "text" in row:
        return Text(kind, str(row["text"]))
    return Text(kind, "\n".join(str(turn["content"]) for turn in row["messages"]))


def dataset_texts(name: str, tokens: int) -> list[Text]:
    """The first rows of a Hub data set as one text, enough for about `tokens` tokens.

    Rows have "text", or "messages" with "content".

    Args:
        name: hub:REPOSITORY[[:CONFIGURATION]:SPLIT]; the split is "test" unless given.
        tokens: How many tokens are wanted.

    Raises:
        SurgeryError: It cannot be read.
        BadSettings: It holds no text.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SurgeryError(
            "--text hub:... needs datasets: pip install 'wemask-surgery[eval]'."
        ) from error
    repository, *rest = name.removeprefix(HUB).split(":")
    configuration = rest[0] if len(rest) > 1 else None
    rows: list[str] = []
    size = 0
    try:
        for row in load_dataset(
            repository, configuration, split=rest[-1] if rest else "test", streaming=True
        ):
            rows.append(_from_row(row).text.rstrip("\n"))
            size += len(rows[-1])
            if size >= _CHARACTERS * tokens:
                break
    except Exception as error:  # whatever the Hub, the network or the data set's files give
        raise SurgeryError(f"The data set {name} cannot be read: {first_line(error)}") from error
    if not size:
        raise BadSettings(f"The data set {name} holds no text.")
    return [Text("text", "\n".join(rows))]


def encode(tokenizer: Any, texts: Sequence[Text], longest: int) -> list[list[int]]:
    """Each text's tokens, with the tokenizer's special tokens, cut to `longest`."""
    return [_ids(tokenizer, text.text)[:longest] for text in texts]


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def windows(
    tokenizer: Any, texts: Sequence[Text], length: int = WINDOW, limit: int | None = None
) -> list[list[int]]:
    """Texts cut into sequences of at most `length` tokens, each with the usual first token.

    Whatever the tokenizer puts in front (a BOS, in many models the sink) stands in front of every
    sequence, so that each one looks like the beginning of a prompt.

    Args:
        tokenizer: The model's own.
        texts: What to cut.
        length: Tokens of a sequence, at most.
        limit: Tokens after which to stop, with one sequence at least.

    Raises:
        BadSettings: No text has the tokens of a short sequence.
    """
    found: list[list[int]] = []
    total = 0
    for text in texts:
        plain = _ids(tokenizer, text.text, add_special_tokens=False)
        prefix = _prefix(_ids(tokenizer, text.text), plain)
        step = length - len(prefix)
        for start in range(0, len(plain), step):
            part = plain[start : start + step]
            if limit is not None:
                part = part[: max(SHORTEST, limit - total - len(prefix))]
            if len(part) < SHORTEST:
                continue
            found.append([*prefix, *part])
            total += len(found[-1])
            if limit is not None and total + len(prefix) + SHORTEST > limit:
                return found
    if not found:
        raise BadSettings("The texts are too short to measure anything on.")
    return found


def _prefix(full: list[int], plain: list[int]) -> list[int]:
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
