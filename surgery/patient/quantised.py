"""Quantised Hugging Face checkpoints: what their packed weights stand for, in float32.

Norm gains are not quantised, so the norm fold edits the checkpoint as it is; only the analysis
needs the weights, and for that they are dequantised once, into safetensors that any transformers
loads.
Each format is a pure function from its stored tensors to a weight [out, in].
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files import dtypes
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.digests import file_sha256
from surgery.files.foreign import block, whole, words
from surgery.files.safetensors_file import write_safetensors
from surgery.files.text import write_text
from surgery.files.weights import INDEX, SINGLE, method_of, quantisation
from surgery.patient.cache import kept
from surgery.patient.schemes import BLOCK, groups_of, scheme_of, spread

# Part of the name under which a dequantised copy is kept: raised when the functions change.
_READER = 3
_INTEGERS = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "U32": np.uint32, "I64": np.int64}
# Where AWQ's packing puts the columns of each group of eight.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_NF4 = "weight.quant_state.bitsandbytes__"

_log = logging.getLogger(__name__)

Array = NDArray[Any]
Parts = Mapping[str, Array]
Weight = NDArray[np.float32]


# --------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------


def unpack_rows(packed: Array, bits: int) -> NDArray[np.int32]:
    """Unsigned integers packed into int32 along the first axis, lowest bits first."""
    return unpack_columns(packed.T, bits).T


def unpack_columns(packed: Array, bits: int) -> NDArray[np.int32]:
    """The same, along the last axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    wide = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return wide.reshape(*packed.shape[:-1], -1).astype(np.int32)


def gptq(parts: Parts, settings: Mapping[str, Any]) -> Weight:
    """scales[g] (q − z), rows of the packed matrices running over the input.

    In the first format one was taken from every zero point after packing, with a borrow from the
    next one where it was 0 already.
    """
    bits = int(settings["bits"])
    quantised = unpack_rows(np.ascontiguousarray(parts["qweight"]), bits)
    packed = np.ascontiguousarray(parts["qzeros"]).view(np.uint32)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        packed = packed + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    zeros = unpack_columns(packed, bits)
    scales = parts["scales"].astype(np.float32)
    index = parts.get("g_idx")
    if index is None:
        index = groups_of(len(quantised), len(scales), int(settings["group_size"]))
    groups = index
    return (scales[groups] * (quantised - zeros[groups, : scales.shape[1]])).T.astype(np.float32)


def awq(parts: Parts, settings: Mapping[str, Any]) -> Weight:
    """scales (q − z), with the columns of each group of eight in AWQ's own order."""
    bits = int(settings.get("bits", 4))

    def unpacked(packed: Array) -> NDArray[np.int32]:
        columns = unpack_columns(np.ascontiguousarray(packed), bits)
        return columns.reshape(len(columns), -1, 8)[..., list(_AWQ_ORDER)].reshape(columns.shape)

    quantised, zeros = unpacked(parts["qweight"]), unpacked(parts["qzeros"])
    rows = len(quantised)
    size = settings.get("group_size", settings.get("q_group_size"))
    groups = groups_of(rows, len(zeros), int(size) if size is not None else rows // len(zeros))
    scales = parts["scales"].astype(np.float32)
    return (scales[groups] * (quantised - zeros[groups])).T.astype(np.float32)


def scaled(parts: Parts, settings: Mapping[str, Any]) -> Weight:
    """A weight in float8 or int8 times a scale per tensor, row, group of columns, or block."""
    weight = parts["weight"].astype(np.float32)
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    assert scale is not None
    if scale.dtype == np.uint8:  # exponents alone, stored as bytes (E8M0)
        scale = np.exp2(scale.astype(np.float32) - 127)
    block = settings.get(BLOCK)
    order = parts.get("weight_g_idx")

    def each(values: Array) -> Array:
        if order is not None and (order >= 0).all() and values.ndim == 2:
            return values.astype(np.float32)[:, order]
        return spread(values.astype(np.float32), weight.shape, block)

    if "weight_zero_point" in parts:
        weight = weight - each(parts["weight_zero_point"])
    return weight * each(scale)


def packed_groups(parts: Parts, settings: Mapping[str, Any]) -> Weight:
    """compressed-tensors' pack-quantized: integers offset to be unsigned, packed along a row."""
    rows, columns = (int(size) for size in parts["weight_shape"])
    packed = np.ascontiguousarray(parts["weight_packed"])
    bits = int(settings["bits"])
    quantised = unpack_columns(packed, bits)[:, :columns] - 2 ** (bits - 1)
    scale = parts["weight_scale"].astype(np.float32)
    _, size = settings.get(BLOCK) or (1, columns // scale.shape[1])
    groups = groups_of(columns, scale.shape[1], size)
    if "weight_g_idx" in parts and (parts["weight_g_idx"] >= 0).all():
        groups = parts["weight_g_idx"]
    zeros: Array = np.zeros_like(scale)
    if "weight_zero_point" in parts:
        zeros = parts["weight_zero_point"]
        if zeros.shape != scale.shape:
            zeros = unpack_rows(np.ascontiguousarray(zeros), bits)[:rows] - 2 ** (bits - 1)
    return (scale[:, groups] * (quantised - zeros[:, groups])).astype(np.float32)


def four_bit(parts: Parts, _settings: Mapping[str, Any]) -> Weight:
    """bitsandbytes' nf4 and fp4: a code book, and a scale per block, itself quantised or not."""
    state_name = next(name for name in parts if name.startswith(_NF4))
    state = json.loads(parts[state_name].astype(np.uint8).tobytes())
    packed = parts["weight"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    absmax = parts["weight.absmax"].astype(np.float32)
    if "weight.nested_absmax" in parts:
        nested = np.repeat(parts["weight.nested_absmax"], int(state["nested_blocksize"]))
        code = parts["weight.nested_quant_map"][parts["weight.absmax"]]
        absmax = code * nested[: len(code)] + np.float32(state["nested_offset"])
    values = parts["weight.quant_map"].astype(np.float32)[codes]
    values = values * np.repeat(absmax, int(state["blocksize"]))[: len(values)]
    shape = [int(size) for size in state["shape"]]
    return values[: int(np.prod(shape))].reshape(shape).astype(np.float32)


def eight_bit(parts: Parts, _settings: Mapping[str, Any]) -> Weight:
    """bitsandbytes' int8: a scale per row, for the largest of its values."""
    scale: Weight = parts["SCB"].astype(np.float32)[:, None] / np.float32(127)
    return parts["weight"].astype(np.float32) * scale


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    Attributes:
        told_by: Tensors whose presence tells it, by their names below the module's.
        further: Tensors that may be there besides.
        dequantise: The weight [out, in], from these tensors and the method's settings.
    """

    told_by: tuple[str, ...]
    further: tuple[str, ...]
    dequantise: Callable[[Parts, Mapping[str, Any]], Weight]


_PACKED_INPUTS = ("qzeros", "scales", "g_idx")
_BNB = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
FORMATS: dict[str, tuple[Format, ...]] = {
    "gptq": (Format(("qweight", "qzeros", "scales"), ("g_idx",), gptq),),
    "awq": (Format(("qweight", "qzeros", "scales"), (), awq),),
    "fp8": (
        Format(("weight", "weight_scale_inv"), ("activation_scale",), scaled),
        Format(("weight", "weight_scale"), ("input_scale",), scaled),
    ),
    "fbgemm_fp8": (Format(("weight", "weight_scale"), ("input_scale_ub",), scaled),),
    "compressed-tensors": (
        Format(
            ("weight_packed", "weight_scale", "weight_shape"),
            ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point"),
            packed_groups,
        ),
        Format(
            ("weight", "weight_scale"),
            ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point"),
            scaled,
        ),
    ),
    "bitsandbytes": (
        Format(
            ("weight", "weight.absmax", "weight.quant_map"),
            (*_BNB[2:], f"{_NF4}nf4", f"{_NF4}fp4"),
            four_bit,
        ),
        Format(("weight", "SCB"), ("weight_format",), eight_bit),
    ),
}


# --------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------


def refusal(method: str) -> str:
    """Why a method cannot be analysed, and what is possible all the same."""
    return (
        f"Checkpoints quantised with {method} can be neither run nor dequantised here: give "
        "--fold norm, --layer (the ME Layer, from the unquantised model) and --no-check, or "
        "convert the unquantised checkpoint."
    )


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a format needs to know besides its tensors; Unsupported for what is not read here."""
    found = quantisation(checkpoint.config) or {}
    method = method_of(checkpoint.config)
    if method not in FORMATS:
        raise Unsupported(refusal(method))
    if method == "compressed-tensors":
        groups = block(found, "config_groups")
        parts = [block(groups, name) for name in groups]
        bits = {whole(block(part, "weights"), "num_bits", default=0) for part in parts}
        layout = words(found, "format")
        if layout == "pack-quantized" and (not bits or bits - {4, 8}):
            many = ", ".join(str(number) for number in sorted(bits)) or "no"
            raise Unsupported(refusal(f"compressed-tensors in {many} bits"))
        forms = [layout, *(words(part, "format") for part in parts)]
        strange = [form for form in forms if form.startswith(("nvfp", "mx"))]
        if found.get("sparsity_config") or strange:
            raise Unsupported(refusal(f"compressed-tensors ({(strange or forms)[0]})"))
    if method in ("gptq", "awq"):
        bits_here = whole(found, "bits", "w_bit", default=4)
        layout = words(found, "version", "gemm").lower()
        known = (2, 4, 8) if method == "gptq" else (4,)
        if bits_here not in known or (method == "awq" and layout != "gemm"):
            raise Unsupported(refusal(f"{method} ({layout}, {bits_here} bits)"))
        if method == "gptq":
            words(found, "checkpoint_format")
            # What transformers takes where nothing is said.
            group = whole(found, "group_size", default=128, least=-1)
            return {**found, "bits": bits_here, "group_size": group}
        # With the number of bits that was checked, whichever name it had.
        return {**found, "bits": bits_here}
    return found


def _plan(checkpoint: Checkpoint) -> dict[str, tuple[Format | None, dict[str, str]]]:
    """By name of a plain tensor: how it is made, and the stored tensors it is made from."""
    formats = FORMATS[method_of(checkpoint.config)]
    plan: dict[str, tuple[Format | None, dict[str, str]]] = {}
    used: set[str] = set()
    for name in checkpoint.tensors:
        for one in formats:
            module = name.removesuffix("." + one.told_by[0])
            parts = {part: f"{module}.{part}" for part in (*one.told_by, *one.further)}
            parts = {part: full for part, full in parts.items() if full in checkpoint.tensors}
            if module != name and all(part in parts for part in one.told_by):
                plan[f"{module}.weight"] = (one, parts)
                used |= set(parts.values())
                break
    if not used:
        raise BadCheckpoint(
            f"config.json says that the weights are quantised ({method_of(checkpoint.config)}), "
            "but none is stored that way."
        )
    for name in checkpoint.tensors:
        if name not in used:
            plan[name] = (None, {"": name})
    return plan


def _array(checkpoint: Checkpoint, name: str) -> Array:
    entry = checkpoint.tensors[name]
    if dtypes.is_float(entry.dtype):
        return checkpoint.read(name)
    if entry.dtype == "F8_E8M0":
        raw = np.frombuffer(checkpoint.read_bytes(name), ml_dtypes.float8_e8m0fnu)
        return raw.reshape(entry.shape)
    if entry.dtype not in _INTEGERS:
        raise Unsupported(f"{name} is stored as {entry.dtype}, which is not read here.")
    return np.frombuffer(checkpoint.read_bytes(name), _INTEGERS[entry.dtype]).reshape(entry.shape)


def write_dequantised(checkpoint: Checkpoint, folder: Path) -> None:
    """Write plain safetensors, one tensor in memory at a time, beside the base's side files."""
    found, plan = _settings(checkpoint), _plan(checkpoint)
    method = method_of(checkpoint.config)
    _require_scaled(checkpoint, plan)

    def scheme(name: str) -> Mapping[str, Any]:
        return scheme_of(found, method, name.removesuffix(".weight"))

    def shape_of(
        name: str, one: Format | None, parts: dict[str, str]
    ) -> tuple[str, tuple[int, ...]]:
        if one is None:
            entry = checkpoint.tensors[parts[""]]
            return entry.dtype, entry.shape
        return "F32", _shape(checkpoint, one, parts, scheme(name))

    def read(name: str) -> bytes:
        one, parts = plan[name]
        if one is None:
            return checkpoint.read_bytes(parts[""])
        arrays = {part: _array(checkpoint, full) for part, full in parts.items()}
        try:
            weight = one.dequantise(arrays, scheme(name))
        except (ValueError, IndexError, KeyError, StopIteration) as error:
            raise BadCheckpoint(f"{name} cannot be dequantised: {error}.") from error
        return np.ascontiguousarray(weight, dtype="<f4").tobytes()

    shapes = {name: shape_of(name, *made) for name, made in plan.items()}
    try:
        write_safetensors(folder / SINGLE, shapes, read, {"format": "pt"})
    except ValueError as error:
        raise BadCheckpoint(f"The checkpoint cannot be dequantised: {error}.") from error
    for name in checkpoint.side_files:
        if name not in ("config.json", INDEX):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)
    config = dict(checkpoint.config)
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    _log.debug(
        "%s: %d tensors dequantised", folder, sum(one is not None for one, _ in plan.values())
    )


def _require_scaled(
    checkpoint: Checkpoint, plan: Mapping[str, tuple[Format | None, dict[str, str]]]
) -> None:
    """Raise Unsupported for weights that would come out as they are packed, without their scale."""
    for name, (one, parts) in plan.items():
        if one is None:
            beside = [f"{name}_scale_inv", f"{name}_scale"]
            packed = any(scale in checkpoint.tensors for scale in beside)
        else:
            # Two numbers of four bits in each byte.
            packed = one.dequantise is scaled and (
                method_of(checkpoint.config) == "fp8"
                and checkpoint.tensors[parts["weight"]].dtype in _INTEGERS
            )
        if packed:
            raise Unsupported(refusal(f"{method_of(checkpoint.config)} (in the form of {name})"))


def _shape(
    checkpoint: Checkpoint, one: Format, parts: dict[str, str], settings: Mapping[str, Any]
) -> tuple[int, ...]:
    """Shape of a dequantised weight, [out, in]."""
    first = checkpoint.tensors[parts[one.told_by[0]]].shape
    if one.dequantise is gptq:
        return first[1], first[0] * 32 // int(settings["bits"])
    if one.dequantise is awq:
        return first[1] * 8, first[0]
    if one.dequantise is packed_groups:
        rows, columns = _array(checkpoint, parts["weight_shape"])
        return int(rows), int(columns)
    if one.dequantise is four_bit:
        name = next(full for part, full in parts.items() if part.startswith(_NF4))
        state = json.loads(_array(checkpoint, name).tobytes())
        return tuple(int(size) for size in state["shape"])
    return first


def dequantised(checkpoint: Checkpoint, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint to analyse: the plain one itself, or a dequantised copy, made once and kept.

    Args:
        checkpoint: As stored.
        say: Told what takes time.

    Raises:
        Unsupported: Its method is not read here.
    """
    method = method_of(checkpoint.config)
    if not method:
        return checkpoint
    _settings(checkpoint)
    # All that is carried into the copy: a mended tokenizer is another copy.
    names = sorted({*checkpoint.weight_files, *checkpoint.side_files, "config.json"})
    lines = [f"{file_sha256(checkpoint.folder / name)} {name}\n" for name in names]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    folder = kept(
        f"dequantised-{_READER}-{digest[:32]}",
        lambda target: write_dequantised(checkpoint, target),
        lambda target: say(f"Dequantising {checkpoint.origin.name} ({method}; kept in {target})"),
    )
    plain = open_checkpoint(folder, checkpoint.origin)
    return replace(plain, made_from=checkpoint.sources)


@contextmanager
def loadable(folder: Path) -> Iterator[Path]:
    """A written checkpoint as any transformers loads it: itself, or dequantised for a while."""
    written = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    if not method_of(written.config):
        yield folder
        return
    with TemporaryDirectory(prefix="surgery-") as temporary:
        write_dequantised(written, Path(temporary))
        yield Path(temporary)


def require_editable(
    checkpoint: Checkpoint, *, linear: bool, low_rank: bool, strength: float
) -> None:
    """Raise Unsupported for edits that a quantised checkpoint cannot hold truthfully.

    Args:
        checkpoint: as it is stored.
        linear: whether linears are edited, and not norms alone.
        low_rank: whether by a low-rank term.
        strength: γ.
    """
    method = method_of(checkpoint.config)
    if not method or not linear:
        return
    if low_rank:
        raise Unsupported(
            f"The weights are quantised ({method}), and would round a rank-one term away: use "
            "--fold sink --as adapter, or --fold norm."
        )
    formats = {checkpoint.tensors[n].dtype for n in checkpoint.tensors if n.endswith(".weight")}
    if method not in ("fp8", "fbgemm_fp8", "compressed-tensors") or "F8_E4M3" not in formats:
        raise Unsupported(
            f"Columns of {method} weights cannot be set to zero in place: use --fold norm, which "
            "is the same function, or --fold sink --as adapter."
        )
    if strength not in (0.0, 1.0):
        raise Unsupported(
            "Columns of 8-bit weights can be set to zero but not scaled exactly: use --strength 1."
        )
