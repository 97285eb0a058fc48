"""Running a model layer by layer, straight from its checkpoint's bytes.

Only what is needed is read: the embedding rows of the prompts' tokens, then one decoder layer after
another until the emergence is established and has lasted. The model may lie on this disk or on the
Hub, and need not fit into memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.method.locate import Emergence, agree, vote
from surgery.models.ground import Ground
from surgery.models.journey import Stream
from surgery.models.lending import Lender
from surgery.models.observe import Progress

logger = logging.getLogger(__name__)

Stop = Callable[[list[NDArray[np.float64]]], bool]
# Layers the sink must stay massive for before a stream stops. SmolLM2's early rise, which fades,
# lasts seven.
PATIENCE = 8


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
        emergence, layers_run = locate(self, prompts, all_layers=all_layers, progress=progress)
        depth, total = self.anatomy.depth, self._checkpoint.size
        return Streamed(emergence, layers_run, depth, self.bytes_read, total)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Stop,
        progress: Progress = lambda _done: None,
    ) -> list[NDArray[np.float64]]:
        """As `stream_norms`."""
        return stream_norms(self, prompts, stop, progress)


def locate(
    ground: Ground,
    prompts: Sequence[Sequence[int]],
    *,
    all_layers: bool = False,
    progress: Progress = lambda _done: None,
) -> tuple[Emergence, int]:
    """The ME Layer, from no more layers than it takes, and how many of them ran.

    Args:
        ground: the model, loaded or not.
        prompts: token ids.
        all_layers: go on to the last layer, instead of stopping once the emergence has lasted.
        progress: called with 1 after every layer.
    """
    depth = ground.anatomy.depth
    norms = stream_norms(
        ground, prompts, lambda found: not all_layers and established(found, depth), progress
    )
    layers_run = norms[0].shape[0] - 1
    logger.info("ran %d of %d layers", layers_run, depth)
    return agree(norms, depth=depth), layers_run


def stream_norms(
    ground: Ground,
    prompts: Sequence[Sequence[int]],
    stop: Stop,
    progress: Progress = lambda _done: None,
) -> list[NDArray[np.float64]]:
    """L2 norms of the residual stream, as `observe.layer_norms` gives them.

    Args:
        ground: the model, loaded or not.
        prompts: token ids.
        stop: asked after every layer, with the norms so far.
        progress: called with 1 after every layer.

    Returns:
        Per prompt, [layers run + 1, tokens].
    """
    ground.prepare(prompts)
    stream = Stream.board(ground, prompts)
    norms: list[list[torch.Tensor]] = [[] for _ in prompts]
    _keep(norms, stream)
    for index in range(ground.anatomy.depth):
        with ground.layer(index) as layer:
            stream.step(index, layer)
        _keep(norms, stream)
        progress(1)
        if stop([torch.stack(rows).double().numpy() for rows in norms]):
            break
    return [torch.stack(rows).double().numpy() for rows in norms]


def _keep(norms: list[list[torch.Tensor]], stream: Stream) -> None:
    for batch, states in zip(stream.batches, stream.states, strict=True):
        found = states.float().norm(dim=-1).cpu()
        for row, (place, length) in enumerate(zip(batch.places, batch.lengths, strict=True)):
            norms[place].append(found[row, :length])


def established(norms: Sequence[NDArray[np.float64]], depth: int) -> bool:
    """Whether every prompt shows an emergence that has lasted for PATIENCE layers.

    Args:
        norms: per prompt, [layers run + 1, tokens].
        depth: number of layers of the model.
    """
    found = [vote(prompt, depth=depth).layer for prompt in norms]
    last = norms[0].shape[0] - 2
    return all(layer is not None and last - layer >= PATIENCE for layer in found)
