"""Options, functions and the card's command line are made from the same fields."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from importlib import import_module
from inspect import signature
from typing import Any

import pytest

import surgery
from surgery.commands.convert import command as convert
from surgery.measure.task_settings import TaskSettings
from surgery.outputs.card import command_line
from surgery.settings import Settings

OF_A_CONVERSION = [field for field in fields(Settings) if field.name != "model"]
# Values that are not the defaults.
OTHERS: dict[str, Any] = {
    **{"rate": 0.25, "scope": "all", "fold": "sink", "select": "random", "strength": 0.5},
    **{"layer": 3, "revision": "a b", "seed": 7, "calibration": "my texts.txt"},
    **{"calibration_tokens": 100, "check": False, "check_tokens": 200, "max_degradation": 5.0},
    **{"force": True, "device": "cpu", "dtype": "float64", "trust_remote_code": True},
    **{"push_to_hub": "me/it", "undo_file": True, "form": "adapter"},
    **{"include": ("docs/*", "a file.txt"), "fixed": True, "stream": True},
}


def given(name: str, *words: str) -> dict[str, Any]:
    """What a command's function gets for these words."""
    command = import_module(f"surgery.commands.{name}").command
    with command.make_context(name, [str(word) for word in words]) as context:
        return dict(context.params)


@pytest.mark.parametrize("field", OF_A_CONVERSION, ids=lambda field: field.name)
def test_every_setting_is_an_option_with_its_default(field: Any) -> None:
    found = given("convert", "MODEL")
    assert found[field.name] == field.default
    assert type(found[field.name]) is type(field.default)
    assert signature(surgery.convert).parameters[field.name].default == field.default
    (option,) = (param for param in convert.params if param.name == field.name)
    assert option.help == field.metadata["help"]


def test_every_task_setting_is_an_option_with_its_default() -> None:
    found = given("compare", "BASE", "EDITED")
    for field in fields(TaskSettings):
        assert found[field.name] == field.default, field.name
    found = given("sweep", "MODEL", "--tasks", "math, mine", "--seeds", "3,1", "--thinking")
    assert (found["tasks"], found["seeds"], found["thinking"]) == (("math", "mine"), (3, 1), True)
    assert given("sweep", "MODEL", "--no-chat-template")["chat_template"] is False


def test_a_command_says_otherwise_what_it_means_otherwise() -> None:
    assert given("sweep", "MODEL")["check_tokens"] == 2048
    assert given("compare", "BASE", "EDITED")["check_tokens"] == 4096
    found = given("sweep", "MODEL", "--rates", "0.1, 0.2", "--folds", "norm")
    assert (found["rates"], found["folds"]) == ((0.1, 0.2), ("norm",))
    assert (found["scopes"], found["strengths"]) == (("first", "all"), (1.0,))


@pytest.mark.parametrize("name", [*OTHERS, "layers"])
def test_the_command_on_the_card_says_every_setting(name: str) -> None:
    """All but those that mean something on one machine, or to one account."""
    other = {"layers": (7, 9, 10)}.get(name, OTHERS.get(name))
    settings = replace(Settings("my model"), **{name: other})
    if name == "form":
        settings = replace(Settings("my model", fold="sink"), form=other)
    program, command, *words = shlex.split(command_line(settings))
    assert (program, command) == ("surgery", "convert")
    found = given(command, *words)
    kept = {field.name: found[field.name] for field in fields(Settings)}
    local = Settings("my model", device=None, stream=None, push_to_hub=None)
    assert Settings(**kept) == (local if name in ("device", "stream", "push_to_hub") else settings)


def test_every_setting_has_another_value_here() -> None:
    assert {*OTHERS, "layers"} == {field.name for field in OF_A_CONVERSION}


def test_the_command_on_the_card_is_short() -> None:
    assert command_line(Settings("m")) == "surgery convert m --rate 0.1 --scope first"
