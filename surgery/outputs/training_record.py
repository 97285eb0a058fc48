"""How a checkpoint was trained: the record in its manifest, and in words for its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from typing_extensions import TypedDict

from surgery.outputs.treatment import BLOCK, Treatment


class RecipeRecord(TypedDict):
    """A recipe: its name, and all of its keys with the block `surgery`."""

    name: str
    keys: dict[str, Any]


class _TrainingRecord(TypedDict):
    recipe: RecipeRecord
    steps: int
    rows: int
    processes: int
    trainable: int
    changed: list[str]
    versions: dict[str, str]


class TrainingRecord(_TrainingRecord, total=False):
    """What a training was; losses in nats per token, where they are known."""

    first_loss: float | None
    last_loss: float | None
    held_out_loss: float | None


class _Dataset(TypedDict):
    path: str


def check_training(record: TrainingRecord) -> None:
    """Raise ValueError or BadSettings for what the words of the card stumble over."""
    from pydantic import TypeAdapter  # takes a while

    def shaped(kind: Any, value: Any) -> None:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)

    keys = record["recipe"]["keys"]
    shaped(Treatment, keys.get(BLOCK))
    # All of them, as a recipe is recorded: the card says what they are.
    lacking = {known.name for known in fields(Treatment)} - set(keys[BLOCK])
    if lacking:
        raise ValueError(f"the recipe's block {BLOCK} lacks {min(lacking)}")
    shaped(list[_Dataset] | None, keys.get("datasets"))


def training_words(record: Mapping[str, Any]) -> str:
    """A training as Markdown, for a card."""
    keys = record["recipe"]["keys"]
    block = keys["surgery"]
    parts = [
        f"{block['method'].upper()} with LoRA (recipe `{record['recipe']['name']}`): "
        f"{record['steps']} steps on {record['rows']} rows, {record['trainable']:,} trainable "
        f"parameters, {record['processes']} process{'' if record['processes'] == 1 else 'es'}."
    ]
    if block["intervention"] == "wemask":
        who = "the first real token" if block["tokens"] == "first" else "every token"
        parts.append(
            f"The mask was on for {who} while training, scope `{block['scope']}`, rate "
            f"{block['rate']:g}; afterwards the LoRA was merged in float32 and the "
            + (
                f"`{block['fold']}` fold put in, scope `{block['fold_scope']}`."
                if block["fold"] != "none"
                else "mask left out."
            )
        )
    if None not in (record.get("first_loss"), record.get("last_loss")):
        line = f"Loss {record['first_loss']:.4g} at first, {record['last_loss']:.4g} at last"
        if record.get("held_out_loss") is not None:
            line += f"; held-out loss {record['held_out_loss']:.4g}"
        parts.append(line + ".")
    shown = {
        name: keys[name]
        for name in (
            "dataset_name",
            "datasets",
            "learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "lora_r",
            "lora_alpha",
            "seed",
        )
        if name in keys
    }
    if shown.get("datasets"):  # of local files, the path says nothing elsewhere
        shown["datasets"] = ", ".join(str(part["path"]) for part in shown["datasets"])
    table = ["| setting | value |", "| --- | --- |"]
    table += [f"| {name} | `{value}` |" for name, value in shown.items()]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(
        ["## How it was trained", "", " ".join(parts), "", *table, "", f"Trained with {versions}."]
    )
