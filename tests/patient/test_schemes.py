"""What a configuration states of scales, against loops by hand and the libraries' own functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import BadCheckpoint, SurgeryError, Unsupported
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.patient.quantised import dequantised

MODULE = "model.layers.0.self_attn.k_proj"
Tensors = dict[str, torch.Tensor]


def read(folder: Path, tensors: Tensors, settings: Mapping[str, Any]) -> Tensors:
    """The dequantised tensors of a checkpoint that holds these and nothing else."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    stored = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    return load_file(dequantised(stored, lambda _message: None).folder / "model.safetensors")


def float8(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    """Far apart from each other, so that a weight that takes another's is seen."""
    return (
        torch.rand(shape, generator=torch.Generator().manual_seed(1))
        + torch.arange(1, shape[0] + 1)[:, None]
    )


def by_hand(stored: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    meant = stored.float()
    for i in range(stored.shape[0]):
        for begin in range(0, stored.shape[1], columns):
            meant[i, begin : begin + columns] *= scale[i // rows, begin // columns]
    return meant


SIZES = [
    (192, 576, 128),
    (448, 256, 128),
    (960, 320, 128),
    (1984, 64, 128),
    (192, 192, 96),
    (200, 72, 64),
]


@pytest.mark.parametrize(("rows", "columns", "block"), SIZES)
def test_blocks_are_the_configuration_s(
    tmp_path: Path, rows: int, columns: int, block: int
) -> None:
    """The last block may be cut short, whatever would divide the weight evenly."""
    stored, scale = float8(rows, columns), scales(-(-rows // block), -(-columns // block))
    expected = by_hand(stored, scale, block, block)
    parts = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale_inv": scale}
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    found = read(tmp_path / "fp8", parts, settings)[f"{MODULE}.weight"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    theirs = getattr(integration, "_dequantize_fp8_weight", None)  # of 5.23 and later
    if theirs is not None:
        other = theirs(stored, scale, [block, block], torch.float32)
        torch.testing.assert_close(found, other, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "columns", "block"), SIZES)
def test_blocks_of_compressed_tensors(tmp_path: Path, rows: int, columns: int, block: int) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored, scale = float8(rows, columns), scales(-(-rows // block), -(-columns // block))
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "block",
        "block_structure": [block, block],
    }  # fmt: skip
    theirs = dequantize(stored, scale, args=quantization.QuantizationArgs(**weights))
    parts = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale": scale}
    for number, structure in enumerate(([block, block], f"{block}x{block}")):
        groups = {
            "g": {"targets": ["Linear"], "weights": {**weights, "block_structure": structure}}
        }
        settings = {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": groups,
        }  # fmt: skip
        found = read(tmp_path / str(number), parts, settings)[f"{MODULE}.weight"]
        torch.testing.assert_close(found, theirs, rtol=0, atol=0)


def test_blocks_that_nobody_stated(tmp_path: Path) -> None:
    """As transformers takes them: 128 where its own method does not say, else equal ones."""
    stored, scale = float8(192, 128), scales(2, 1)
    parts = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale_inv": scale}
    found = read(tmp_path / "usual", parts, {"quant_method": "fp8"})[f"{MODULE}.weight"]
    torch.testing.assert_close(found, by_hand(stored, scale, 128, 128), rtol=0, atol=0)
    finer = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale_inv": scales(192, 4)}
    found = read(tmp_path / "experts", finer, {"quant_method": "fp8"})[f"{MODULE}.weight"]
    torch.testing.assert_close(found, by_hand(stored, scales(192, 4), 1, 32), rtol=0, atol=0)
    wrong = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale_inv": scales(5, 1)}
    with pytest.raises(
        BadCheckpoint, match=r"5 scales for 192 rows, and config\.json says blocks of 128"
    ):
        read(tmp_path / "wrong", wrong, {"quant_method": "fp8"})
    for block in ("128", [128], [0, 128], {"rows": 1}):
        settings = {"quant_method": "fp8", "weight_block_size": block}
        with pytest.raises(BadCheckpoint, match="weight_block_size"):
            read(tmp_path / "damaged", parts, settings)


def test_scales_that_are_exponents(tmp_path: Path) -> None:
    """E8M0, stored as such or as bytes: 127 is one."""
    stored = float8(256, 128)
    exponents = torch.tensor([[120], [130]], dtype=torch.uint8)
    expected = by_hand(stored, torch.tensor([[2.0**-7], [2.0**3]]), 128, 128)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for number, scale in enumerate((exponents, exponents.view(torch.float8_e8m0fnu))):
        parts = {f"{MODULE}.weight": stored, f"{MODULE}.weight_scale_inv": scale}
        found = read(tmp_path / str(number), parts, settings)[f"{MODULE}.weight"]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_would_come_out_without_its_scale_is_refused(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    plain = {f"{MODULE}.weight": float8(128, 128), f"{MODULE}.weight_scale_inv": scales(1, 1)}
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    for number, parts in enumerate((
        {**plain, fused: float8(2, 128, 128), f"{fused}_scale_inv": torch.ones(2, 1, 1)},
        {f"{MODULE}.weight": torch.ones(128, 64, dtype=torch.int8),
         f"{MODULE}.weight_scale_inv": scales(128, 4)},
    )):  # fmt: skip
        with pytest.raises(Unsupported, match="neither run nor dequantised"):
            read(tmp_path / str(number), parts, settings)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers from -2^(bits-1) on, in int32 along a row, lowest bits first."""
    wide = (values + 2 ** (bits - 1)).long().reshape(len(values), -1, 32 // bits)
    packed = (wide << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def test_every_module_has_its_own_scheme(tmp_path: Path) -> None:
    """Names before patterns before classes, as compressed-tensors matches them; 4 and 8 bits."""
    generator = torch.Generator().manual_seed(2)
    attention, mlp, other = MODULE, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    tensors: Tensors = {}
    expected: Tensors = {}
    for module, bits, group in ((attention, 8, 32), (mlp, 4, 16), (other, 4, 64)):
        values = torch.randint(-8, 8, (6, 64), generator=generator)
        scale = torch.rand((6, 64 // group), generator=generator)
        tensors |= {
            f"{module}.weight_packed": pack(values, bits),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": torch.tensor([6, 64]),
        }
        expected[f"{module}.weight"] = values * scale.repeat_interleave(group, 1)

    def scheme(bits: int, size: int) -> dict[str, Any]:
        return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size}

    groups = {
        "class": {"targets": ["Linear"], "weights": scheme(4, 64)},
        "pattern": {"targets": ["re:.*self_attn.*"], "weights": scheme(8, 32)},
        "name": {"targets": [mlp], "weights": scheme(4, 16)},
    }
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups
    }  # fmt: skip
    found = read(tmp_path / "mixed", tensors, settings)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)
    groups["name"]["weights"] = scheme(4, 32)
    with pytest.raises(
        SurgeryError, match=r"4 scales for 64 inputs, and config\.json says 32 each"
    ):
        read(tmp_path / "contradicts", tensors, settings)
    del groups["class"]
    with pytest.raises(SurgeryError, match="does not say how"):
        read(tmp_path / "silent", tensors, settings)


def test_group_sizes_of_awq_and_gptq(tmp_path: Path) -> None:
    """A size that does not fit is refused, not replaced by one that would."""
    parts = {
        f"{MODULE}.qweight": torch.zeros((64, 1), dtype=torch.int32),
        f"{MODULE}.qzeros": torch.zeros((4, 1), dtype=torch.int32),
        f"{MODULE}.scales": torch.ones((4, 8), dtype=torch.float16),
    }
    awq = {"quant_method": "awq", "bits": 4, "group_size": 16}
    assert not read(tmp_path / "awq", parts, awq)[f"{MODULE}.weight"].any()
    with pytest.raises(
        SurgeryError, match=r"4 scales for 64 inputs, and config\.json says 32 each"
    ):
        read(tmp_path / "other", parts, {**awq, "group_size": 32})
    parts[f"{MODULE}.qweight"] = torch.zeros((8, 8), dtype=torch.int32)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    assert (read(tmp_path / "gptq", parts, gptq)[f"{MODULE}.weight"] == -1).all()
    with pytest.raises(SurgeryError, match=r"config\.json says 128 each"):
        read(tmp_path / "none", parts, {**gptq, "group_size": 128})


def test_what_gptqmodel_says_of_single_modules(tmp_path: Path) -> None:
    """Eight bits for one module, by a pattern that its name begins with."""
    parts = {
        f"{MODULE}.qweight": torch.full((16, 4), 0x03020100, dtype=torch.int32),
        f"{MODULE}.qzeros": torch.full((1, 1), 0x00000000, dtype=torch.int32),
        f"{MODULE}.scales": torch.ones((1, 4), dtype=torch.float16),
    }
    settings = {
        "quant_method": "gptq", "bits": 4, "group_size": 64,
        "dynamic": {"-:.*mlp.*": {}, r"+:.*\.self_attn\.": {"bits": 8}},
    }  # fmt: skip
    found = read(tmp_path / "made", parts, settings)[f"{MODULE}.weight"]
    assert torch.equal(found, (torch.arange(4.0) - 1).repeat(4, 16))


def test_a_mended_tokenizer_is_seen(tmp_path: Path) -> None:
    """The kept copy is made again where anything that is carried into it has changed."""
    parts = {f"{MODULE}.weight": float8(128, 128), f"{MODULE}.weight_scale_inv": scales(1, 1)}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = tmp_path / "made"
    folder.mkdir()
    side = folder / "tokenizer_config.json"
    for text in ('{"bos_token": "wrong"}', '{"bos_token": "right"}'):
        side.write_text(text)
        read(folder, parts, settings)
        stored = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
        copy = dequantised(stored, lambda _message: None).folder
        assert (copy / side.name).read_text() == text
    (folder / "added_tokens.json").write_text("{}")
    stored = open_checkpoint(folder, Origin("directory", folder.name, str(folder)))
    assert (dequantised(stored, lambda _message: None).folder / "added_tokens.json").is_file()
