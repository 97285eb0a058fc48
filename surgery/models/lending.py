"""A model that need not fit into memory, for any number of forward passes.

Its decoder layers get their matrices when they run and lose them afterwards, so that hooks see the
model at work as if it were loaded. Every pass reads the layers' bytes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.models.observe import decoder_layers
from surgery.models.stream import LayerStream


class LentModel(LayerStream):
    """The model of a checkpoint, with no more than one decoder layer's matrices in memory."""

    def open(self, prompts: Sequence[Sequence[int]]) -> Any:
        """The model, for forward passes of its backbone over tokens that occur in `prompts`."""
        self._model.get_input_embeddings().register_forward_pre_hook(_Places(prompts))
        with torch.inference_mode():
            self.prepare(prompts)
            for index, layer in enumerate(decoder_layers(self._model, self._anatomy)):
                path = f"{self._anatomy.layers_path}.{index}"
                # Vectors stay: they are small, and the evidence looks at gains.
                self._lend(path, matrices=False)
                layer.register_forward_pre_hook(lambda *_, path=path: self._lend(path))
                layer.register_forward_hook(lambda *_, path=path: self._take_back(path))
        return self._model

    def _lend(self, path: str, *, matrices: bool = True) -> None:
        for name, parameter in self._parameters_of(path):
            if (parameter.dim() > 1) == matrices:
                self._put(name, self._stored(name, tuple(parameter.shape)))

    def _take_back(self, path: str) -> None:
        for name, parameter in self._parameters_of(path):
            if parameter.dim() > 1:
                self._put(name, parameter.to("meta"))

    def _parameters_of(self, path: str) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self._model.get_submodule(path).named_parameters(prefix=path))

    def _put(self, name: str, values: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        holder = self._model.get_submodule(owner)
        holder._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)


class _Places:
    """Token ids to the rows of an embedding that holds the prompts' tokens alone."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        used = sorted({token for prompt in prompts for token in prompt})
        self._tokens = torch.tensor(used)

    def __call__(self, _module: Any, args: tuple) -> tuple:
        ids = args[0]
        return (torch.searchsorted(self._tokens.to(ids.device), ids), *args[1:])
