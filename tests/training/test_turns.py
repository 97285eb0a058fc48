"""Training rows whose turns are parts, or null beside tool calls; and what is no text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from surgery.errors import BadSettings
from surgery.training.case import revision_of
from surgery.training.data import conversation, preference, problem

PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
CALLS = [{"function": {"name": "look_up", "arguments": "{}"}}]


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def test_turns_are_text() -> None:
    row = {"messages": [turn("user", PARTS), turn("assistant", None, tool_calls=CALLS)]}
    assert conversation(row) == {
        "prompt": [turn("user", "a b")],
        "completion": [turn("assistant", "", tool_calls=CALLS)],
    }
    pair = {"prompt": [turn("user", PARTS)], "chosen": [turn("assistant", PARTS)], "rejected": "x"}
    assert preference(pair)["chosen"] == [turn("assistant", "a b")]
    assert problem({"prompt": [turn("user", PARTS)], "answer": 5}) == {
        "prompt": [turn("user", "a b")],
        "answer": "5",
    }


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [turn("user", "a"), turn("assistant", None)]},
        {"messages": [turn("user", [{"type": "image"}]), turn("assistant", "b")]},
        {"question": ["a"], "answer": "b"},
        {"question": "a", "answer": ["b"]},
        {"inputs": {"a": 1}, "targets": "b"},
        {"prompt": {"a": 1}, "completion": "b"},
    ],
)
def test_no_repr_is_trained_on(row: dict[str, Any]) -> None:
    with pytest.raises(BadSettings):
        conversation(row)


def test_the_revision_of_a_recipe() -> None:
    recipe: Any = SimpleNamespace(keys={"model_revision": "v2"})
    assert revision_of(recipe) == "v2"
