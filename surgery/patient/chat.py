"""Conversations: turns as data sets store them, and the text that a model's template makes of them.

Python's repr of a list or of None is no text that anybody wrote: a turn is read as what it means,
or refused in one sentence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.errors import BadSettings, first_line

Turn = Mapping[str, Any]

# Parts of a turn that are text, by the names that several interfaces give them.
_TEXT_PARTS = ("text", "input_text", "output_text")
# Roles whose turns are what people and models say, which make a text without a template too.
_PLAIN_ROLES = ("user", "assistant")

_log = logging.getLogger(__name__)


def read_turns(value: Any) -> tuple[Turn, ...]:
    """Turns with text as their content, or None for null, whatever form it is stored in.

    Content may be text, a list of parts that are text, or null, as beside tool calls; the other
    fields of a turn are kept.

    Raises:
        BadSettings: for anything else, saying what.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadSettings(f"messages are {_kind(value)} instead of a list of turns.")
    return tuple(_turn(number, one) for number, one in enumerate(value, 1))


def _turn(number: int, value: Any) -> Turn:
    if not isinstance(value, Mapping):
        raise BadSettings(f"turn {number} is {_kind(value)} instead of an object.")
    role = value.get("role")
    if role is not None and not isinstance(role, str):
        raise BadSettings(f"the role of turn {number} is {_kind(role)} instead of text.")
    return {**value, "content": _content(number, value)}


def _content(number: int, turn: Turn) -> str | None:
    content = turn.get("content")
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(_part(number, part) for part in content)
    raise BadSettings(f"the content of turn {number} is {_kind(content)} instead of text.")


def _part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind, text = part.get("type", "text"), part.get("text")
        if kind in _TEXT_PARTS and isinstance(text, str):
            return text
        if kind not in _TEXT_PARTS:
            raise BadSettings(f"turn {number} has a part of type {kind!r}, which is no text.")
    raise BadSettings(f"turn {number} has a part without text.")


def _kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else "a list")


def plain_text(turns: Iterable[Turn]) -> str:
    """What is said, turn after turn, in lines."""
    return "\n".join(turn["content"] or "" for turn in turns)


def calls_tools(turn: Turn) -> bool:
    """Whether a turn calls tools, beside which its content may be null."""
    return bool(turn.get("tool_calls") or turn.get("function_call"))


def filled(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """Turns as a template takes them: many write None where the content is null."""
    return [{**turn, "content": turn["content"] or ""} for turn in turns]


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The text that a model sees of a conversation: what its chat template makes of it.

    Without a template what user and assistant say stands in lines, and nothing else can be put
    into words.

    Raises:
        BadSettings: where there is no template and the conversation needs one, or where the
            template refuses it.
    """
    if not has_template(tokenizer):
        return _without_template(turns)
    turns = filled(turns)
    found = _applied(tokenizer, turns)
    if _lost(turns, found):
        # Templates of multimodal models go through a list of parts, and take text for one.
        parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in turns]
        try:
            other = _applied(tokenizer, parts)
        except BadSettings:
            other = found
        if not _lost(turns, other) and "'type': 'text'" not in other:
            _log.debug("the chat template takes parts instead of text")
            found = other
    _refuse_repr(turns, found)
    return found


def _without_template(turns: Sequence[Turn]) -> str:
    for number, turn in enumerate(turns, 1):
        role = turn.get("role")
        what = ""
        if role is not None and role not in _PLAIN_ROLES:
            what = f"turn {number} of the role {role!r}"
        elif calls_tools(turn):
            what = f"the tool calls of turn {number}"
        elif turn["content"] is None:
            what = f"turn {number}, whose content is null,"
        if what:
            raise BadSettings(
                f"The model's tokenizer has no chat template, which alone says how {what} would be "
                'written; give a file with "text", or a model with a template.'
            )
    return plain_text(turns)


def _applied(tokenizer: Any, turns: Sequence[Turn]) -> str:
    try:
        found = tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False)
    except Exception as error:  # whatever a template raises, which is a program of the model's
        raise BadSettings(
            f"The model's chat template refuses a conversation: {first_line(error)}"
        ) from error
    return str(found)


def _lost(turns: Sequence[Turn], rendered: str) -> bool:
    """Whether something that was said is not in the text.

    Templates cut what a model thought in earlier turns, and may write a tool's answer as JSON.
    """
    for turn in turns:
        said = turn["content"].rpartition("</think>")[2].strip()
        written = json.dumps(said, ensure_ascii=False)[1:-1]
        if said not in rendered and written not in rendered:
            return True
    return False


def _refuse_repr(turns: Sequence[Turn], rendered: str) -> None:
    """Raise BadSettings where a template prints a list or an object as Python spells it."""
    for number, turn in enumerate(turns, 1):
        for name, value in _objects(turn):
            if value and str(value) in rendered and str(value) != json.dumps(value, default=str):
                raise BadSettings(
                    f"The model's chat template writes {name} of turn {number} as Python spells "
                    "it, which no model was trained on."
                )


def _objects(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """The lists and objects in a turn, with the names of their fields."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if isinstance(one, Mapping | list):
                yield str(key), one
                yield from _objects(one, str(key))
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, Mapping | list):
                yield name, one
                yield from _objects(one, name)
