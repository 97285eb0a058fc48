"""Quantised checkpoints: gains edited in place, all else untouched, analysed in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_by_packages import PACKAGES
from quantised_models import METHODS, quantise
from safetensors.torch import load_file

import surgery
from surgery.errors import Unsupported
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.patient.quantised import FORMATS, dequantised
from surgery.patient.quantised import gptq as read_gptq

QUICK = {"layer": 3, "check_tokens": 256, "calibration_tokens": 512, "force": True}
needs = {"bitsandbytes 4": "bitsandbytes"}
LINEAR = "model.layers.4.self_attn.q_proj"


@pytest.fixture(scope="module")
def quantised(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """`quantised(method)`: a tiny Llama in that format, and its weights. Not to be changed."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def make(method: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if method in needs and find_spec(needs[method]) is None:
            pytest.skip(f"{needs[method]} is not installed")
        if method not in made:
            folder = tmp_path_factory.mktemp("quantised") / method.replace(" ", "-")
            made[method] = folder, quantise(tiny("llama", intermediate_size=128), folder, method)
        return made[method]

    return make


def opened(folder: Path):
    return open_checkpoint(folder, Origin("directory", folder.name, str(folder)))


@pytest.mark.parametrize("method", METHODS)
def test_dequantised(quantised: Callable[..., Any], method: str) -> None:
    folder, meant = quantised(method)
    plain = dequantised(opened(folder), lambda _message: None)
    assert "quantization_config" not in plain.config
    tensors = load_file(plain.folder / "model.safetensors")
    assert set(tensors) == set(load_file(folder.parent / folder.name / "model.safetensors")) - {
        name for name in opened(folder).tensors if "_proj." in name
    } | set(meant)
    for name, weight in meant.items():
        scale = float(weight.abs().max())
        torch.testing.assert_close(tensors[name], weight.float(), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_norm_fold(quantised: Callable[..., Any], tmp_path: Path, method: str) -> None:
    """Checked against hooks on the dequantised base; one gain changes and nothing else."""
    folder, _ = quantised(method)
    made = surgery.convert(str(folder), output=tmp_path / "out", **QUICK)
    assert made.verification is not None
    assert any("bit-equal" in check.detail for check in made.verification.checks)
    base, output = opened(folder), opened(tmp_path / "out")
    changed = [n for n in base.tensors if base.read_bytes(n) != output.read_bytes(n)]
    assert changed == ["model.layers.4.input_layernorm.weight"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    surgery.revert(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_verify_and_locate(quantised: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = quantised("gptq")
    assert surgery.analyze(str(folder)).emergence.layer == 3
    surgery.convert(str(folder), output=tmp_path / "out", **QUICK)
    assert surgery.verify(tmp_path / "out").passed


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors fp8"])
def test_columns_where_zero_can_be_stored(
    quantised: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    """The scales stay, the columns are zero in float8, the logits those of the hooks."""
    folder, _ = quantised(method)
    made = surgery.convert(str(folder), output=tmp_path / "out", fold="qkv", **QUICK)
    assert made.verification is not None
    assert any("bit-equal" in check.detail for check in made.verification.checks)
    base = load_file(folder / "model.safetensors")
    output = load_file(tmp_path / "out" / "model.safetensors")
    changed = {
        n for n in base if not torch.equal(base[n].view(torch.uint8), output[n].view(torch.uint8))
    }
    assert changed == {f"model.layers.4.self_attn.{part}_proj.weight" for part in "qkv"}
    weight = output[f"{LINEAR}.weight"].float()
    assert int((weight == 0).all(0).sum()) == 6
    with pytest.raises(Unsupported, match="--strength 1"):
        surgery.convert(str(folder), output=tmp_path / "x", fold="qkv", strength=0.5, **QUICK)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq"])
def test_sink_fold_as_adapter(quantised: Callable[..., Any], tmp_path: Path, method: str) -> None:
    folder, meant = quantised(method)
    sink = {"fold": "sink", **QUICK}
    made = surgery.convert(str(folder), output=tmp_path / "out", form="adapter", **sink)
    (edit,) = [edit for edit in made.plan.edits if edit.tensor == f"{LINEAR}.weight"]
    b = load_file(tmp_path / "out" / "adapter_model.safetensors")[
        f"base_model.model.{LINEAR}.lora_B.weight"
    ]
    weight = meant[f"{LINEAR}.weight"].double().numpy()
    expected = -weight[:, list(edit.dimensions)] @ edit.sink.center.astype(np.float64)
    np.testing.assert_allclose(b[:, 0].numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(Unsupported, match="--as adapter"):
        surgery.convert(str(folder), output=tmp_path / "x", **sink)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors int4", "bitsandbytes 8"])
def test_columns_are_refused_elsewhere(
    quantised: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    folder, _ = quantised(method)
    with pytest.raises(Unsupported, match="--fold norm"):
        surgery.convert(str(folder), output=tmp_path / "x", fold="qkv", **QUICK)


def test_a_method_that_cannot_be_read(
    quantised: Callable[..., Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    """Its gains can be edited all the same, where the user names the layer and skips the checks."""
    folder, _ = quantised("gptq")
    strange = tmp_path / "strange"
    strange.mkdir()
    for path in folder.iterdir():
        (strange / path.name).write_bytes(path.read_bytes())
    config = json.loads((strange / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "squeezellm"
    (strange / "config.json").write_text(json.dumps(config))
    said = run("convert", strange, "-o", tmp_path / "x").sentence()
    assert "squeezellm" in said
    assert "--no-check" in said
    run("convert", strange, "-o", tmp_path / "out", "--layer", 3, "--no-check").ok()
    expected = surgery.convert(str(folder), output=tmp_path / "known", layer=3, check=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        expected.output / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("fp8", "accelerate"),
        ("compressed-tensors fp8", "compressed_tensors"),
        ("compressed-tensors int4", "compressed_tensors"),
        ("bitsandbytes 4", "bitsandbytes"),
    ],
)
def test_as_the_libraries_read_it(quantised: Callable[..., Any], method: str, package: str) -> None:
    """transformers with the format's own package, dequantising by its own code."""
    import transformers

    pytest.importorskip(package)
    folder, _ = quantised(method)
    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(
            dequantize=True, weight_block_size=(32, 32)
        )
    elif package == "compressed_tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    plain = dequantised(opened(folder), lambda _message: None)
    ours = transformers.AutoModelForCausalLM.from_pretrained(plain.folder, dtype=torch.float32)
    if method == "bitsandbytes 4":  # whose CPU kernels compute in lower precision
        from bitsandbytes import functional

        weight = theirs.get_submodule(LINEAR).weight
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
        expected = ours.get_submodule(LINEAR).weight.data
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)
        return
    ids = torch.tensor([[0, *range(5, 30)]])
    with torch.inference_mode():
        one, other = theirs(input_ids=ids).logits, ours.eval()(input_ids=ids).logits
    torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3 * float(other.abs().max()))


def test_zero_points_that_borrow() -> None:
    """GPTQ's first format takes one from the packed zero points: 0 borrows from the one above."""
    zeros = np.array([0, 5, 0, 0, 3, 15, 1, 8], dtype=np.uint64)
    packed = sum(int(zero) << (4 * at) for at, zero in enumerate(zeros))
    stored = np.array([[(packed - 0x11111111) % 2**32]], dtype=np.uint32).view(np.int32)
    parts = {
        "qweight": np.zeros((1, 8), dtype=np.int32),
        "qzeros": stored,
        "scales": np.ones((1, 8), dtype=np.float16),
    }
    weight = read_gptq(parts, {"bits": 4, "group_size": 8})
    np.testing.assert_array_equal(weight, -np.repeat(zeros.astype(np.float32)[:, None], 8, 1))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if package == "bitsandbytes" else pytest.mark.packages)
        for name, (package, _) in PACKAGES.items()
    ],
)
def test_what_packages_write(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Checkpoints by the packages themselves: read as they are meant, only the gain edited."""
    package = PACKAGES[name][0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    source = tiny("llama", hidden_size=128, intermediate_size=256, dtype=torch.bfloat16, **heads)
    folder = tmp_path / "made"
    script = Path(__file__).parents[1] / "quantised_by_packages.py"
    done = subprocess.run(
        [sys.executable, str(script), name, str(source), str(folder)],
        cwd=tmp_path,  # some of them write logs where they are
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    plain = load_file(
        dequantised(opened(folder), lambda _message: None).folder / "model.safetensors"
    )
    weights = {n: w for n, w in load_file(source / "model.safetensors").items() if "_proj." in n}
    if package != "gptqmodel":  # which moves weights on purpose; its kernels are asked below
        rounding = 0.05 if "8" in name else 0.3
        for tensor, weight in weights.items():
            distance = (plain[tensor] - weight.float()).norm() / weight.float().norm()
            assert 0 < distance < rounding, tensor
    compare_with_stock(folder, {tensor: plain[tensor] for tensor in weights})

    made = surgery.convert(str(folder), output=tmp_path / "out", **QUICK)
    assert any("bit-equal" in check.detail for check in made.verification.checks)
    base, output = opened(folder), opened(tmp_path / "out")
    changed = [n for n in base.tensors if base.read_bytes(n) != output.read_bytes(n)]
    assert changed == ["model.layers.4.input_layernorm.weight"]
    for side in set(before) - {"model.safetensors", "README.md"}:
        assert (tmp_path / "out" / side).read_bytes() == before[side], side
    sink = {"fold": "sink", "form": "adapter", **QUICK}
    assert surgery.convert(str(folder), output=tmp_path / "adapter", **sink).verification.passed
    columns = {"output": tmp_path / "columns", "fold": "qkv", **QUICK}
    if "float8" in name:
        assert surgery.convert(str(folder), **columns).verification.passed
    else:
        with pytest.raises(Unsupported, match="--fold norm"):
            surgery.convert(str(folder), **columns)
    compare_with_stock(tmp_path / "out", {tensor: plain[tensor] for tensor in weights})


def compare_with_stock(folder: Path, ours: dict[str, torch.Tensor]) -> None:
    """What the layers that transformers loads compute on unit vectors."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu"
    )
    ids = torch.tensor([[0, *range(5, 30)]])
    with torch.inference_mode():
        assert torch.isfinite(theirs(input_ids=ids).logits).all()
        for tensor, weight in ours.items():
            module = theirs.get_submodule(tensor.removesuffix(".weight"))
            found = module(torch.eye(weight.shape[1])).T.float()
            # Kernels compute in 16 bits; a zero point that is off by one would be a fifteenth.
            torch.testing.assert_close(found, weight, rtol=0, atol=5e-3 * float(weight.abs().max()))


def test_every_method_is_tested() -> None:
    tested = {method.split(" ")[0] for method in METHODS}
    assert tested == set(FORMATS) - {"fbgemm_fp8"}  # stored as compressed-tensors' float8 rows are
