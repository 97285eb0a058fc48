"""Tiny checkpoints in the quantised formats that people have, packed as their documents say.

Packed here by formulas of this file, not by the code under test; what a library on this machine can
read is compared with that library too (`tests/patient/test_quantised.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
GROUP = 32


def quantise(source: Path, folder: Path, method: str) -> Tensors:
    """Copy a plain checkpoint with its projections quantised; returns what these stand for."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    pack, settings = METHODS[method]
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj.weight" in name:
            packed, meant[name] = pack(tensor.float())
            module = name.removesuffix("weight")
            stored |= {module + part: values.contiguous() for part, values in packed.items()}
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def _bits(columns: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Unsigned integers along the last axis as int32, lowest bits first."""
    per = 32 // bits
    wide = columns.long().reshape(*columns.shape[:-1], -1, per)
    shifts = torch.arange(0, 32, bits)
    packed = (wide << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _rows(rows: torch.Tensor) -> torch.Tensor:
    """The same, along the first axis."""
    return _bits(rows.T).T


def _affine(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four-bit integers, zero points and scales per group of inputs: [out, in], [out, groups]."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-4).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    q = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return q.reshape(weight.shape), zero, scale


def _meaning(q: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    each = zero.repeat_interleave(GROUP, 1), scale.repeat_interleave(GROUP, 1)
    return (q - each[0]) * each[1]


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    # Grouped in another order, as after act-order: the index says which group each input is of.
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    q, zero, scale = _affine(weight[:, order])
    index = back.div(GROUP, rounding_mode="floor")
    meaning = _meaning(q, zero, scale)[:, back]
    packed = {
        "qweight": _rows(q[:, back].T),
        "qzeros": _bits((zero.T - 1).contiguous()),
        "scales": scale.T.half(),
        "g_idx": index.int(),
    }
    return packed, meaning


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, zero, scale = _affine(weight)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(values: torch.Tensor) -> torch.Tensor:
        grouped = values.T.reshape(values.shape[1], -1, 8)[..., order]
        return _bits(grouped.reshape(values.shape[1], -1))

    return {"qweight": pack(q), "qzeros": pack(zero), "scales": scale.T.half()}, _meaning(
        q, zero, scale
    )


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    block = 32
    rows, columns = weight.shape
    tiles = weight.reshape(rows // block, block, columns // block, block)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-4) / 448
    stored = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meaning = (stored.float() * scale[:, None, :, None]).reshape(weight.shape)
    return {"weight": stored.reshape(weight.shape), "weight_scale_inv": scale}, meaning


def fp8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def packed_groups(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(-1).clamp(min=1e-4) / 7
    q = (groups / scale[..., None]).round().clamp(-8, 7).reshape(weight.shape)
    packed = {
        "weight_packed": _bits(q + 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return packed, _meaning(q, torch.zeros_like(scale), scale)


def int8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    absmax = weight.abs().amax(1).clamp(min=1e-4)
    stored = (weight / absmax[:, None] * 127).round().to(torch.int8)
    meaning = stored.float() * (absmax[:, None] / 127)
    return {"weight": stored, "SCB": absmax}, meaning


def four_bit(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """nf4 by bitsandbytes itself, with its scales quantised once more."""
    from bitsandbytes import functional

    made, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": made, **parts}, functional.dequantize_4bit(made, state)


def _compressed(form: str, bits: int, kind: str, strategy: str) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
        "group_size": GROUP if strategy == "group" else None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


Pack = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
METHODS: Mapping[str, tuple[Pack, dict[str, Any]]] = {
    "fp8": (
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    "compressed-tensors fp8": (
        fp8_rows,
        _compressed("float-quantized", 8, "float", "channel"),
    ),
    "compressed-tensors int4": (
        packed_groups,
        _compressed("pack-quantized", 4, "int", "group"),
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    ),
    "bitsandbytes 8": (int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes 4": (
        four_bit,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}
