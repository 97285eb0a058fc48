"""How a checkpoint spells the tensors that a model loads from it.

Names mostly agree. Checkpoints saved from a bare decoder lack the first component ("h.0…" for
GPT-2's "transformer.h.0…"), multimodal ones put the text decoder under "language_model", and some
releases of transformers rename modules. Only whole names are ever compared: a checkpoint may hold
further layers that no modelling code reads, and these must stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Where checkpoints keep the decoder layers of a text model that lies inside another model.
_TEXT_LAYERS = (
    "model.layers",
    "language_model.model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "backbone.layers",
)


def layers_prefix(checkpoint: Checkpoint, layers: str, probe: str) -> str:
    """How the checkpoint spells the path of the decoder layers, from its headers alone.

    Args:
        checkpoint: whose headers are looked at.
        layers: the module path.
        probe: a tensor that layer 0 must have, relative to the layer.

    Raises:
        BadCheckpoint: where the tensor is missing or two places would do.
    """
    candidates = [layers, layers.split(".", 1)[-1]]
    if layers.endswith(".layers"):
        candidates += _TEXT_LAYERS
    found = [
        prefix
        for prefix in dict.fromkeys(candidates)
        if f"{prefix}.0.{probe}" in checkpoint.tensors
    ]
    if not found:
        raise BadCheckpoint(
            f"The checkpoint has no tensor {layers}.0.{probe}, which a "
            f"{checkpoint.model_type} model must have."
        )
    if len(found) > 1:
        raise BadCheckpoint(
            f"The checkpoint holds decoder layers both at {found[0]} and at {found[1]}; which of "
            "them the model reads cannot be told."
        )
    return found[0]


class StoredNames:
    """The checkpoint's names by the model's, as transformers itself maps them when it loads."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self._model_type = checkpoint.model_type
        renamed = _renamed(checkpoint, model)
        self._made_from: dict[str, list[str]] = {}
        for stored, (name, _) in renamed.items():
            self._made_from.setdefault(name, []).append(stored)
        self._converted = {name for name, converted in renamed.values() if converted}
        logger.debug("%d stored tensors make %d parameters", len(renamed), len(self._made_from))

    def __contains__(self, name: str) -> bool:
        return name in self._made_from

    def of(self, name: str) -> str:
        """The stored tensor that becomes this parameter, as it is and it alone.

        Raises:
            BadCheckpoint: where there is none.
            Unsupported: where the parameter is computed from others.
        """
        stored = self.sources(name)
        if len(stored) > 1 or name in self._converted:
            raise Unsupported(
                f"{self._model_type} cannot be converted: transformers computes {name} from "
                f"{' and '.join(stored[:2])} instead of loading it as it is stored."
            )
        return stored[0]

    def sources(self, name: str) -> list[str]:
        """The stored tensors that this parameter is made from, at least one.

        Raises:
            BadCheckpoint: where there is none.
        """
        if name not in self._made_from:
            raise BadCheckpoint(f"The checkpoint lacks {name}, which config.json implies.")
        return self._made_from[name]


def _renamed(checkpoint: Checkpoint, model: Any) -> Mapping[str, tuple[str, bool]]:
    """Per stored name: the parameter it becomes, and whether its values change on the way."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return _renamed_by_4(checkpoint, model)
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    table = {}
    for stored in checkpoint.tensors:
        name, converter = rename_source_key(
            stored, renamings, converters, model.base_model_prefix, expected
        )
        if name not in expected and stored in expected:  # transformers too keeps such a name
            name, converter = stored, None
        table[stored] = (name, converter is not None)
    return table


def _renamed_by_4(checkpoint: Checkpoint, model: Any) -> Mapping[str, tuple[str, bool]]:
    """The same for transformers 4, which only ever renames."""
    keys, prefix = list(checkpoint.tensors), model.base_model_prefix
    has_prefix = bool(prefix) and any(key.startswith(prefix) for key in keys)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    table = model._get_key_renaming_mapping(
        keys,
        model._checkpoint_conversion_mapping or None,
        has_prefix and not expects_prefix,
        expects_prefix and not has_prefix,
    )
    return {stored: (name, False) for stored, name in table.items()}
