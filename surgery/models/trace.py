"""The anatomy of a model found by running it: who reads the output of each pre-attention norm.

The configuration is built on the meta device (no memory, no arithmetic) and run once on a few
tokens; every norm output is followed through operations that keep its columns in place, and every
consumer is recorded (`surgery.models.dataflow`). What comes out checks the table of families, and
replaces it for families that the table does not know.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery.errors import Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.models.anatomy import (
    Anatomy,
    AttentionInput,
    check_depth,
    check_shapes,
    depth_of,
    text_config,
    width_of,
)
from surgery.models.dataflow import Consumer, Flow, follow
from surgery.models.discovery import attention_names, find_layers
from surgery.models.families import NO_GAIN
from surgery.models.loading import skeleton
from surgery.models.names import StoredNames

logger = logging.getLogger(__name__)


def trace(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Anatomy:
    """The anatomy of a checkpoint's architecture, from one forward pass on the meta device.

    Args:
        checkpoint: whose config.json and headers are read, and nothing else.
        trust_remote_code: whether code that the checkpoint brings may run.

    Raises:
        Unsupported: where attention has no normed input that could be masked, naming the consumer
            at fault.
        BadCheckpoint: where the checkpoint lacks a tensor or holds it in another shape.
    """
    check_depth(checkpoint)
    model = skeleton(checkpoint, trust_remote_code)
    config = checkpoint.config
    model_type = str(text_config(config).get("model_type", checkpoint.model_type))
    logger.info("tracing %s on the meta device", model_type)
    layers_path, layers = find_layers(
        model, depth_of(config), lambda layer: bool(attention_names(layer))
    )
    flow = follow(model, layers_path, width_of(config))
    finder = _Finder(model_type, flow, StoredNames(checkpoint, model))
    found = [
        finder.input_at(f"{layers_path}.{index}", index, layer)
        for index, layer in enumerate(layers)
    ]
    known = [one for one in found if one is not None]
    if not known:
        raise Unsupported(
            f"{model_type} cannot be converted: no linear in any attention module reads "
            "the output of a norm, so there is no normed attention input to mask."
        )
    for what in ("axis", "null_gain"):
        if len({getattr(one, what) for one in known}) > 1:
            raise Unsupported(f"{model_type} cannot be converted: its layers differ in {what}.")
    anatomy = Anatomy(
        model_type=model_type,
        hidden_size=width_of(config),
        layers_path=layers_path,
        inputs=tuple(one.input if one is not None else None for one in found),
        null_gain=known[0].null_gain,
        input_axis=known[0].axis,
        norm_refusal=next((one.norm_refusal for one in known if one.norm_refusal), ""),
        known_from="trace",
    )
    check_shapes(anatomy, checkpoint)
    return anatomy


@dataclass(frozen=True)
class _Found:
    """The attention input of one layer, and what must be the same in all layers.

    Attributes:
        input: norm, attention and readers.
        axis: of the readers' weights, over the attention input.
        null_gain: the stored gain that multiplies by zero.
        norm_refusal: why the `norm` fold is not possible; empty where it is.
    """

    input: AttentionInput
    axis: int
    null_gain: float
    norm_refusal: str


@dataclass(frozen=True)
class _Finder:
    """Reads a finished trace, layer by layer."""

    model_type: str
    flow: Flow
    stored: StoredNames

    def input_at(self, path: str, index: int, layer: torch.nn.Module) -> _Found | None:
        """The attention input of a layer; None where no norm of the layer feeds attention."""
        for norm, consumers in self.flow.consumers.items():
            inside = [c for c in consumers if self.flow.in_attention(c.module)]
            if inside and norm.rpartition(".")[0] == path:
                outside = [c for c in consumers if c not in inside]
                return self._found(path, index, layer, norm, inside, outside)
        return None

    def _found(
        self,
        path: str,
        index: int,
        layer: torch.nn.Module,
        norm: str,
        inside: list[Consumer],
        outside: list[Consumer],
    ) -> _Found:
        self._require_plain(path, norm, inside)
        readers = tuple(dict.fromkeys(str(c.weight).rpartition(".")[0] for c in inside))
        module = layer.get_submodule(norm[len(path) + 1 :])
        has_gain = isinstance(getattr(module, "weight", None), torch.Tensor)
        has_bias = isinstance(getattr(module, "bias", None), torch.Tensor)
        refusal = "" if has_gain else NO_GAIN
        if outside:
            refusal = f"{_who(outside[0], path)} the same norm"
        return _Found(
            AttentionInput(
                layer=index,
                norm=norm,
                attention=".".join(readers[0].split(".")[: path.count(".") + 2]),
                readers=readers,
                gain=self.stored.of(f"{norm}.weight") if has_gain else "",
                bias=self.stored.of(f"{norm}.bias") if has_bias else None,
                weights=tuple(self.stored.of(f"{reader}.weight") for reader in readers),
            ),
            inside[0].axis,
            _null_gain(module) if has_gain else 0.0,
            refusal,
        )

    def _require_plain(self, path: str, norm: str, inside: list[Consumer]) -> None:
        """Raise Unsupported unless the readers are linears of this layer, run once."""
        strange = next((c for c in inside if c.weight is None), None)
        if strange is not None:
            raise Unsupported(
                f"{self.model_type} cannot be converted: {strange.module} reads the "
                f"attention input through {strange.operation}, which no weight edit can mask."
            )
        foreign = next((c for c in inside if not str(c.weight).startswith(f"{path}.")), None)
        if foreign is not None:
            raise Unsupported(
                f"{self.model_type} cannot be converted: {path} reads the attention input through "
                f"{foreign.weight}, which belongs to another layer too."
            )
        if len({c.axis for c in inside}) > 1:
            raise Unsupported(
                f"{self.model_type} cannot be converted: the weights that read the attention input "
                f"of {path} run over it along different axes."
            )
        if self.flow.runs[norm] > 1:
            raise Unsupported(
                f"{self.model_type} cannot be converted: {path} runs several times for each token, "
                "so no edit reaches one run alone."
            )


def _who(consumer: Consumer, path: str) -> str:
    """A consumer beside attention, as the beginning of a sentence."""
    if consumer.module in ("", path):
        return f"{path} itself, through {consumer.operation}, reads"
    return f"{consumer.module} reads"


def _null_gain(norm: torch.nn.Module) -> float:
    """The stored gain with which a norm gives exactly 0, found by trying 0 and -1.

    Tried on a norm of its own, with every other parameter zero: a bias would hide the zero.
    """
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu")
    weight = probe.weight
    x = torch.randn(1, 3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    for null in (0.0, -1.0):
        with torch.inference_mode():
            for parameter in probe.parameters():
                parameter.zero_()
            weight.fill_(null)
            if not probe(x).any():
                return null
    raise Unsupported(f"The norm {type(norm).__name__} gives zero for neither a gain of 0 nor -1.")


def confirm(described: Anatomy | None, traced: Anatomy, *, multimodal: bool = False) -> Anatomy:
    """The anatomy that the table and the trace agree on.

    Args:
        described: by the table; None where the table does not know the family.
        traced: by running the model.
        multimodal: whether the decoder is part of another model: where the decoder layers lie is
            then the trace's to say.

    Raises:
        Unsupported: where the two disagree: the table is out of date for this transformers.
    """
    if described is None:
        return traced
    for field_name in ("model_type", "null_gain", "input_axis", "hidden_size"):
        _same(described, field_name, getattr(described, field_name), getattr(traced, field_name))
    _same(described, "legality of norm", bool(described.norm_refusal), bool(traced.norm_refusal))
    for ours, theirs in zip(described.inputs, traced.inputs, strict=True):
        _same(described, "attention input", _relative(described, ours), _relative(traced, theirs))
    known_from = "table, confirmed by trace"
    if multimodal:
        return replace(traced, norm_refusal=described.norm_refusal, known_from=known_from)
    _same(described, "layers_path", described.layers_path, traced.layers_path)
    return replace(described, known_from=known_from)


def _relative(anatomy: Anatomy, found: AttentionInput | None) -> Any:
    """An attention input to compare, its modules relative to the layers."""
    if found is None:
        return None
    start = len(anatomy.layers_path)
    modules = (found.norm[start:], found.attention[start:])
    return (*modules, found.gain, found.bias, tuple(sorted(found.weights)))


def _same(described: Anatomy, what: str, table: Any, traced: Any) -> None:
    if table != traced:
        raise Unsupported(
            f"The table of families and a trace of {described.model_type} disagree about its "
            f"{what} (table: {table}; trace: {traced}); this transformers release lays the model "
            "out differently, so nothing is edited."
        )
