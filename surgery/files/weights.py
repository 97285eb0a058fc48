"""Which files hold a model's weights: those that stock `from_pretrained` takes, and no others.

A folder may hold several sets of weights: an older sharded copy beside a new file, PyTorch's
pickles beside safetensors, an adapter. transformers looks for four names in a fixed order, and
takes the first that is there. Everything that reads, edits, downloads or copies weights asks
`choose`, with the names in a folder or those of a repository on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import BadCheckpoint
from surgery.files.foreign import words
from surgery.files.paths import is_plain_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PACKING = "quantize_config.json"
# The order in which transformers looks for them.
_ENTRIES = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)
_SHARD = re.compile(r"^(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)$")
# The ends of names of packed weights in the formats of transformers' quantisers.
_PACKED = (
    *(".qweight", ".qzeros", ".weight_packed", ".SCB"),
    *("bitsandbytes__nf4", "bitsandbytes__fp4"),
)

ReadJson = Callable[[str], Any]


@dataclass(frozen=True)
class Weights:
    """The files of a model's weights.

    Attributes:
        entry: the file that is looked for: one with all weights, or an index of several.
        files: those that hold the weights, sorted.
        weight_map: the file of each tensor, where there is an index.
        quantised: whether the configuration says that they are packed.
    """

    entry: str
    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    quantised: bool = False

    @property
    def pickled(self) -> bool:
        """Whether they are PyTorch's pickles, and not safetensors."""
        return self.entry in (PICKLE, PICKLE_INDEX)

    @property
    def index(self) -> str | None:
        """The index of safetensors, where there is one."""
        return None if self.weight_map is None or self.pickled else self.entry


def choose(
    names: Collection[str], read: ReadJson, where: str, config: Mapping[str, Any] | None = None
) -> Weights:
    """The weights that stock `from_pretrained` takes from files of these names.

    Args:
        names: of the files that are there, with "/" between folders.
        read: what gives the content of one of them that is JSON.
        where: the folder or repository, for messages.
        config: of the model, which may name the file (`transformers_weights`).

    Raises:
        BadCheckpoint: there are none, or not all of them.
    """
    config = config or {}
    entry = config.get("transformers_weights")
    if entry is not None:
        _require_safetensors(entry, where)
    else:
        entry = next((name for name in _ENTRIES if name in names), None)
    if entry is None or entry not in names:
        raise BadCheckpoint(_no_weights(names, read, where, entry))
    if not entry.endswith(".index.json"):
        return Weights(entry, (entry,), None, bool(method_of(config)))
    weight_map = _weight_map(read(entry), f"{where}/{entry}")
    files = tuple(sorted(set(weight_map.values())))
    missing = [name for name in files if name not in names]
    if missing:
        others = [f"{len(missing) - 1} more"] if len(missing) > 1 else []
        raise BadCheckpoint(
            f"{entry} in {where} names {' and '.join((missing[0], *others))}, which "
            f"{'are' if others else 'is'} not there; fetch the missing shards"
            f"{_instead(names, entry)}."
        )
    return Weights(entry, files, weight_map, bool(method_of(config)))


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation settings in a configuration; None for plain weights.

    Settings of bitsandbytes that ask for neither 4 nor 8 bits are switched off: transformers loads
    such weights as they are stored.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, Mapping):
        return None
    if found.get("quant_method") == "bitsandbytes" and not any(
        found.get(name) for name in ("load_in_4bit", "load_in_8bit")
    ):
        return None
    return found


def method_of(config: Mapping[str, Any]) -> str:
    """The name of the method, such as fp8 or gptq; empty for plain weights."""
    found = quantisation(config)
    return "" if found is None else words(found, "quant_method", "unknown method")


def require_described(
    tensors: Collection[str], config: Mapping[str, Any], names: Collection[str], where: str
) -> None:
    """Raise BadCheckpoint for packed weights that the configuration does not say are packed.

    transformers would look for plain weights, find none, and begin with random ones.

    Args:
        tensors: names of those that are stored.
        config: of the model.
        names: of the files beside the weights.
        where: the folder or repository, for messages.
    """
    if quantisation(config) is not None:
        return
    packed = next((name for name in tensors if name.endswith(_PACKED)), None)
    if packed is None:
        return
    advice = (
        f'copy the settings in {PACKING} there, with "quant_method": "gptq"'
        if PACKING in names and packed.endswith(".qweight")
        else "put the settings there that the weights were packed with"
    )
    raise BadCheckpoint(
        f"The weights in {where} are packed ({packed}), but config.json has no quantization_config "
        f"that says so, and transformers would not find them; {advice}."
    )


def _weight_map(index: Any, where: str) -> dict[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{where} has no weight_map.")
    for name in weight_map.values():
        if not isinstance(name, str) or not is_plain_name(name):
            raise BadCheckpoint(
                f"{where} names the file {name!r}, which is not a plain file name beside it."
            )
    return weight_map


def _require_safetensors(entry: Any, where: str) -> None:
    known = (".safetensors", ".safetensors.index.json")
    if isinstance(entry, str) and is_plain_name(entry) and entry.endswith(known):
        return
    raise BadCheckpoint(
        f"config.json in {where} names the weights {entry!r} (transformers_weights), which is no "
        ".safetensors file or index beside it; remove that key."
    )


def _instead(names: Collection[str], entry: str) -> str:
    """What deleting a broken index would make transformers take; empty where nothing is left."""
    after = _ENTRIES[_ENTRIES.index(entry) + 1 :] if entry in _ENTRIES else ()
    other = next((name for name in after if name in names), None)
    return f", or delete {entry} to use {other}" if other else ""


def _no_weights(names: Collection[str], read: ReadJson, where: str, entry: str | None) -> str:
    """Why there are no weights to take, and what can be done about it."""
    if entry is not None:
        return (
            f"config.json in {where} names the weights {entry} (transformers_weights), which are "
            "not there."
        )
    if ADAPTER_CONFIG in names:
        adapted = read(ADAPTER_CONFIG)
        base = adapted.get("base_model_name_or_path") if isinstance(adapted, Mapping) else None
        return (
            f"{where} is a PEFT adapter for {base or 'a model that it does not name'}, without the "
            "weights of that model; merge it into the model with PEFT's merge_and_unload, save "
            "that, and give the folder."
        )
    shard = next((found for name in sorted(names) if (found := _SHARD.match(name))), None)
    if shard is not None:
        index = f"{shard[1]}.{shard[2]}.index.json"
        return f"{where} has shards such as {shard[0]} but no {index}; fetch the index too."
    file = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if file is not None:
        return f"{where} holds no weights but .gguf files; give the file itself, such as {file}."
    endings = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
    others = [name for name in sorted(names) if name.endswith(endings)]
    holds = f"; what it holds ({others[0]}) transformers does not look for" if others else ""
    return (
        f"{where} holds no {SINGLE}, no {PICKLE} and no index of either{holds}. Give a folder or "
        "a Hub id that from_pretrained can load."
    )
