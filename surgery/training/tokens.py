"""The token ids that a training runs on, each of which has its row in the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from surgery.files.foreign import is_whole
from surgery.models.loading import text_settings
from surgery.patient.texts import check_ids

# Rows that are looked at together.
_BATCH = 1000


def check_tokens(trainer: Any) -> None:
    """Raise BadCheckpoint for data, or padding, with a token that the embedding has no row for.

    What lies on this disk is looked at now, before any step; streamed data batch by batch, before
    each goes to the model.

    Args:
        trainer: of TRL, ready to train.
    """
    rows = getattr(text_settings(trainer.model.config), "vocab_size", None)
    if not is_whole(rows):
        return
    tokenizer = trainer.processing_class
    if is_whole(tokenizer.pad_token_id):
        check_ids(tokenizer, [tokenizer.pad_token_id], rows)
    evaluation = trainer.eval_dataset
    several = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    for data in (trainer.train_dataset, *several):
        if hasattr(data, "select_columns") and hasattr(data, "__len__"):
            for ids in _ids(tokenizer, data):
                check_ids(tokenizer, ids, rows)
    collate = trainer.data_collator

    def checked(examples: Any) -> Any:
        batch = collate(examples)
        if isinstance(batch, Mapping):
            for name, ids in batch.items():
                if name.endswith("input_ids") and isinstance(ids, torch.Tensor) and ids.numel():
                    check_ids(tokenizer, [int(ids.max())], rows)
        return batch

    trainer.data_collator = checked


def _ids(tokenizer: Any, data: Any) -> Iterator[Iterable[int]]:
    """The token ids in a prepared data set; of prompts that are still text, as they will be."""
    columns = [name for name in data.column_names if name.endswith("_ids")]
    found = columns or [name for name in data.column_names if name == "prompt"]
    for batch in data.select_columns(found).iter(_BATCH) if found else ():
        for name in found:
            for row in batch[name]:
                yield row if columns else _prompt(tokenizer, row)


def _prompt(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
