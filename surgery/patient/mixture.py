"""Text as a model meets it: short windows, conversations, and windows long enough for late tokens.

Late tokens may resemble the sink where no early one does, and a chat begins with other tokens than
an article; what is measured on short windows alone says nothing of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import BadSettings
from surgery.patient.chat import has_template
from surgery.patient.texts import SHORTEST, WINDOW, Text, windows

# Tokens of a long window, where the model takes as many.
LONG_WINDOW = 2048
# Characters of a piece of text, about; a longer text is cut at a line's end.
_PIECE = 1500
# Characters that surely make a token.
_CHARACTERS = 12
# Share of a text that becomes the user's turn where it has no paragraphs.
_ASKED = 3


@dataclass(frozen=True)
class Mixture:
    """Sequences of tokens, by what they are.

    Attributes:
        short: windows of a few hundred tokens.
        chats: conversations as the model's chat template writes them; none without a template.
        long: windows of up to `LONG_WINDOW` tokens.
    """

    short: list[list[int]] = field(default_factory=list)
    chats: list[list[int]] = field(default_factory=list)
    long: list[list[int]] = field(default_factory=list)

    @property
    def sequences(self) -> list[list[int]]:
        """All of them, conversations between the short windows, the long ones last."""
        return [*alternating(self.short, self.chats), *self.long]


def alternating(one: Sequence[list[int]], other: Sequence[list[int]]) -> list[list[int]]:
    """Two lists as one, in which the same share of each comes early."""
    places = [
        ((number + 0.5) / len(found), sequence)
        for found in (one, other)
        for number, sequence in enumerate(found)
    ]
    return [sequence for _, sequence in sorted(places, key=lambda pair: pair[0])]


def mix(
    tokenizer: Any,
    texts: Sequence[Text],
    limit: int,
    context: int,
    rows: int | None = None,
    *,
    spare: int = 0,
) -> Mixture:
    """About `limit` tokens: a third in long windows, a third as chats, the rest in short ones.

    At least one long window, where that is not more than half of all; none where half of all is no
    longer than a short one. Each part has texts of its own.

    Args:
        tokenizer: the model's own.
        texts: what to take them from, in this order.
        limit: tokens in all, at most about.
        context: tokens that the model takes.
        rows: of the model's embedding; None where that is not known.
        spare: long windows beyond the limit, where there are any.

    Raises:
        BadCheckpoint: where a token has no row in the embedding.
        BadSettings: where the texts are too short.
    """
    length = min(LONG_WINDOW, context, limit // 2)
    wanted_long = max(1, limit // 3 // length) * length if length > WINDOW else 0
    wanted_chats = min(limit // 3, (limit - wanted_long) // 2) if has_template(tokenizer) else 0
    if wanted_long:
        wanted_long, limit = wanted_long + spare * length, limit + spare * length
    shares = (limit - wanted_long - wanted_chats, wanted_chats, wanted_long)
    parts = _parts(texts, shares)
    usual = min(WINDOW, context)

    def cut(pieces: Sequence[Text], longest: int, wanted: int) -> list[list[int]]:
        return windows(tokenizer, pieces, longest, wanted, rows) if pieces and wanted else []

    try:
        chats = cut([_conversation(piece) for piece in parts[1]], usual, wanted_chats)
    except BadSettings:  # a template that refuses such turns
        chats = []
    joined = Text("text", "\n\n".join(piece.text for piece in parts[2]))
    try:
        long = cut([joined] if parts[2] else [], length, wanted_long)
    except BadSettings:  # too little is left for it
        long = []
    long = [window for window in long if len(window) > usual]
    spent = sum(len(sequence) for sequence in (*chats, *long))
    unused = [*([] if chats else parts[1]), *([] if long else parts[2])]
    short = cut([*parts[0], *unused], usual, max(SHORTEST, limit - spent))
    return Mixture(short, chats, long)


def _parts(texts: Sequence[Text], shares: Sequence[int]) -> list[list[Text]]:
    """Texts in as many runs as there are shares, each with about its share of the characters.

    Conversations stay conversations, and go with the first.
    """
    pieces = list(_pieces([text for text in texts if not text.turns]))
    total = sum(len(piece.text) for piece in pieces)
    enough = [_CHARACTERS * share for share in shares]
    found: list[list[Text]] = [[], [], []]
    part, seen, border = 0, 0, total * shares[0] / sum(shares)
    held = 0
    for piece in pieces:
        while seen >= border and part < len(shares) - 1:
            part, held = part + 1, 0
            border += total * shares[part] / sum(shares)
        seen += len(piece.text)
        if held < enough[part]:
            found[part].append(piece)
            held += len(piece.text)
    found[0] = [*(text for text in texts if text.turns), *found[0]]
    return found


def _pieces(texts: Sequence[Text]) -> list[Text]:
    found = []
    for text in texts:
        begin = 0
        while begin < len(text.text):
            end = text.text.find("\n", begin + _PIECE)
            end = end if end >= 0 and len(text.text) - end > _PIECE // 2 else len(text.text)
            found.append(Text(text.kind, text.text[begin:end]))
            begin = end
    return [piece for piece in found if piece.text.strip()]


def _conversation(piece: Text) -> Text:
    """A text as what a user says and what an assistant goes on with."""
    text = piece.text.strip()
    asked, _, answer = text.partition("\n\n")
    if not answer.strip():
        at = text.find(" ", len(text) // _ASKED)
        asked, answer = (text[:at], text[at + 1 :]) if at > 0 else (text, text)
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return Text(piece.kind, text, turns)
