"""How a checkpoint was trained, in words for its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
