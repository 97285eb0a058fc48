"""Gains that are strange, and the same result every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import Run, Tiny
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.method.locate import agree, vote

GAIN = "model.layers.4.input_layernorm.weight"
SIZE = 64
Snapshot = Callable[[Path], dict[str, bytes | None]]


def with_gain(folder: Path, gain: torch.Tensor) -> Path:
    """The checkpoint with another gain in the first layer after layer 3."""
    tensors = load_file(folder / "model.safetensors")
    assert tensors[GAIN].shape == gain.shape
    save_file({**tensors, GAIN: gain}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dimensions(output: Path) -> list[int]:
    found: list[int] = json.loads((output / "surgery.json").read_text())["dimensions"]["4"]
    return found


def alternating() -> torch.Tensor:
    return torch.tensor([1.0, -2.0] * (SIZE // 2))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (torch.zeros(SIZE), range(6)),
        (torch.full((SIZE,), 0.5), range(6)),
        (-torch.ones(SIZE), range(6)),
        (alternating(), range(1, 12, 2)),
        (torch.cat([torch.ones(60), torch.tensor([2.0, -2.0, 2.0, 2.0])]), [0, 1, 60, 61, 62, 63]),
    ],
    ids=["all zero", "constant", "negative", "alternating", "ties at the end"],
)
def test_strange_gains(
    gain: torch.Tensor, expected: list[int], dtype: torch.dtype, tiny_copy: Tiny, tmp_path: Path
) -> None:
    """By size, not by sign; among equals the lowest index, in every format."""
    folder = with_gain(tiny_copy(), gain.to(dtype))
    surgery.convert(str(folder), layer=3, check=False, output=tmp_path / "out")
    assert dimensions(tmp_path / "out") == list(expected)
    written = load_file(tmp_path / "out" / "model.safetensors")[GAIN]
    assert written.dtype == dtype
    wanted = gain.clone()
    wanted[list(expected)] = 0
    assert torch.equal(written.float(), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fold", ["norm", "sink"])
def test_gains_that_are_not_finite(
    value: float, fold: str, tiny_copy: Tiny, tmp_path: Path, run: Run
) -> None:
    gain = torch.ones(SIZE)
    gain[7] = value
    folder = with_gain(tiny_copy(), gain)
    words = ("--layer", "3", "--fold", fold, "--quiet", "-o", tmp_path / "out")
    sentence = run(
        "convert", folder, *words, *(["--no-check"] if fold == "norm" else [])
    ).sentence()
    assert "NaN" in sentence or "not finite" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rate", "masked"), [(0.016, 1), (0.5, 31), (0.9999, 62)])
def test_odd_hidden_size(rate: float, masked: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=63,
        num_attention_heads=7,
        num_key_value_heads=7,
        head_dim=8,
        intermediate_size=65,
        num_hidden_layers=4,
        vocab_size=101,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    for fold in ("norm", "qkv"):
        output = tmp_path / fold
        surgery.convert(
            str(tmp_path / "odd"), layer=1, rate=rate, fold=fold, check=False, output=output
        )
        model = LlamaForCausalLM.from_pretrained(output)
        found = json.loads((output / "surgery.json").read_text())["dimensions"]["2"]
        assert len(found) == masked
        layer = model.model.layers[2]
        zeros = layer.input_layernorm.weight if fold == "norm" else layer.self_attn.q_proj.weight
        assert (zeros[..., found] == 0).all()
        assert int((zeros == 0).sum()) == masked * (56 if fold == "qkv" else 1)


def test_layers_and_tokens_with_equal_norms() -> None:
    """Nothing where all is equal; of equal tokens and equal jumps the first, in any order."""
    for norms in (np.ones((17, 20)), np.zeros((17, 20))):
        assert vote(norms).layer is None
    tokens = np.ones((17, 20))
    tokens[6:, [3, 7]] *= 1000
    assert (vote(tokens).layer, vote(tokens).position) == (5, 3)
    jumps = np.ones((17, 20))
    jumps[6:, 7] *= 100
    jumps[10:, 7] *= 100
    assert vote(jumps).layer == 5
    later = np.ones((17, 20))
    later[9:, 0] *= 1000
    for prompts in ([tokens, later], [later, tokens]):  # as many votes for one as for the other
        assert agree(prompts).layer is None


def words_of(folder: Path, output: Path, fold: str) -> list[str]:
    quick = ["--layer", "3", "--no-check", "--calibration-tokens", "512", "-q"]
    return ["convert", str(folder), "-o", str(output), "--fold", fold, *quick]


def converted_by_a_process(folder: Path, output: Path, threads: int, seed: int, fold: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "surgery", *words_of(folder, output, fold)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)},
    )
    assert done.returncode == 0, done.stderr


def test_the_same_in_every_process(
    tiny: Tiny, run: Run, tmp_path: Path, snapshot: Snapshot
) -> None:
    """Weights that need no measuring are the same whatever the number of threads."""
    run(*words_of(tiny(), tmp_path / "here", "norm")).ok()
    converted_by_a_process(tiny(), tmp_path / "there", 2, 2, "norm")
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")


def test_the_sink_fold_is_the_same_in_every_process(
    tiny: Tiny, run: Run, tmp_path: Path, snapshot: Snapshot
) -> None:
    """And measured weights with the same number of threads; else within their rounding."""
    run(*words_of(tiny(), tmp_path / "one", "sink")).ok()
    converted_by_a_process(tiny(), tmp_path / "again", 1, 2, "sink")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "again")
    torch.set_num_threads(2)
    try:
        run(*words_of(tiny(), tmp_path / "two", "sink")).ok()
    finally:
        torch.set_num_threads(1)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        assert np.allclose(one[name], two[name], rtol=0, atol=1e-5), name
