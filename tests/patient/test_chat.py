"""Conversations become what the model's chat template makes of them, and never Python's repr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from shared import Run, Tiny

from surgery.errors import BadSettings
from surgery.patient import texts
from surgery.patient.chat import read_turns, render
from surgery.patient.texts import Text, read_texts

WORDS = "Numbers are useful as well, and a simple function gives a model some symbols to read. "
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Bern"}}}

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}{{ '\n' }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p['type'] == 'text' %}"
    "{{ p['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


def tokenizer(template: str | None = None) -> Any:
    made = tiny_models.make_tokenizer()
    made.chat_template = template
    return made


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def parts(*said: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": one} for one in said]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rendered(turns: list[Any], template: str | None = None) -> str:
    return render(tokenizer(template), read_turns(turns))


@pytest.mark.parametrize("template", [None, CHATML])
def test_parts_are_their_text(template: str | None) -> None:
    """oumi 2392, vllm 9358."""
    plain = rendered([turn("user", "a b"), turn("assistant", "c")], template)
    assert rendered([turn("user", parts("a ", "b")), turn("assistant", "c")], template) == plain
    assert rendered([turn("user", ["a b"]), turn("assistant", parts("c"))], template) == plain
    assert "type" not in plain
    assert plain == ("a b\nc" if template is None else "<user>a b\n<assistant>c\n")


@pytest.mark.parametrize("content", ["a", parts("a")])
def test_a_template_that_goes_through_parts(content: Any) -> None:
    """Text is a sequence to such a template, and none of its letters a part of type text."""
    assert rendered([turn("user", content)], PARTS) == "<user>a\n"


def test_null_beside_tool_calls() -> None:
    turns = [turn("user", "a"), turn("assistant", None, tool_calls=[CALL]), turn("tool", "12°")]
    assert rendered(turns, CHATML) == '<user>a\n<assistant>[look_up {"city": "Bern"}]\n<tool>12°\n'


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_other_roles(role: str) -> None:
    turns = [turn(role, "be brief"), turn("user", "a")]
    assert rendered(turns, CHATML) == f"<{role}>be brief\n<user>a\n"
    with pytest.raises(BadSettings, match=f"no chat template.*turn 1 of the role '{role}'"):
        rendered(turns)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([turn("assistant", None, tool_calls=[CALL])], "the tool calls of turn 1"),
        ([turn("user", "a"), turn("assistant", None)], "turn 2, whose content is null"),
        ([turn("assistant", "a", function_call={"name": "x"})], "the tool calls of turn 1"),
    ],
)
def test_what_needs_a_template(turns: list[Any], reason: str) -> None:
    with pytest.raises(BadSettings, match=reason):
        rendered(turns)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "messages are text"),
        ({"role": "user"}, "messages are an object"),
        (["hello"], "turn 1 is text"),
        ([turn("user", 5)], "the content of turn 1 is a number"),
        ([turn("user", {"text": "a"})], "the content of turn 1 is an object"),
        ([turn("user", [{"type": "image", "url": "x"}])], "a part of type 'image'"),
        ([turn("user", [{"type": "text", "text": None}])], "a part without text"),
        ([turn("user", [5])], "a part without text"),
        ([turn(["user"], "a")], "the role of turn 1 is a list"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(tmp_path: Path, messages: Any, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "fine"}, {"messages": messages})
    with pytest.raises(BadSettings, match=f"line 2: .*{reason}"):
        read_texts(path)


@pytest.mark.parametrize("row", [{"text": ["a"]}, {"text": None}, {"text": 5}, {}, [], "a"])
def test_rows_without_text(tmp_path: Path, row: Any) -> None:
    with pytest.raises(BadSettings, match='line 1: expected a JSON object with "text"'):
        read_texts(write(tmp_path / "rows.jsonl", row))


def test_a_template_that_refuses() -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(BadSettings, match=r"chat template refuses .*System role not supported"):
        rendered([turn("system", "a")], template)


def test_a_template_that_writes_a_repr() -> None:
    template = CHATML.replace(" | tojson", "")
    with pytest.raises(BadSettings, match="arguments of turn 1 as Python spells it"):
        rendered([turn("assistant", None, tool_calls=[CALL])], template)


def test_the_first_token_stands_there_once() -> None:
    """A template that writes the first token, which the tokenizer would put there too."""
    made = tokenizer("<bos>" + CHATML)
    text = Text("chat", "", read_turns([turn("user", WORDS * 5)]))
    (whole,) = texts.encode(made, [text], 500)
    assert whole.count(made.bos_token_id) == 1
    stock = made.apply_chat_template([turn("user", WORDS * 5)], tokenize=True, return_dict=False)
    assert whole == stock
    for window in texts.windows(made, [text], 32):
        assert window[0] == made.bos_token_id
        assert window.count(made.bos_token_id) == 1


def perplexity(run: Run, model: Path, text: Path) -> float:
    outcome = run("compare", model, model, "--text", text, "--no-reference", "--json", "-q").ok()
    return float(outcome.json()["text"][0]["perplexity"])


@pytest.mark.parametrize("template", [None, CHATML])
def test_compare_measures_the_same_text(
    tiny_copy: Tiny, run: Run, tmp_path: Path, template: str | None
) -> None:
    folder = tiny_copy()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)

    def messages(content: Any) -> dict[str, Any]:
        return {"messages": [turn("user", WORDS * 9), turn("assistant", content)]}

    plain = write(tmp_path / "plain.jsonl", messages(WORDS * 9))
    split = write(tmp_path / "split.jsonl", messages(parts(WORDS * 5, WORDS * 4)))
    assert perplexity(run, folder, plain) == perplexity(run, folder, split)
    said = tmp_path / "said.txt"
    said.write_text(rendered(messages(WORDS * 9)["messages"], template))
    assert perplexity(run, folder, plain) == pytest.approx(perplexity(run, folder, said), rel=1e-6)


def test_refused_before_anything_is_loaded(
    tiny: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    text = write(tmp_path / "a.jsonl", {"messages": [turn("system", WORDS), turn("user", WORDS)]})
    sentence = run("compare", tiny(), tiny(), "--text", text, "--no-reference", "-q").sentence()
    assert "no chat template" in sentence
    sentence = run("analyze", tiny(), "--calibration", text, "-q").sentence()
    assert "no chat template" in sentence
