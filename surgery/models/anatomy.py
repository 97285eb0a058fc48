"""The anatomy of a model: for each decoder layer, the norm before attention and who reads it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files import dtypes
from surgery.files.checkpoint import Checkpoint
from surgery.files.foreign import is_whole, whole
from surgery.files.weights import method_of
from surgery.models.families import Family, Mixer, family_of
from surgery.models.names import layers_prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionInput:
    """The attention input of one decoder layer: the norm that makes it, the linears that read it.

    Attributes:
        layer: index, from 0.
        norm: module path of the norm in the loaded model.
        attention: module path of the attention module.
        readers: module paths of the linears.
        gain: name of the norm's weight in the checkpoint; empty where the norm has no parameters.
        bias: name of the norm's bias in the checkpoint; None where it has none.
        weights: names of the readers' weights in the checkpoint, in their order.
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

    Attributes:
        model_type: of the text decoder, as its configuration calls it.
        hidden_size: D, the width of the residual stream.
        layers_path: module path of the list of decoder layers in the loaded model.
        inputs: per decoder layer, None where the layer has no attention.
        null_gain: the stored gain that multiplies by zero: -1 in norms that multiply by 1 + w.
        input_axis: the axis of a reader's weight that runs over the attention input: 1 for linears
            stored [out, in], 0 for GPT-2's Conv1D.
        norm_refusal: why the `norm` fold would change more than attention; empty when it is legal.
        known_from: "table", "trace" or "table, confirmed by trace".
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

    @property
    def attends(self) -> tuple[bool, ...]:
        """Per layer, whether it has an attention input."""
        return tuple(found is not None for found in self.inputs)

    def at(self, layer: int) -> AttentionInput:
        """The attention input of a layer.

        Raises:
            Unsupported: where the layer has none, or does not exist.
        """
        if not 0 <= layer < self.depth:
            raise Unsupported(
                f"Layer {layer} does not exist: the model has layers 0 to {self.depth - 1}."
            )
        found = self.inputs[layer]
        if found is None:
            raise Unsupported(f"Layer {layer} has no attention input to mask; choose another.")
        return found

    def require_selection(self, select: str) -> None:
        """Raise Unsupported, naming the alternative, where there is nothing to select by."""
        if select == "weight" and any(found and not found.gain for found in self.inputs):
            raise Unsupported(
                f"--select weight is not possible for {self.model_type}: it ranks dimensions by "
                "the gain of the norm before attention, which has no parameters here; use --select "
                "activation."
            )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the text decoder."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "model_type" in nested else config


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether the text decoder is one part of the model among others.

    Where in the loaded model it then lies is for transformers to say, release by release.
    """
    return text_config(config) is not config


def _positive(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if is_whole(value) and value > 0:
            return int(value)
    raise BadCheckpoint(f"config.json has no usable {names[0]}.")


def depth_of(config: Mapping[str, Any]) -> int:
    """Number of decoder layers a configuration describes."""
    text = text_config(config)
    kinds = text.get("layers_block_type")  # Nemotron-H counts its layers by nothing else
    if isinstance(kinds, list) and kinds:
        return len(kinds)
    return _positive(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def check_depth(checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint where config.json describes more layers than there can be.

    Building the model takes time and memory for each of them, an image encoder's and experts too.
    """
    depth = depth_of(checkpoint.config)
    if depth > len(checkpoint.tensors):
        raise BadCheckpoint(
            f"config.json describes {depth} layers, but the checkpoint has only "
            f"{len(checkpoint.tensors)} tensors."
        )
    for name, count in _modules(checkpoint.config):
        if count > max(len(checkpoint.tensors), _MODULES):
            raise BadCheckpoint(
                f"config.json says {name} = {count}, but the checkpoint has only "
                f"{len(checkpoint.tensors)} tensors."
            )


# So many modules cost next to nothing, whether there are tensors for them or not.
_MODULES = 2000


def _modules(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What a configuration, or a block of it, calls a number of layers or experts."""
    blocks = [config]
    for block in blocks:  # which grows meanwhile
        for name, value in block.items():
            if isinstance(value, Mapping):
                blocks.append(value)
            elif is_whole(value) and name.endswith(("layer", "layers", "depth", "experts")):
                yield name, value


def width_of(config: Mapping[str, Any]) -> int:
    """Hidden size a configuration describes."""
    return _positive(text_config(config), "hidden_size", "n_embd", "d_model")


def describe(checkpoint: Checkpoint) -> Anatomy | None:
    """Anatomy from the table of families and the checkpoint's headers.

    Returns:
        None where the table does not know the family.

    Raises:
        Unsupported: for families that cannot be folded.
        BadCheckpoint: where the headers lack a tensor or hold it in another shape than the table
            and the configuration say.
    """
    config = text_config(checkpoint.config)
    family = family_of(config)
    if family is None:
        return None
    model_type = str(config["model_type"])
    if family.refusal:
        raise Unsupported(f"{model_type} cannot be converted: {family.refusal}.")
    check_depth(checkpoint)
    tensor = f"{family.norm}.weight" if family.has_gain else f"{family.readers[0]}.weight"
    prefix = layers_prefix(checkpoint, family.layers, tensor)
    anatomy = Anatomy(
        model_type=model_type,
        hidden_size=width_of(config),
        layers_path=family.layers,
        inputs=tuple(
            _input_at(checkpoint, family, prefix, layer) for layer in range(depth_of(config))
        ),
        null_gain=family.null_gain,
        input_axis=0 if family.transposed else 1,
        norm_refusal=family.norm_refusal,
        known_from="table",
    )
    check_shapes(anatomy, checkpoint)
    logger.debug("%s is in the table of families; its layers are stored at %s", model_type, prefix)
    return anatomy


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for a checkpoint whose weights are quantised."""
    method = method_of(checkpoint.config)
    if method:
        raise Unsupported(
            f"This checkpoint is quantised ({method}); convert the unquantised checkpoint and "
            "quantise the result."
        )


def _input_at(
    checkpoint: Checkpoint, family: Family, prefix: str, layer: int
) -> AttentionInput | None:
    stored, module = f"{prefix}.{layer}", f"{family.layers}.{layer}"
    mixer = _mixer_at(checkpoint, family, stored, layer)
    if mixer is None:
        return None
    bias = f"{stored}.{family.norm}.bias"
    return AttentionInput(
        layer=layer,
        norm=f"{module}.{family.norm}",
        attention=f"{module}.{mixer.attention}",
        readers=tuple(f"{module}.{reader}" for reader in mixer.readers),
        gain=f"{stored}.{family.norm}.weight" if family.has_gain else "",
        bias=bias if bias in checkpoint.tensors else None,
        weights=tuple(f"{stored}.{reader}.weight" for reader in mixer.readers),
    )


def _mixer_at(checkpoint: Checkpoint, family: Family, stored: str, layer: int) -> Mixer | None:
    """The attention module of a layer: the first whose tensors are all there.

    None for a layer of a hybrid family that holds no tensor of any of them. Where some tensors are
    missing, the mixer that they are missing from: `check_shapes` will name them.
    """
    config = text_config(checkpoint.config)
    from_end = depth_of(config) - layer
    possible = [
        mixer
        for mixer in family.all_mixers
        if not mixer.last or from_end <= whole(config, mixer.last, default=0)
    ]

    def held(mixer: Mixer) -> list[bool]:
        return [f"{stored}.{reader}.weight" in checkpoint.tensors for reader in mixer.readers]

    complete = next((mixer for mixer in possible if all(held(mixer))), None)
    if complete is not None or (family.hybrid and not any(any(held(m)) for m in possible)):
        return complete
    return next((mixer for mixer in possible if any(held(mixer))), possible[0])


def check_shapes(anatomy: Anatomy, checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint unless every tensor the anatomy names exists in the right shape.

    The weights of a quantised checkpoint, which are stored in many ways, are left out.
    """
    plain = not method_of(checkpoint.config)
    for found in anatomy.inputs:
        if found is None:
            continue
        for name, axis in (
            *(((found.gain, 0),) if found.gain else ()),
            *(((found.bias, 0),) if found.bias else ()),
            *((weight, anatomy.input_axis) for weight in found.weights if plain),
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
    """What the pre-attention norm of a layer multiplies by, [D] (the g that eq. 4 ranks).

    In float64, in which every stored format and 1 + w are exact: in bfloat16 gains would tie that
    differ in the model.

    Raises:
        Unsupported: for a norm without parameters.
        BadCheckpoint: for a gain that is not finite.
    """
    anatomy.require_selection("weight")
    name = anatomy.at(layer).gain
    stored = checkpoint.read(name)
    if not dtypes.all_finite(stored):
        raise BadCheckpoint(f"{name} holds values that are not finite; the checkpoint is damaged.")
    return stored.astype(np.float64) - anatomy.null_gain


def is_editable(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is stored in a floating-point format that can be edited."""
    return dtypes.is_float(checkpoint.tensors[name].dtype)
