"""Where things lie in a loaded model: its decoder layers, their attention, norms and FFN.

By the anatomy of its checkpoint where that is known, else by the table of families and the
model's own modules. Everything that needs such a place asks here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.errors import Unsupported
from surgery.models.anatomy import Anatomy, depth_of
from surgery.models.families import Family, family_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a loaded model.

    Attributes:
        module: the module that owns the decoder layers; all but the language-model head.
        layers: the decoder layers, in order.
        attention: layer index to attention module, for the layers that have one.
    """

    module: torch.nn.Module
    layers: list[torch.nn.Module]
    attention: dict[int, torch.nn.Module]


def decoder_of(model: Any, anatomy: Anatomy | None = None) -> Decoder:
    """The decoder of a transformers model.

    Args:
        model: as it is, not wrapped.
        anatomy: of its checkpoint; without one the table of families says what is attention.

    Raises:
        Unsupported: without an anatomy, where the table does not know the family or refuses it.
    """
    if anatomy is not None:
        inputs = [found for found in anatomy.inputs if found is not None]
        return Decoder(
            backbone(model, anatomy),
            decoder_layers(model, anatomy),
            {found.layer: model.get_submodule(found.attention) for found in inputs},
        )
    config = model.config.get_text_config().to_dict()
    family = _known_family(config)
    path, layers = find_layers(
        model, depth_of(config), lambda layer: _attention_in(layer, family) is not None
    )
    attention = {index: _attention_in(layer, family) for index, layer in enumerate(layers)}
    return Decoder(
        model.get_submodule(path.rpartition(".")[0]),
        layers,
        {index: module for index, module in attention.items() if module is not None},
    )


def _known_family(config: Mapping[str, Any]) -> Family:
    family = family_of(config)
    if family is None or family.refusal:
        reason = family.refusal if family is not None else "the table of families lacks it"
        raise Unsupported(f"{config['model_type']} cannot be masked: {reason}.")
    return family


def _attention_in(layer: torch.nn.Module, family: Family) -> torch.nn.Module | None:
    """The attention module of a layer, by the family's row; None where the layer has none."""
    for mixer in family.all_mixers:
        try:
            return layer.get_submodule(mixer.attention)
        except AttributeError:
            continue
    return None


def find_layers(
    model: Any, depth: int, attends: Callable[[torch.nn.Module], bool]
) -> tuple[str, list[torch.nn.Module]]:
    """The module path of the text decoder's layers, and these: the list beside the embedding.

    Where the token embedding lies elsewhere, the one list of the right length with attention in
    it. Encoders of images or sound have lists of layers too, which only their place tells apart.

    Args:
        model: a transformers model.
        depth: number of decoder layers that its configuration describes.
        attends: whether a module has attention in it.

    Raises:
        Unsupported: where there is not exactly one such list.
    """
    embedding = model.get_input_embeddings()
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) != depth:
            continue
        if any(attends(layer) for layer in module):
            owner = model.get_submodule(name.rpartition(".")[0])
            beside = any(child is embedding for child in owner.children())
            found.append((beside, name, list(module)))
    chosen = [one for one in found if one[0]] or found
    if len(chosen) != 1:
        raise Unsupported(
            f"{type(model).__name__} has {len(chosen)} lists of {depth} decoder layers "
            "with attention, expected one."
        )
    logger.debug("%s has its decoder layers at %s", type(model).__name__, chosen[0][1])
    return chosen[0][1:]


def backbone(model: Any, anatomy: Anatomy) -> torch.nn.Module:
    """The module that owns the decoder layers: everything but the language-model head."""
    return model.get_submodule(anatomy.layers_path.rpartition(".")[0])


def decoder_layers(model: Any, anatomy: Anatomy) -> list[torch.nn.Module]:
    """The decoder layers, in order."""
    return list(model.get_submodule(anatomy.layers_path))


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def attention_names(layer: torch.nn.Module) -> list[str]:
    """Which children of a layer are attention, by their own name or their class's."""
    return [
        name
        for name, child in layer.named_children()
        if ("attn" in name or "attention" in f"{name} {type(child).__name__}".lower())
        and not is_norm(child)
    ]


def feed_forward_names(model: Any, anatomy: Anatomy) -> list[str | None]:
    """Which child of each decoder layer is its FFN: the one with matrices that is nothing else.

    Returns:
        Per layer, the child's name; None where there is no such child, or several.
    """
    found = []
    for index, layer in enumerate(decoder_layers(model, anatomy)):
        known = anatomy.inputs[index]
        path = f"{anatomy.layers_path}.{index}."
        attention = known.attention[len(path) :].partition(".")[0] if known is not None else ""
        names = [
            name
            for name, child in layer.named_children()
            if name != attention
            and not is_norm(child)
            and not any(word in name for word in ("attn", "attention", "mixer", "mamba"))
            and any(parameter.dim() >= 2 for parameter in child.parameters())
        ]
        found.append(names[0] if len(names) == 1 else None)
    return found
