"""Where the tasks beside this file get their documents: the Hub, or a local folder.

Every task names its Hub data set and its local file in `dataset_kwargs`. With `data` in the
metadata (`surgery compare --data DIR`, or `lm_eval --metadata '{"data": "DIR"}'`) the local file
is read instead. Rows of either origin are brought to the same few fields, so that one task
serves both: `question`, `choices`, `answer` (an index, or text) for questions; `prompt` for
requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def documents(
    *,
    hub: str,
    split: str,
    file: str,
    fields: str,
    config: str | None = None,
    keep: dict[str, Any] | None = None,
    data: str | None = None,
    **_other: Any,
) -> dict[str, Any]:
    """The documents of a task, as the split "test".

    hub, config, split: the data set on the Hub. file: its name in a local folder. fields: which
    function below brings a row to the common fields. keep: only rows with these values.
    """
    import datasets

    if data is not None:
        text = (Path(data) / file).read_text(encoding="utf-8")
        rows: Iterable[Row] = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        rows = datasets.load_dataset(hub, config, split=split)
    kept = [
        _FIELDS[fields](row)
        for row in rows
        if all(row.get(name) == value for name, value in (keep or {}).items())
    ]
    return {"test": datasets.Dataset.from_list(kept)}


def _choice(row: Row) -> Row:
    """Multiple choice: local rows, MMLU, ARC and OpenBookQA."""
    choices, answer = row["choices"], row.get("answer")
    if isinstance(choices, dict):
        answer = choices["label"].index(row["answerKey"].strip())
        choices = choices["text"]
    return {
        "question": row.get("question", row.get("question_stem")).strip(),
        "choices": list(choices),
        "answer": int(answer),  # type: ignore[arg-type]
    }


def _piqa(row: Row) -> Row:
    if "choices" in row:
        return _choice(row)
    return {
        "question": row["goal"].strip(),
        "choices": [row["sol1"], row["sol2"]],
        "answer": int(row["label"]),
    }


def _mathqa(row: Row) -> Row:
    if "choices" in row:
        return _choice(row)
    options = re.findall(r"[abcd] \) .*?, |e \) .*?$", row["options"])
    return {
        "question": row["Problem"].strip(),
        "choices": [option[4:].rstrip(" ,") for option in options],
        "answer": "abcde".index(row["correct"]),
    }


def _strategyqa(row: Row) -> Row:
    if "choices" in row:
        return _choice(row)
    return {
        "question": row["question"].strip(),
        "choices": ["no", "yes"],
        "answer": int(bool(row["answer"])),
    }


def _gsm8k(row: Row) -> Row:
    final = row.get("final") or row["answer"].rpartition("####")[2]
    return {"question": row["question"].strip(), "answer": str(final).strip().replace(",", "")}


def _problem(row: Row) -> Row:
    """MATH-500 and AIME."""
    question = row.get("question", row.get("problem"))
    return {"question": str(question).strip(), "answer": str(row["answer"]).strip()}


def _request(row: Row) -> Row:
    """XSTest, AdvBench and SORRY-Bench: a request that is answered or refused."""
    turns = row.get("turns")
    return {"prompt": str(turns[0] if turns else row["prompt"]).strip()}


_FIELDS: dict[str, Callable[[Row], Row]] = {
    "choice": _choice,
    "piqa": _piqa,
    "mathqa": _mathqa,
    "strategyqa": _strategyqa,
    "gsm8k": _gsm8k,
    "problem": _problem,
    "request": _request,
}
