"""Running a model layer by layer, straight from its checkpoint's bytes.

Only what is needed is read: the embedding rows of the prompts' tokens, then one decoder layer after
another until the emergence is established and has lasted. The model may lie on this disk or on the
Hub, and need not fit into memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.errors import Unsupported
from surgery.method.locate import Emergence, agree, vote
from surgery.models.discovery import backbone, decoder_layers
from surgery.models.lending import Lender
from surgery.models.observe import Progress, hidden, pad, residual, standing_in

logger = logging.getLogger(__name__)

# Layers the sink must stay massive for before a stream stops. SmolLM2's early rise, which fades,
# lasts seven.
PATIENCE = 8
# Prompts within this factor of each other's length share a batch; more padding wastes time.
_SIMILAR = 1.5
# Tokens of a batch, at most, unless one prompt is longer: bounds the memory of activations.
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Streamed:
    """What a stream saw.

    Attributes:
        emergence: what the layers that ran show.
        layers_run: how many of the layers ran.
        depth: how many there are.
        bytes_read: of the weight files.
        bytes_total: what the weight files hold.
    """

    emergence: Emergence
    layers_run: int
    depth: int
    bytes_read: int
    bytes_total: int

    def summary(self) -> dict[str, int]:
        """How much was read, for JSON."""
        return {
            name: getattr(self, name)
            for name in ("layers_run", "depth", "bytes_read", "bytes_total")
        }


class LayerStream(Lender):
    """A model whose decoder layers run one after another on all prompts, each of them once."""

    def locate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        all_layers: bool = False,
        progress: Progress = lambda _done: None,
    ) -> Streamed:
        """Locate the ME Layer of a model that is never loaded whole.

        Gives the layer and the norms of the full forward pass (relative difference below 1e-3 in
        float32: padding and batching change the order of sums).

        Args:
            prompts: token ids.
            all_layers: go on to the last layer, instead of stopping once the emergence has lasted.
            progress: called with 1 after every layer.

        Raises:
            Unsupported: for layouts whose tensors do not map one to one onto the model's.
        """
        depth = self._anatomy.depth
        norms = self.run(
            prompts, lambda found: not all_layers and established(found, depth), progress
        )
        layers_run = norms[0].shape[0] - 1
        logger.info("ran %d of %d layers", layers_run, depth)
        emergence = agree(norms, depth=depth)
        return Streamed(emergence, layers_run, depth, self.bytes_read, self._checkpoint.size)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Callable[[list[NDArray[np.float64]]], bool],
        progress: Progress = lambda _done: None,
    ) -> list[NDArray[np.float64]]:
        """L2 norms of the residual stream, as `observe.layer_norms` gives them.

        Args:
            prompts: token ids.
            stop: asked after every layer, with the norms so far.
            progress: called with 1 after every layer.

        Returns:
            Per prompt, [layers run + 1, tokens].
        """
        layers = decoder_layers(self._model, self._anatomy)
        with torch.inference_mode():
            self.prepare(prompts)
            groups = list(_groups(prompts))
            states: list[torch.Tensor] = []
            calls = []
            for group in groups:
                recorded = self._calls(layers, [ids for _, ids in group])
                states.append(recorded[0][0])
                calls.append([(args, kwargs) for _, args, kwargs in recorded])
            del recorded
            norms: list[list[torch.Tensor]] = [[] for _ in prompts]
            beside: list[Any] = [None] * len(calls)
            _keep(norms, groups, states)
            for index, layer in enumerate(layers):
                self._lend(f"{self._anatomy.layers_path}.{index}")
                for number, call in enumerate(calls):
                    args, kwargs = call[index]
                    kwargs = {
                        name: beside[number] if value is _BESIDE else value
                        for name, value in kwargs.items()
                    }
                    output = layer(states[number], *args, **kwargs)
                    states[number] = hidden(output)
                    beside[number] = output[1] if _is_pair(output) else None
                layer.to("meta")
                _keep(norms, groups, states)
                progress(1)
                if stop([torch.stack(rows).double().numpy() for rows in norms]):
                    break
        return [torch.stack(rows).double().numpy() for rows in norms]

    def _calls(
        self, layers: list[torch.nn.Module], prompts: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, tuple, dict]]:
        """What the backbone calls each layer with, found by letting it call stand-ins.

        Some models' layers return their states alone, others (in transformers 4) in a tuple, or
        with something beside them that the next layer may get; what is wrong for a model shows in
        the shape that the next layer gets.
        """
        forms: tuple[Callable[[torch.Tensor], Any], ...] = (
            lambda states: states,
            lambda states: (states,),
            lambda states: (states, _BESIDE),
        )
        for form in forms:
            calls = self._record(layers, prompts, form)
            shapes = {tuple(states.shape) for states, _, _ in calls}
            if len(calls) == len(layers) and len(shapes) == 1:
                return calls
        raise Unsupported(
            f"{self._anatomy.model_type} does not call its layers one after another, so it cannot "
            "be streamed."
        )

    def _record(
        self,
        layers: list[torch.nn.Module],
        prompts: Sequence[Sequence[int]],
        form: Callable[[torch.Tensor], Any],
    ) -> list[tuple[torch.Tensor, tuple, dict]]:
        ids, mask = pad(prompts)
        calls: list[tuple[torch.Tensor, tuple, dict]] = []

        def record(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((states, args, kwargs))
            return form(states)

        with (
            standing_in(layers, [record] * len(layers)),
            suppress(IndexError, TypeError, ValueError, AttributeError, RuntimeError),
        ):  # the wrong form, or a part after the layers that is not there
            backbone(self._model, self._anatomy)(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                use_cache=False,
            )
        return calls


# Stands for what a layer returns beside its states.
_BESIDE = object()


def _is_pair(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) > 1


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Prompts of similar length together, each with its place."""
    ordered = sorted(enumerate(prompts), key=lambda pair: len(pair[1]))
    group: list[tuple[int, Sequence[int]]] = []
    for pair in ordered:
        crowded = len(pair[1]) * (len(group) + 1) > _BATCH_TOKENS
        if group and (crowded or len(pair[1]) > _SIMILAR * len(group[0][1])):
            yield group
            group = []
        group.append(pair)
    if group:
        yield group


def _keep(
    norms: list[list[torch.Tensor]],
    groups: list[list[tuple[int, Sequence[int]]]],
    states: list[torch.Tensor],
) -> None:
    for group, state in zip(groups, states, strict=True):
        lengths = residual(state).float().norm(dim=-1).cpu()
        for row, (place, ids) in enumerate(group):
            norms[place].append(lengths[row, : len(ids)])


def established(norms: Sequence[NDArray[np.float64]], depth: int) -> bool:
    """Whether every prompt shows an emergence that has lasted for PATIENCE layers.

    Args:
        norms: per prompt, [layers run + 1, tokens].
        depth: number of layers of the model.
    """
    found = [vote(prompt, depth=depth).layer for prompt in norms]
    last = norms[0].shape[0] - 2
    return all(layer is not None and last - layer >= PATIENCE for layer in found)
