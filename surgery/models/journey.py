"""Residual streams on their way through a model, one decoder layer after another.

A layer is entered once; all streams that need it run through it, and then it may go. Streams part
where their weights or hooks begin to differ (`Stream.fork`), so that nothing before runs twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import Unsupported
from surgery.models.discovery import backbone, decoder_layers
from surgery.models.ground import Ground, HeadBlock
from surgery.models.observe import hidden, hooked, pad, reading, residual, standing_in

logger = logging.getLogger(__name__)

# Sequences within this factor of each other's length share a batch; more padding wastes time.
_SIMILAR = 1.5
# Tokens of a batch, at most, unless one sequence is longer: bounds the memory of activations.
_BATCH_TOKENS = 1024
# Up to so many tokens short sequences share a batch however unlike they are. Few calls are faster,
# and products of few rows come out otherwise on another number of threads, in the last bits.
_FEW_TOKENS = 512


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length.

    Attributes:
        places: of the sequences among those that were given.
        lengths: of the sequences, in tokens.
        ids: token ids, [sequences, longest].
        mask: 1 at tokens, 0 at padding, likewise.
    """

    places: tuple[int, ...]
    lengths: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """Where there are tokens, bool [sequences, longest]."""
        return self.mask.bool()

    @property
    def first(self) -> torch.Tensor:
        """Where sequences begin, likewise: on the left, as padding is on the right."""
        found = torch.zeros_like(self.mask, dtype=torch.bool)
        found[:, 0] = True
        return found


def batches(
    sequences: Sequence[Sequence[int]], device: torch.device, limit: int = _BATCH_TOKENS
) -> Iterator[Batch]:
    """Sequences of similar length together.

    Args:
        sequences: token ids.
        device: where the batches are put.
        limit: tokens of a batch, at most, unless one sequence is longer.
    """
    group: list[tuple[int, Sequence[int]]] = []
    for pair in sorted(enumerate(sequences), key=lambda pair: len(pair[1])):
        padded = len(pair[1]) * (len(group) + 1)
        unlike = bool(group) and len(pair[1]) > _SIMILAR * len(group[0][1])
        if group and (padded > limit or (unlike and padded > _FEW_TOKENS)):
            yield _batch(group, device)
            group = []
        group.append(pair)
    if group:
        yield _batch(group, device)


def _batch(group: list[tuple[int, Sequence[int]]], device: torch.device) -> Batch:
    ids, mask = (part.to(device) for part in pad([ids for _, ids in group]))
    lengths = tuple(len(ids) for _, ids in group)
    return Batch(tuple(place for place, _ in group), lengths, ids, mask)


# Stands for what a layer returns beside its states.
_BESIDE = object()
# Some models' layers return their states alone, others (in transformers 4) in a tuple, or with
# something beside them that the next layer may get.
_FORMS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda states: states,
    lambda states: (states,),
    lambda states: (states, _BESIDE),
)
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """Ends a layer's run where enough has been seen."""


@dataclass
class _Leg:
    """One batch on its way: what each layer is called with, and how far it has come."""

    batch: Batch
    states: torch.Tensor
    calls: list[_Call]
    form: Callable[[torch.Tensor], Any]
    beside: Any = None

    def run(self, index: int, layer: torch.nn.Module) -> None:
        args, kwargs = self.calls[index]
        kwargs = {
            name: self.beside if value is _BESIDE else value for name, value in kwargs.items()
        }
        output = layer(self.states, *args, **kwargs)
        self.states = hidden(output)
        self.beside = output[1] if isinstance(output, tuple) and len(output) > 1 else None


class Stream:
    """The residual streams of some sequences, at the input of a layer."""

    def __init__(self, ground: Ground, legs: list[_Leg]) -> None:
        self._ground, self._legs = ground, legs

    @classmethod
    def board(cls, ground: Ground, sequences: Sequence[Sequence[int]]) -> Stream:
        """Sequences at the input of layer 0; the ground must be prepared for their tokens.

        Raises:
            Unsupported: where the model does not call its layers one after another.
        """
        with torch.inference_mode():
            return cls(ground, [_begin(ground, one) for one in batches(sequences, ground.device)])

    @property
    def ground(self) -> Ground:
        """The model that the streams run through."""
        return self._ground

    @property
    def batches(self) -> list[Batch]:
        """Which sequences run together."""
        return [leg.batch for leg in self._legs]

    @property
    def states(self) -> list[torch.Tensor]:
        """The residual stream of each batch, [B, T, D]."""
        return [residual(leg.states) for leg in self._legs]

    def fork(self) -> Stream:
        """Another stream from here on: nothing that one of them does reaches the other."""
        return Stream(self._ground, [_copy(leg) for leg in self._legs])

    def step(
        self, index: int, layer: torch.nn.Module, *, each: Callable[[int], Any] | None = None
    ) -> None:
        """Run through a layer.

        Args:
            index: of the layer.
            layer: with its parameters.
            each: called with the number of every batch before it runs.
        """
        with torch.inference_mode():
            for number, leg in enumerate(self._legs):
                if each is not None:
                    each(number)
                leg.run(index, layer)

    def attention_inputs(self, index: int, layer: torch.nn.Module) -> list[torch.Tensor]:
        """What a layer's attention would read of each batch, [B, T, D]; nothing runs beyond."""
        found = self._ground.anatomy.at(index).attention
        attention = self._ground.model.get_submodule(found)
        seen: list[torch.Tensor] = []

        def see(states: torch.Tensor) -> None:
            seen.append(states)
            raise _Reached

        with torch.inference_mode(), hooked([reading(attention, see)]):
            for leg in self._legs:
                with suppress(_Reached):
                    replace(leg, states=leg.states.clone()).run(index, layer)
        return seen

    def logits(self, block: HeadBlock) -> Iterator[torch.Tensor]:
        """Of each batch, the logits of a block of words, [B, T, words]; after the last layer."""
        for leg in self._legs:
            with torch.inference_mode():  # which must not last while somebody else runs
                found = _logits(self._ground, leg, block)
            yield found


def first_magnitudes(
    ground: Ground, layers: Sequence[int], sequences: Sequence[Sequence[int]]
) -> dict[int, NDArray[np.float64]]:
    """As `observe.sink_magnitudes`, layer by layer: the mean |x| of first tokens, [D] by layer."""
    ground.prepare(sequences)
    stream = Stream.board(ground, sequences)
    found = {}
    for index in range(max(layers) + 1):
        with ground.layer(index) as layer:
            if index in layers:
                inputs = stream.attention_inputs(index, layer)
                sums = [x[:, 0].double().abs().sum(0).cpu() for x in inputs]
                found[index] = (torch.stack(sums).sum(0) / len(sequences)).numpy()
            if index < max(layers):
                stream.step(index, layer)
    return found


def gathered(ground: Ground, stream: Stream) -> torch.Tensor:
    """A stream's logits at all tokens, batch after batch, [tokens, vocabulary], on the CPU."""
    parts: list[list[torch.Tensor]] = [[] for _ in stream.batches]
    for block in ground.head_blocks():
        for number, logits in enumerate(stream.logits(block)):
            parts[number].append(logits[stream.batches[number].real].cpu())
    return torch.cat([torch.cat(blocks, dim=-1) for blocks in parts])


def _begin(ground: Ground, batch: Batch) -> _Leg:
    """What the backbone calls each layer with, found by letting it call stand-ins.

    What is the wrong form for a model shows in the shape that the next layer gets.
    """
    layers = decoder_layers(ground.model, ground.anatomy)
    for form in _FORMS:
        calls = _record(ground, layers, batch, form)
        if len(calls) == len(layers) and len({tuple(states.shape) for states, _ in calls}) == 1:
            return _Leg(batch, calls[0][0], [call for _, call in calls], form)
    raise Unsupported(
        f"{ground.anatomy.model_type} does not call its layers one after another, so it cannot "
        "be streamed."
    )


def _record(
    ground: Ground,
    layers: list[torch.nn.Module],
    batch: Batch,
    form: Callable[[torch.Tensor], Any],
) -> list[tuple[torch.Tensor, _Call]]:
    calls: list[tuple[torch.Tensor, _Call]] = []

    def record(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((states, (args, kwargs)))
        return form(states)

    with (
        standing_in(layers, [record] * len(layers)),
        suppress(IndexError, TypeError, ValueError, AttributeError, RuntimeError),
    ):  # the wrong form, or a part after the layers that is not there
        backbone(ground.model, ground.anatomy)(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
        )
    return calls


def _copy(leg: _Leg) -> _Leg:
    """A leg that shares nothing which layers may write to: its states, and what they collect."""
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return value
        return copies.setdefault(id(value), copy(value))

    calls = [
        (args, {name: own(value) for name, value in kwargs.items()}) for args, kwargs in leg.calls
    ]
    return replace(leg, states=leg.states.clone(), calls=calls)


def _logits(ground: Ground, leg: _Leg, block: HeadBlock) -> torch.Tensor:
    """The model's own way from the last layer to its logits, for some words.

    All of it that follows the head takes one word at a time: scaling, and capping.
    """
    model = ground.model
    layers = decoder_layers(model, ground.anatomy)

    def last(*_args: Any, **_kwargs: Any) -> Any:
        return leg.form(leg.states)

    def some(states: torch.Tensor) -> torch.Tensor:
        assert block.weight is not None
        return torch.nn.functional.linear(states, block.weight, block.bias)

    replaced, forwards = list(layers), [last] * len(layers)
    if block.weight is not None:
        replaced, forwards = [*replaced, model.get_output_embeddings()], [*forwards, some]
    with standing_in(replaced, forwards):
        found: torch.Tensor = model(
            input_ids=leg.batch.ids, attention_mask=leg.batch.mask, use_cache=False
        ).logits
    return found
