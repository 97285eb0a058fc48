"""The texts a model is observed, calibrated and measured on, and their tokens.

The bundled texts were written for this project; `calibration` is for locating and for the sink
direction, `heldout` for measuring.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, first_line
from surgery.files.paths import expanded
from surgery.files.text import read_text
from surgery.patient.chat import Turn, has_template, plain_text, read_turns, render

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
    """A text, or a conversation that becomes one when a model's tokenizer is at hand.

    Attributes:
        kind: What kind it is, such as "code"; "text" where nobody says.
        text: The text itself; of a conversation what is said in it.
        turns: Of a conversation; empty for a text.
    """

    kind: str
    text: str
    turns: tuple[Turn, ...] = ()


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
    """Texts from a JSONL file ("text", or "messages" of a chat) or a plain text file.

    Raises:
        BadSettings: The file holds no usable text.
    """
    path = expanded(path)
    try:
        raw = read_text(path)
    except (OSError, ValueError) as error:
        raise BadSettings(f"The text file {path} cannot be read: {error}.") from error
    if path.suffix in (".jsonl", ".json"):
        texts = [_from_line(path, number, line) for number, line in _lines(raw)]
    else:
        texts = [Text("text", raw)]
    texts = [text for text in texts if text.text.strip() or text.turns]
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
    except (ValueError, RecursionError) as error:
        raise BadSettings(
            f'{path}, line {number}: expected a JSON object with "text" or "messages".'
        ) from error
    except BadSettings as error:
        raise BadSettings(f"{path}, line {number}: {error}") from error


def _from_row(row: Any) -> Text:
    if not isinstance(row, Mapping):
        raise BadSettings('expected a JSON object with "text" or "messages".')
    kind = row.get("kind")
    kind = kind if isinstance(kind, str) else "text"
    text, turns = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return Text(kind, text)
    if text is not None or turns is None:
        raise BadSettings('expected a JSON object with "text" or "messages".')
    read = read_turns(turns)
    return Text(kind, plain_text(read), read)


def dataset_texts(name: str, tokens: int) -> list[Text]:
    """The first rows of a Hub data set, enough for about `tokens` tokens.

    Rows have "text", and make one text together, or "messages", each row a conversation.

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
    rows: list[Text] = []
    size = 0
    try:
        for row in load_dataset(
            repository, configuration, split=rest[-1] if rest else "test", streaming=True
        ):
            rows.append(_from_row(row))
            size += len(rows[-1].text)
            if size >= _CHARACTERS * tokens:
                break
    except Exception as error:  # whatever the Hub, the network or the data set's files give
        raise SurgeryError(f"The data set {name} cannot be read: {first_line(error)}") from error
    if not size:
        raise BadSettings(f"The data set {name} holds no text.")
    plain = [row.text.rstrip("\n") for row in rows if not row.turns]
    joined = [Text("text", "\n".join(plain))] if plain else []
    return [*joined, *(row for row in rows if row.turns)]


def written(tokenizer: Any, text: Text) -> str:
    """A text as the model sees it; a conversation as its chat template writes it."""
    return render(tokenizer, text.turns) if text.turns else text.text


class Encoder:
    """Makes the token ids that a model gets, of which each has its row in the embedding.

    A tokenizer may know more tokens than the model: of another model, or with words that were
    added without room for them. Every id is compared with the embedding before anything runs.
    """

    def __init__(self, tokenizer: Any, rows: int | None = None) -> None:
        """Nothing is read yet.

        Args:
            tokenizer: the model's own.
            rows: of the model's embedding; None where that is not known.
        """
        self._tokenizer, self._rows = tokenizer, rows

    def ids(self, text: Text) -> list[int]:
        """A text's tokens, with the special tokens that the tokenizer or the template adds."""
        # A template writes them into the text, where the tokenizer would add them once more.
        by_template = bool(text.turns) and has_template(self._tokenizer)
        return self._ids(written(self._tokenizer, text), add_special_tokens=not by_template)

    def prefix_and_rest(self, text: Text) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of every text, and the text's tokens without it."""
        rendered = written(self._tokenizer, text)
        plain = self._ids(rendered, add_special_tokens=False)
        prefix = _prefix(self._ids(rendered), plain)
        if text.turns and prefix and plain[: len(prefix)] == prefix:
            plain = plain[len(prefix) :]  # the template wrote them, too
        return prefix, plain

    def _ids(self, text: str, **options: Any) -> list[int]:
        found = list(self._tokenizer(text, verbose=False, **options)["input_ids"])
        check_ids(self._tokenizer, found, self._rows)
        return found


def check_ids(tokenizer: Any, ids: Iterable[int], rows: int | None) -> None:
    """Raise BadCheckpoint for a token that has no row in the model's embedding.

    Args:
        tokenizer: that made them, for the token's name.
        ids: token ids.
        rows: of the embedding; None where that is not known.
    """
    largest = max(ids, default=0)
    if rows is None or largest < rows:
        return
    raise BadCheckpoint(
        f"The tokenizer gives the token {tokenizer.convert_ids_to_tokens(largest)!r} the id "
        f"{largest}, but the model's embedding has {rows} rows, 0 to {rows - 1}: use the tokenizer "
        "that belongs to these weights, or enlarge the embedding (resize_token_embeddings) first."
    )


def encode(
    tokenizer: Any, texts: Sequence[Text], longest: int, rows: int | None = None
) -> list[list[int]]:
    """Each text's tokens, with the tokenizer's special tokens, cut to `longest`.

    Args:
        tokenizer: The model's own.
        texts: What to encode.
        longest: Tokens of a text, at most.
        rows: Of the model's embedding; None where that is not known.

    Raises:
        BadCheckpoint: A token has no row in the embedding.
        BadSettings: A conversation cannot be written as the model would see it.
    """
    encoder = Encoder(tokenizer, rows)
    return [encoder.ids(text)[:longest] for text in texts]


def windows(
    tokenizer: Any,
    texts: Sequence[Text],
    length: int = WINDOW,
    limit: int | None = None,
    rows: int | None = None,
) -> list[list[int]]:
    """Texts cut into sequences of at most `length` tokens, each with the usual first token.

    Whatever the tokenizer puts in front (a BOS, in many models the sink) stands in front of every
    sequence, so that each one looks like the beginning of a prompt.

    Args:
        tokenizer: The model's own.
        texts: What to cut.
        length: Tokens of a sequence, at most.
        limit: Tokens after which to stop, with one sequence at least.
        rows: Of the model's embedding; None where that is not known.

    Raises:
        BadCheckpoint: A token has no row in the embedding.
        BadSettings: No text has the tokens of a short sequence, or a conversation cannot be
            written as the model would see it.
    """
    encoder = Encoder(tokenizer, rows)
    found: list[list[int]] = []
    total = 0
    for text in texts:
        prefix, plain = encoder.prefix_and_rest(text)
        step = length - len(prefix)
        if step < 1:
            raise BadSettings(
                f"Sequences of {length} tokens are too short to measure anything on: the tokenizer "
                f"puts {len(prefix)} in front of each."
            )
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
