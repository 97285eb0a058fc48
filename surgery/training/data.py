"""Rows of public training sets in the formats TRL's trainers take, recognised by their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.errors import BadSettings, first_line
from surgery.patient.chat import calls_tools, filled, read_turns

Row = Mapping[str, Any]
Turn = dict[str, Any]

# GSM8K marks its calculator's work like this; people do not write so.
_CALCULATOR = re.compile(r"<<[^>]*>>")
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def conversation(row: Row) -> dict[str, Any]:
    """A row as prompt (turns) and completion (turns), so that loss falls on the completion.

    Knows messages; prompt and completion; prompt, chosen and rejected; Anthropic's chosen and
    rejected transcripts; FLAN's inputs and targets; OpenOrca's question and response; GSM8K's
    question and answer. Raises BadSettings for other columns.
    """
    has = {key for key, value in row.items() if value is not None}
    if "messages" in has:
        turns = _turns(row["messages"])
        return {"prompt": turns[:-1], "completion": turns[-1:]}
    if {"prompt", "completion"} <= has:
        return {key: _said(row[key], key) for key in ("prompt", "completion")}
    if {"chosen", "rejected"} <= has:
        pair = preference(row)
        return {"prompt": pair["prompt"], "completion": pair["chosen"]}
    if {"inputs", "targets"} <= has:
        return _exchange(row["inputs"], row["targets"])
    if {"question", "response"} <= has:
        return _exchange(row["question"], row["response"], row.get("system_prompt"))
    if {"question", "answer"} <= has:
        answer = _words(row["answer"], "answer")
        return _exchange(row["question"], _CALCULATOR.sub("", answer))
    raise BadSettings(f"Rows with the columns {_columns(row)} are no conversations to train on.")


def preference(row: Row) -> dict[str, Any]:
    """A row as prompt, chosen and rejected turns, for DPO."""
    if row.get("chosen") is None or row.get("rejected") is None:
        raise BadSettings(f"Rows with the columns {_columns(row)} are no preferences.")
    if row.get("prompt") is not None:
        return {key: _said(row[key], key) for key in ("prompt", "chosen", "rejected")}
    chosen, rejected = _transcript(row["chosen"]), _transcript(row["rejected"])
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def problem(row: Row) -> dict[str, Any]:
    """A row as prompt turns and the expected final answer, for GRPO."""
    if row.get("answer") is None or (row.get("question") is None and row.get("prompt") is None):
        raise BadSettings(f"Rows with the columns {_columns(row)} are no problems with answers.")
    prompt = row.get("prompt")
    if prompt is None:
        prompt = [{"role": "user", "content": _words(row["question"], "question")}]
    answer = final_answer(_words(row["answer"], "answer"))
    return {"prompt": _said(prompt, "prompt"), "answer": answer}


SHAPES = {"sft": conversation, "dpo": preference, "grpo": problem}


def final_answer(text: str) -> str:
    """What stands behind GSM8K's ####, else the whole text."""
    return text.rpartition("####")[2].strip().replace(",", "")


def load_data(recipe: Any) -> tuple[Any, Any]:
    """Training rows and, where the recipe evaluates, evaluation rows, in TRL's format."""
    from datasets import load_dataset
    from trl import get_dataset

    script, mixture = recipe.script, recipe.mixture
    try:
        if mixture.datasets:
            found = get_dataset(mixture)
        else:
            found = load_dataset(
                script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
            )
    except Exception as error:
        raise BadSettings(
            f"{recipe.name}: the data cannot be loaded: {first_line(error)}"
        ) from error
    splits = [script.dataset_train_split]
    if recipe.arguments.eval_strategy != "no":
        splits.append(script.dataset_test_split)
    for split in splits:
        if split not in found:
            raise BadSettings(
                f"{recipe.name}: the data has no split {split!r}, only {', '.join(found)}."
            )
    train = found[splits[0]]
    wanted = recipe.treatment.examples
    if wanted is not None and wanted < len(train):
        train = train.shuffle(seed=recipe.arguments.seed).select(range(wanted))
    shape = SHAPES[recipe.treatment.method]
    parts = [train, *(found[split] for split in splits[1:])]
    shaped = [_mapped(part, shape) for part in parts]
    return shaped[0], shaped[1] if len(shaped) > 1 else None


def _mapped(rows: Any, shape: Any) -> Any:
    return rows.map(shape, remove_columns=rows.column_names)


def _exchange(question: Any, answer: Any, system: Any = None) -> dict[str, list[Turn]]:
    prompt = [{"role": "system", "content": _words(system, "system_prompt")}] if system else []
    prompt.append({"role": "user", "content": _words(question, "question")})
    completion = [{"role": "assistant", "content": _words(answer, "answer")}]
    return {"prompt": prompt, "completion": completion}


def _words(value: Any, column: str) -> str:
    """The text in a column. A number is what it says; Python's repr of a list is no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadSettings(f"The column {column} holds {type(value).__name__} instead of text.")


def _said(value: Any, column: str) -> Any:
    """A text, or turns that a chat template can write."""
    return _words(value, column) if not isinstance(value, list) else _turns(value)


def _turns(value: Any) -> list[Turn]:
    """Turns with text as their content, as chat templates take them."""
    turns = read_turns(value)
    for number, turn in enumerate(turns, 1):
        if turn["content"] is None and not calls_tools(turn):
            raise BadSettings(
                f"Turn {number} of a conversation has neither content nor tool calls."
            )
    return filled(turns)


def _transcript(text: Any) -> list[Turn]:
    if not isinstance(text, str):
        return _turns(text)
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not turns:
        raise BadSettings("A preference is neither turns nor a transcript of Human and Assistant.")
    return turns


def _columns(row: Row) -> str:
    return ", ".join(row)
