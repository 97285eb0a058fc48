"""The text of calibration and gate: short windows, chats, and windows with late tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.models.loading import load_tokenizer
from surgery.patient import texts
from surgery.patient.chat import has_template
from surgery.patient.mixture import LONG_WINDOW, alternating, mix
from surgery.patient.texts import WINDOW, Text

Tiny = Callable[..., Path]
TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tiny: Tiny):
    return load_tokenizer(tiny("llama"))


@pytest.mark.parametrize("name", ["calibration", "heldout"])
@pytest.mark.parametrize("limit", [300, 1024, 4096, 6144])
def test_a_third_of_each(tokenizer, name: str, limit: int) -> None:
    tokenizer.chat_template = TEMPLATE
    found = mix(tokenizer, texts.bundled(name), limit, 4096)
    sizes = {kind: sum(map(len, getattr(found, kind))) for kind in ("short", "chats", "long")}
    total = sum(sizes.values())
    assert 0.8 * limit <= total <= 1.05 * limit + WINDOW
    assert all(len(one) <= WINDOW for one in (*found.short, *found.chats))
    if limit >= 1024:
        (long,) = found.long[:1]
        assert len(long) == min(LONG_WINDOW, limit // 2)
        assert sizes["long"] <= limit // 2
    assert sizes["chats"] >= 0.2 * limit
    assert "<user>" in tokenizer.decode(found.chats[0])
    ids = [tuple(one) for one in found.sequences]
    assert len(ids) == len(set(ids)) == len(found.short) + len(found.chats) + len(found.long)


def test_without_a_template_and_with_a_short_context(tokenizer) -> None:
    tokenizer.chat_template = None
    assert not has_template(tokenizer)
    found = mix(tokenizer, texts.bundled("heldout"), 2048, 100)
    assert found.chats == found.long == []
    assert max(map(len, found.short)) <= 100
    assert sum(map(len, found.short)) > 1800


def test_one_file_of_plain_text_is_cut(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATE
    book = "\n".join(
        f"Line {number} says that {number * 7919} is a number." for number in range(900)
    )
    found = mix(tokenizer, [Text("text", book)], 4096, 8192)
    assert found.short
    assert found.chats
    assert [len(one) for one in found.long] == [LONG_WINDOW]
    # No part is measured twice: each line's number is in one sequence, or cut between two.
    words = [tokenizer.decode(one) for one in found.sequences]
    numbers = [word for text in words for word in text.split("Line ")[2:-1]]
    assert len(numbers) == len(set(numbers))


def test_a_template_that_refuses_and_a_text_that_is_short(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    found = mix(tokenizer, texts.bundled("heldout"), 1024, 4096)
    assert found.chats == []
    assert sum(map(len, found.sequences)) > 900
    tokenizer.chat_template = TEMPLATE
    found = mix(
        tokenizer, [Text("text", "A short text of a few words, no more than that.")], 4096, 4096
    )
    assert len(found.sequences) == 1


def test_alternating() -> None:
    assert alternating([[1], [2], [3], [4]], [[5], [6]]) == [[1], [5], [2], [3], [6], [4]]
    assert alternating([[1]], []) == [[1]]
