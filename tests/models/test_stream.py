"""Streaming analysis: the same layer and norms as the full forward pass, and far less to read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from hub_server import HubServer
from huggingface_hub import HfFileSystem
from shared import Run, Tiny, rest_in_full

import surgery
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.method.locate import agree
from surgery.models import stream
from surgery.models.lending import LentModel
from surgery.models.loading import load_model, load_tokenizer
from surgery.models.observe import layer_norms
from surgery.patient import texts
from surgery.patient.patient import examine

FAMILIES = sorted(set(tiny_models.FAMILIES) - {"olmo2"})  # refused: it has nothing to locate for
LAYERS, PLANTED = 16, 2


def prepared(family: str, tiny: Tiny):
    path = tiny(family, layer=PLANTED, layers=LAYERS)
    checkpoint = open_checkpoint(path, Origin("directory", family, family))
    tokenizer = load_tokenizer(path)
    prompts = texts.encode(tokenizer, texts.bundled("calibration")[:6], 300)
    return checkpoint, examine(checkpoint), prompts


@pytest.mark.parametrize("family", rest_in_full(FAMILIES, tiny_models.ROWS))
def test_equals_the_full_forward_pass(family: str, tiny: Tiny) -> None:
    checkpoint, anatomy, prompts = prepared(family, tiny)
    full = layer_norms(load_model(checkpoint.folder), anatomy, prompts)
    streamed = stream.LayerStream(checkpoint, anatomy).run(prompts, lambda _norms: False)
    for one, other in zip(full, streamed, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3)
    found = stream.LayerStream(checkpoint, anatomy).locate(prompts)
    assert found.emergence.layer == agree(full).layer == PLANTED
    assert found.layers_run == PLANTED + 1 + stream.PATIENCE
    assert found.bytes_read < 0.85 * found.bytes_total
    whole = stream.LayerStream(checkpoint, anatomy).locate(prompts, all_layers=True)
    assert whole.layers_run == LAYERS


def test_bfloat16_finds_the_same_layer(tiny: Tiny) -> None:
    checkpoint, anatomy, prompts = prepared("llama", tiny)
    found = stream.LayerStream(checkpoint, anatomy, dtype="bfloat16").locate(prompts)
    exact = stream.LayerStream(checkpoint, anatomy).locate(prompts)
    assert found.emergence.layer == exact.emergence.layer == PLANTED
    assert found.emergence.magnification == pytest.approx(exact.emergence.magnification, rel=0.05)


def test_a_model_without_emergence_is_read_to_the_end(tiny: Tiny) -> None:
    path = tiny("llama", layers=LAYERS, planted=False)
    analysis = surgery.analyze(str(path), stream=True)
    assert analysis.emergence.layer is None
    assert analysis.streamed is not None
    assert analysis.streamed.layers_run == LAYERS


def test_a_fading_rise_is_not_established() -> None:
    """An early rise that has lasted less than PATIENCE layers does not stop the stream."""
    others = np.full((LAYERS + 1, 5), 10.0)
    rising = others.copy()
    rising[3:, 0] = 1000.0
    seen = [stream.established([rising[: done + 1]], LAYERS) for done in range(1, LAYERS + 1)]
    assert seen.index(True) + 1 == 3 + stream.PATIENCE
    fading = rising.copy()
    fading[8:, 0] = 10.0
    assert not any(stream.established([fading[: done + 1]], LAYERS) for done in range(9, LAYERS))


def test_on_the_hub_without_downloading(
    run: Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("qwen3", layer=PLANTED, layers=LAYERS, shards=3)
    with HubServer(tmp_path / "server") as server:
        server.add_repo("some/model", source)
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        home = {"huggingface_hub.constants.HF_HUB_CACHE": str(tmp_path / "home")}
        for name, value in {**server.patches(), **home}.items():
            monkeypatch.setattr(name, value, raising=False)
        HfFileSystem.clear_instance_cache()
        monkeypatch.chdir(tmp_path)
        found = run("analyze", "some/model", "--json").ok().json()
        assert found["emergence"]["layer"] == PLANTED
        assert found["streamed"]["bytes_read"] < 0.85 * found["streamed"]["bytes_total"]
        weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        assert found["streamed"]["bytes_total"] == weights
        cached = [path.name for path in (tmp_path / "home").rglob("*.safetensors")]
        assert cached == []
        assert server.bytes_sent < 0.9 * weights + 200_000
        # convert downloads what it needs, and then analyze reads the files on disk.
        run("convert", "some/model", "--no-check", "--layer", "2", "--quiet").ok()
        cached = [path.name for path in (tmp_path / "home").rglob("*.safetensors")]
        assert sorted(cached) == sorted(path.name for path in source.glob("*.safetensors"))
        sent = server.bytes_sent
        assert run("analyze", "some/model", "--json").ok().json()["streamed"] is None
        assert server.bytes_sent - sent < 100_000


@pytest.mark.parametrize("family", rest_in_full(["gemma2", "mixtral"], ["mixtral"]))
def test_evidence_without_the_whole_model(
    family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny(family, layer=PLANTED, layers=6)
    loaded = surgery.analyze(str(path), evidence=True)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("the model was loaded whole")

    monkeypatch.setattr("surgery.models.loading.load_model", refuse)
    lent = surgery.analyze(str(path), evidence=True, stream=True)
    assert loaded.evidence is not None
    assert lent.evidence is not None
    assert lent.evidence.notes == loaded.evidence.notes
    for one, other in zip(lent.evidence.rows, loaded.evidence.rows, strict=True):
        assert asdict(one) == pytest.approx(asdict(other), rel=1e-3, abs=1e-5, nan_ok=True)
    assert lent.evidence.mask is not None
    assert loaded.evidence.mask is not None
    assert lent.evidence.mask.energy == pytest.approx(loaded.evidence.mask.energy, rel=1e-4)
    assert lent.evidence.mask.key == pytest.approx(loaded.evidence.mask.key, rel=1e-3)


def test_lent_layers_hold_no_matrices(tiny: Tiny) -> None:
    checkpoint, anatomy, prompts = prepared("llama", tiny)
    model = LentModel(checkpoint, anatomy).open(prompts)
    held = []

    def look(*_: object) -> None:
        matrices = [p for p in model.model.layers.parameters() if p.dim() > 1]
        held.append(sum(not p.is_meta for p in matrices) / len(matrices))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    layer_norms(model, anatomy, prompts[:2])
    assert held == [1 / LAYERS] * 2 * LAYERS
