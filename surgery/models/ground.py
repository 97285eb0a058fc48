"""What a journey through a model stands on: its layers one at a time, and its head in blocks.

`Loaded` is a model in memory; `surgery.models.lending.Lender` reads each part when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from surgery.models.anatomy import Anatomy
from surgery.models.discovery import decoder_layers
from surgery.models.observe import device_of

# Numbers of a head's weight in one block (64 MiB in float32), and words of a block at most: with
# 1024 tokens as many logits again.
_BLOCK_NUMBERS = 16_000_000
_BLOCK_WORDS = 16_384


@dataclass(frozen=True)
class HeadBlock:
    """Some words of the language-model head.

    Attributes:
        begin: the first word.
        end: the one after the last.
        weight: [words, D]; None where the head runs as it is, whole.
        bias: [words]; None where there is none.
    """

    begin: int
    end: int
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Ground(Protocol):
    """A model whose decoder layers can be entered one after another."""

    @property
    def model(self) -> Any:
        """The model; parameters of layers that nobody has entered may lie nowhere."""

    @property
    def anatomy(self) -> Anatomy:
        """Of its checkpoint."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        """Have all that is no decoder layer ready for these token ids."""

    def layer(self, index: int) -> AbstractContextManager[torch.nn.Module]:
        """A decoder layer with its parameters, for the time of the block."""

    def head_blocks(self) -> Iterator[HeadBlock]:
        """The language-model head, some words at a time."""


class Loaded:
    """A model that is in memory whole."""

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self._model, self._anatomy = model, anatomy

    @property
    def model(self) -> Any:
        return self._model

    @property
    def anatomy(self) -> Anatomy:
        return self._anatomy

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        pass

    def layer(self, index: int) -> AbstractContextManager[torch.nn.Module]:
        return nullcontext(decoder_layers(self._model, self._anatomy)[index])

    def head_blocks(self) -> Iterator[HeadBlock]:
        head = self._model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            yield HeadBlock(0, self._model.config.get_text_config().vocab_size)
            return
        for begin, end in word_blocks(*head.weight.shape):
            bias = head.bias[begin:end] if head.bias is not None else None
            yield HeadBlock(begin, end, head.weight[begin:end], bias)


def word_blocks(words: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of words, each of a bounded number of weights."""
    step = max(1, min(_BLOCK_WORDS, _BLOCK_NUMBERS // width))
    for begin in range(0, words, step):
        yield begin, min(begin + step, words)
