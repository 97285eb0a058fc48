"""The anatomy of a model: for each decoder layer, the norm before attention and who reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import dtypes
from surgery.checkpoint import Checkpoint
from surgery.errors import BadCheckpoint, Unsupported
from surgery.families import Family, family_of

FOLDS = ("norm", "qkv", "sink")


@dataclass(frozen=True)
class AttentionInput:
    """The attention input of one decoder layer.

    layer: index, from 0. norm, attention, readers: module paths in the loaded model. gain, bias,
    weights: names of the norm's and the readers' tensors in the checkpoint.
    """

    layer: int
    norm: str
    attention: str
    readers: tuple[str, ...]
    gain: str
    bias: str | None
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """What a fold needs to know about a model.

    inputs: per decoder layer, None where the layer has no attention. null_gain: the stored gain
    that multiplies by zero. input_axis: the axis of a reader's weight that runs over the attention
    input: 1 for linears stored [out, in], 0 for GPT-2's Conv1D. norm_refusal: why the `norm` fold
    would change more than attention; empty when it is legal. known_from: "table", "trace" or
    "table, confirmed by trace".
    """

    model_type: str
    hidden_size: int
    layers_path: str
    inputs: tuple[AttentionInput | None, ...]
    null_gain: float
    input_axis: int
    norm_refusal: str
    known_from: str

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.inputs)

    def at(self, layer: int) -> AttentionInput:
        """The attention input of a layer; Unsupported when that layer has none."""
        if not 0 <= layer < self.depth:
            raise Unsupported(
                f"Layer {layer} does not exist: the model has layers 0 to {self.depth - 1}."
            )
        found = self.inputs[layer]
        if found is None:
            raise Unsupported(f"Layer {layer} has no attention input to mask; choose another.")
        return found

    def require(self, fold: str) -> None:
        """Raise Unsupported, naming the alternative, where a fold would not be truthful."""
        if fold == "norm" and self.norm_refusal:
            raise Unsupported(
                f"--fold norm is not possible for {self.model_type}: {self.norm_refusal}; "
                "use --fold qkv (the same function, in the attention's own weights) or --fold sink."
            )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the text decoder."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "model_type" in nested else config


def _positive(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise BadCheckpoint(f"config.json has no usable {names[0]}.")


def depth_of(config: Mapping[str, Any]) -> int:
    """Number of decoder layers a configuration describes."""
    return _positive(text_config(config), "num_hidden_layers", "n_layer", "num_layers")


def check_depth(checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint where config.json describes more layers than there can be."""
    depth = depth_of(checkpoint.config)
    if depth > len(checkpoint.tensors):
        raise BadCheckpoint(
            f"config.json describes {depth} layers, but the checkpoint has only "
            f"{len(checkpoint.tensors)} tensors."
        )


def width_of(config: Mapping[str, Any]) -> int:
    """Hidden size a configuration describes."""
    return _positive(text_config(config), "hidden_size", "n_embd", "d_model")


def describe(checkpoint: Checkpoint) -> Anatomy | None:
    """Anatomy from the table of families and the checkpoint's headers; None if unknown there.

    Raises Unsupported for families that cannot be folded, BadCheckpoint where the headers lack a
    tensor or hold it in another shape than the table and the configuration say.
    """
    config = text_config(checkpoint.config)
    family = family_of(config)
    if family is None:
        return None
    model_type = str(config["model_type"])
    refuse_quantised(checkpoint)
    if family.refusal:
        raise Unsupported(f"{model_type} cannot be converted: {family.refusal}.")
    check_depth(checkpoint)
    prefix = _stored_prefix(checkpoint, family)
    inputs = []
    for layer in range(depth_of(config)):
        module = f"{family.layers}.{layer}"
        stored = f"{prefix}.{layer}"
        bias = f"{stored}.{family.norm}.bias"
        inputs.append(
            AttentionInput(
                layer=layer,
                norm=f"{module}.{family.norm}",
                attention=f"{module}.{family.attention}",
                readers=tuple(f"{module}.{reader}" for reader in family.readers),
                gain=f"{stored}.{family.norm}.weight",
                bias=bias if bias in checkpoint.tensors else None,
                weights=tuple(f"{stored}.{reader}.weight" for reader in family.readers),
            )
        )
    anatomy = Anatomy(
        model_type=model_type,
        hidden_size=width_of(config),
        layers_path=family.layers,
        inputs=tuple(inputs),
        null_gain=family.null_gain,
        input_axis=0 if family.transposed else 1,
        norm_refusal=family.shared_norm,
        known_from="table",
    )
    check_shapes(anatomy, checkpoint)
    return anatomy


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for a checkpoint whose weights are quantised."""
    quantisation = checkpoint.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
        raise Unsupported(
            f"This checkpoint is quantised ({method or 'unknown method'}); convert the unquantised "
            "checkpoint and quantise the result."
        )


def _stored_prefix(checkpoint: Checkpoint, family: Family) -> str:
    """How the checkpoint spells the path of the decoder layers.

    Checkpoints saved from a bare decoder lack its first component (GPT-2's "h.0…" against
    "transformer.h.0…"); transformers loads both.
    """
    candidates = (family.layers, family.layers.split(".", 1)[-1])
    for prefix in candidates:
        if f"{prefix}.0.{family.norm}.weight" in checkpoint.tensors:
            return prefix
    raise BadCheckpoint(
        f"The checkpoint has no tensor {candidates[0]}.0.{family.norm}.weight, which a "
        f"{checkpoint.model_type} model must have."
    )


def check_shapes(anatomy: Anatomy, checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint unless every tensor the anatomy names exists in the right shape."""
    for found in anatomy.inputs:
        if found is None:
            continue
        for name, axis in (
            (found.gain, 0),
            *(((found.bias, 0),) if found.bias else ()),
            *((weight, anatomy.input_axis) for weight in found.weights),
        ):
            entry = checkpoint.tensors.get(name)
            if entry is None:
                raise BadCheckpoint(f"The checkpoint lacks {name}, which config.json implies.")
            if len(entry.shape) <= axis or entry.shape[axis] != anatomy.hidden_size:
                raise BadCheckpoint(
                    f"{name} has shape {list(entry.shape)}; expected {anatomy.hidden_size} "
                    f"(the hidden size) along axis {axis}."
                )


def effective_gain(anatomy: Anatomy, checkpoint: Checkpoint, layer: int) -> NDArray[np.float64]:
    """What the pre-attention norm of a layer multiplies by, float64, shape [hidden size]."""
    name = anatomy.at(layer).gain
    stored = checkpoint.read(name)
    if not dtypes.all_finite(stored):
        raise BadCheckpoint(f"{name} holds values that are not finite; the checkpoint is damaged.")
    return stored.astype(np.float64) - anatomy.null_gain


def is_editable(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is stored in a floating-point format that can be edited."""
    return dtypes.is_float(checkpoint.tensors[name].dtype)
