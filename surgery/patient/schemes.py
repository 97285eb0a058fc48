"""What a quantised checkpoint's configuration states of one module's weight.

Blocks and groups whose last one is cut short cannot be told from the shapes of weight and scale:
two rows of scales for 192 rows are blocks of 128 and 64 where the configuration says 128, and
blocks of 96 where it says 96.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint

# Of a module's settings: rows and columns that share a scale; 0 for all of them.
BLOCK = "block"
# What transformers takes where the configuration of its fp8 does not say.
_USUAL_BLOCK = (128, 128)


def scheme_of(found: Mapping[str, Any], method: str, module: str) -> Mapping[str, Any]:
    """A method's settings as they hold for one module.

    Args:
        found: the quantisation settings of the configuration.
        method: its name.
        module: path of the module, as stored.

    Returns:
        The settings; with "block", where the configuration says which weights share a scale.

    Raises:
        BadCheckpoint: The configuration contradicts itself, or does not say.
    """
    if method == "fp8":
        stated = found.get("weight_block_size", _USUAL_BLOCK)
        return {**found, BLOCK: None if stated is None else _block(stated, "weight_block_size")}
    if method == "compressed-tensors":
        return _compressed(found, module)
    if method == "gptq":
        return {**found, **_override(found.get("dynamic"), module)}
    return found


def _override(dynamic: Any, module: str) -> Mapping[str, Any]:
    """What GPTQModel's `dynamic` says of a module: the first pattern that its name begins with."""
    for pattern, settings in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if isinstance(settings, Mapping) and _matches(str(pattern).removeprefix("+:"), module):
            return settings
    return {}


def _compressed(found: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    weights = _weights_of(found, module)
    strategy = str(weights.get("strategy") or "").lower()
    size = weights.get("group_size")
    block: tuple[int, int] | None = None
    if weights.get("block_structure") is not None:
        block = _block(weights["block_structure"], "block_structure")
    elif size is not None and strategy in ("", "group"):
        if not isinstance(size, int) or size == 0:
            raise BadCheckpoint(f"config.json gives a group_size of {size!r} for {module}.")
        block = (1, max(size, 0))
    elif strategy == "channel":
        block = (1, 0)
    return {"bits": weights.get("num_bits", 8), BLOCK: block}


def _weights_of(found: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The scheme of a module's weight: by its name, else by a pattern, else by its class."""
    groups = list(weight_schemes(found))
    for how in (_by_name, _by_pattern, _by_class):
        for targets, weights in groups:
            if any(how(target, module) for target in targets):
                return weights
    if len(groups) == 1 or (groups and all(groups[0][1] == other for _, other in groups)):
        return groups[0][1]
    if not groups:
        return {}
    raise BadCheckpoint(f"config.json does not say how {module} is quantised.")


def weight_schemes(found: Mapping[str, Any]) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """The groups of a compressed-tensors configuration: targets, and the scheme of weights."""
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            targets = group.get("targets")
            named = targets if isinstance(targets, list) else []
            yield [str(target) for target in named], weights


def _by_name(target: str, module: str) -> bool:
    return target == module


def _by_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and _matches(target.removeprefix("re:"), module)


def _by_class(target: str, _module: str) -> bool:
    # Whatever is stored quantised is a linear: nothing else is read here.
    return target == "Linear"


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise BadCheckpoint(f"config.json has the pattern {pattern!r}: {error}.") from error


def _block(stated: Any, key: str) -> tuple[int, int]:
    """Rows and columns, of a list or, as once written, of "128x128"."""
    parts = stated.split("x") if isinstance(stated, str) else stated
    try:
        rows, columns = (int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"config.json gives {stated!r} as {key}, not two sizes.") from error
    if rows < 1 or columns < 1:
        raise BadCheckpoint(f"config.json gives {stated!r} as {key}, not two sizes.")
    return rows, columns


def spread(
    scale: NDArray[Any], shape: tuple[int, ...], block: tuple[int, int] | None
) -> NDArray[Any]:
    """A scale repeated to the shape of the weight, whose blocks share one each.

    Args:
        scale: one number, one for each row, or one for each block.
        shape: of the weight, [out, in].
        block: rows and columns of a block, 0 for all; None where the configuration does not say.
            The last one may be cut short.

    Raises:
        ValueError: There are not as many scales as blocks.
    """
    if scale.size == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale[:, None]
    if scale.ndim != 2 or len(shape) != 2:
        raise ValueError(f"scales {scale.shape} of a weight {shape}")
    for axis, words in enumerate(("rows", "columns")):
        count, size = scale.shape[axis], shape[axis]
        stated = (block[axis] or size) if block is not None else None
        if stated is not None and count == -(-size // stated):
            scale = np.repeat(scale, stated, axis).take(range(size), axis)
        elif count in (1, size):
            continue
        elif size % count == 0:
            # Other blocks than the configuration's, such as of experts beside dense linears:
            # transformers takes equal ones too.
            scale = np.repeat(scale, size // count, axis)
        else:
            said = f"blocks of {stated}" if stated is not None else "no size of a block"
            raise ValueError(f"{count} scales for {size} {words}, and config.json says {said}")
    return scale


def groups_of(columns: int, count: int, size: int) -> NDArray[np.int64]:
    """Which group of a row each of its columns is in, [columns].

    Args:
        columns: of the weight.
        count: how many groups have a scale.
        size: of a group, as the configuration says; 0 or less for the whole row.

    Raises:
        ValueError: There are not as many scales as groups.
    """
    size = size if size > 0 else columns
    if count != -(-columns // size):
        raise ValueError(f"{count} scales for {columns} inputs, and config.json says {size} each")
    return np.arange(columns) // size
