"""A model that need not fit into memory: parts of it get their parameters when they are needed.

`Lender` is a ground to journey on (`surgery.models.journey`): each layer has its parameters while
it is entered. `LentModel` is a model for any number of forward passes: its decoder layers get their
matrices when they run and lose them afterwards, so that hooks see the model at work as if it were
loaded; every pass reads the layers' bytes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from surgery.errors import Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.models.ahead import Ahead
from surgery.models.anatomy import Anatomy
from surgery.models.discovery import backbone, decoder_layers
from surgery.models.ground import HeadBlock, word_blocks
from surgery.models.loading import skeleton
from surgery.models.stored import StoredParameters

logger = logging.getLogger(__name__)


class Lender:
    """A model without parameters, and the means to lend it some."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        *,
        dtype: str = "float32",
        device: torch.device | None = None,
        trust_remote_code: bool = False,
        ahead: bool | None = None,
    ) -> None:
        """Builds the model; reads nothing of it yet.

        Args:
            checkpoint: on this disk or on the Hub.
            anatomy: of it.
            dtype: to compute in.
            device: to compute on; the CPU where none is given.
            trust_remote_code: whether code that the checkpoint brings may run.
            ahead: whether the next layer is read while one is entered, so that two are in memory;
                by default on an accelerator, since on the CPU reading takes from computing.

        Raises:
            Unsupported: where transformers cannot build the model.
        """
        self._checkpoint, self._anatomy = checkpoint, anatomy
        self._device = device or torch.device("cpu")
        width: torch.dtype = getattr(torch, dtype)
        self._model = skeleton(checkpoint, trust_remote_code, dtype=width)
        self._stored = StoredParameters(checkpoint, self._model, width, self._device)
        ahead = self._device.type != "cpu" if ahead is None else ahead
        self._ahead = Ahead(self._device) if ahead else None
        self._tokens = torch.empty(0, dtype=torch.long)  # those whose embedding rows are loaded
        embedding: Any = self._model.get_input_embeddings()
        embedding.register_forward_pre_hook(self._rows_of)
        self._embedding_shape = tuple(embedding.weight.shape)  # before it holds rows alone

    @property
    def model(self) -> Any:
        """The model, whose parameters lie nowhere until they are lent."""
        return self._model

    @property
    def anatomy(self) -> Anatomy:
        """Of its checkpoint."""
        return self._anatomy

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def bytes_read(self) -> int:
        """Bytes of weight files read so far."""
        return self._stored.bytes_read

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        """Load all of the backbone that is not a decoder layer.

        Of the embedding, whose matrix is often the largest of all, only the rows of the tokens
        that occur are read.
        """
        if self._ahead is not None:
            self._ahead.drop()
        used = sorted({token for prompt in prompts for token in prompt})
        self._tokens = torch.tensor(used, device=self._device)
        embedding: Any = self._model.get_input_embeddings()
        path = next(name for name, module in self._model.named_modules() if module is embedding)
        matrix = f"{path}.weight"
        self._put(matrix, self._stored.rows(matrix, used, self._embedding_shape))
        embedding.padding_idx = None
        embedding.num_embeddings = len(used)
        layers = f"{self._anatomy.layers_path}."
        base = self._anatomy.layers_path.rpartition(".")[0]
        self._lend(base, lambda name, _: name != matrix and not name.startswith(layers))
        for buffer in backbone(self._model, self._anatomy).buffers():
            buffer.data = buffer.data.to(self._device)
        logger.debug("%d embedding rows and what lies beside the layers are loaded", len(used))

    @contextmanager
    def layer(self, index: int) -> Iterator[torch.nn.Module]:
        """A decoder layer with its parameters, which are freed afterwards."""
        path = self._path(index)
        self._enter(index)
        try:
            yield self._model.get_submodule(path)
        finally:
            for name, parameter in self._parameters(path):
                self._put(name, parameter.to("meta"))

    def head_blocks(self) -> Iterator[HeadBlock]:
        """The language-model head, some words at a time.

        Raises:
            Unsupported: where the model has none, or not as one linear.
        """
        head = self._model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise Unsupported(
                f"{self._anatomy.model_type} has no linear head, so it cannot be streamed."
            )
        path = next(name for name, module in self._model.named_modules() if module is head)
        shape = (head.out_features, head.in_features)
        name = f"{path}.weight"
        if name not in self._stored:  # tied to the embedding
            embedding = self._model.get_input_embeddings()
            modules = self._model.named_modules()
            name = next(f"{found}.weight" for found, module in modules if module is embedding)
        bias = None
        if head.bias is not None:
            bias = self._stored.values(f"{path}.bias", (shape[0],))
        for begin, end in word_blocks(*shape):
            weight = self._stored.rows(name, range(begin, end), shape)
            yield HeadBlock(begin, end, weight, bias[begin:end] if bias is not None else None)

    def _enter(self, index: int) -> None:
        """Give a layer its parameters, and have the next one read meanwhile."""
        values = self._ahead.take(index) if self._ahead is not None else None
        for name, tensor in (values or self._values(self._path(index))).items():
            self._put(name, tensor)
        if self._ahead is not None and index + 1 < self._anatomy.depth:
            following = self._path(index + 1)
            self._ahead.begin(index + 1, lambda: self._values(following))

    def _path(self, index: int) -> str:
        return f"{self._anatomy.layers_path}.{index}"

    def _values(self, path: str) -> dict[str, torch.Tensor]:
        """The stored values of a module's parameters."""
        return {
            name: self._stored.values(name, tuple(parameter.shape))
            for name, parameter in self._parameters(path)
        }

    def _rows_of(self, _module: Any, args: tuple) -> tuple:
        """Token ids to the rows of the embedding that holds these tokens alone."""
        return (torch.searchsorted(self._tokens, args[0]), *args[1:])

    def _lend(
        self,
        path: str,
        wanted: Callable[[str, torch.nn.Parameter], bool] = lambda _name, _parameter: True,
    ) -> None:
        """Give the parameters of a module their stored values."""
        for name, parameter in self._parameters(path):
            if wanted(name, parameter):
                self._put(name, self._stored.values(name, tuple(parameter.shape)))

    def _take_back(self, path: str) -> None:
        """Free the matrices of a module. Vectors stay: they are small, and hooks look at gains."""
        for name, parameter in self._parameters(path):
            if _is_matrix(name, parameter):
                self._put(name, parameter.to("meta"))

    def _parameters(self, path: str) -> list[tuple[str, torch.nn.Parameter]]:
        module = self._model.get_submodule(path)
        return list(module.named_parameters(prefix=path, remove_duplicate=False))

    def _put(self, name: str, values: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        holder = self._model.get_submodule(owner)
        holder._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)


def _is_matrix(_name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() > 1


class LentModel(Lender):
    """The model of a checkpoint, with no more than one decoder layer's matrices in memory."""

    def open(self, prompts: Sequence[Sequence[int]]) -> Any:
        """The model, for forward passes of its backbone over tokens that occur in `prompts`."""
        with torch.inference_mode():
            self.prepare(prompts)
            for index, layer in enumerate(decoder_layers(self._model, self._anatomy)):
                path = self._path(index)
                self._lend(path, lambda *parameter: not _is_matrix(*parameter))
                layer.register_forward_pre_hook(lambda *_, path=path: self._lend(path, _is_matrix))
                layer.register_forward_hook(lambda *_, path=path: self._take_back(path))
        return self._model
