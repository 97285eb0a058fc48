"""The whole conversion layer by layer: the same as loaded, at a fraction of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import QualityGate
from surgery.models.ground import Loaded
from surgery.models.journey import Stream, batches
from surgery.models.loading import load_model
from surgery.models.observe import sink_magnitudes
from surgery.patient.patient import COMFORTABLE, Loading, Patient

Tiny = Callable[..., Path]
LAYERS = 8
QUICK = {"check_tokens": 1024, "calibration_tokens": 1024, "max_degradation": 9.0}


@pytest.mark.parametrize(
    ("fold", "scope", "select"),
    [("norm", "all", "weight"), ("sink", "all", "weight"), ("qkv", "first", "activation")],
)
def test_streamed_and_loaded_give_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fold: str, scope: str, select: str
) -> None:
    """Layer, dimensions and figures; and no model is loaded whole on the way."""
    source = str(tiny("qwen3", layer=2, layers=LAYERS, shards=2))
    options = {"fold": fold, "scope": scope, "select": select, "force": True, **QUICK}
    loaded = surgery.convert(source, output=tmp_path / "loaded", stream=False, **options)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("the model was loaded whole")

    monkeypatch.setattr("surgery.models.loading.load_model", refuse)
    streamed = surgery.convert(source, output=tmp_path / "streamed", stream=True, **options)
    assert streamed.emergence.layer == loaded.emergence.layer == 2
    assert streamed.mask == loaded.mask
    for one, other in zip(streamed.quality.variants, loaded.quality.variants, strict=True):
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-5)
        assert one.kl_from_base == pytest.approx(other.kl_from_base, rel=1e-3, abs=1e-7)
        assert one.kl_from_reference == pytest.approx(other.kl_from_reference, rel=1e-3, abs=1e-7)
    names = [check.name for check in streamed.verification.checks]
    assert "stock transformers loads it, no weight missing" in names
    assert streamed.verification.passed
    details = {check.name: check.detail for check in streamed.verification.checks}
    if fold != "sink":
        equal = details["logits equal the base under a hook that masks every token"]
        assert equal.startswith("bit-equal")
    assert surgery.verify(tmp_path / "streamed", stream=True).passed
    files = [path.name for path in (tmp_path / "loaded").glob("*.safetensors")]
    for name in files:  # however it was run, what is written is the same
        assert (tmp_path / "streamed" / name).read_bytes() == (
            tmp_path / "loaded" / name
        ).read_bytes()


def test_a_written_byte_that_is_another_is_seen_layer_by_layer(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written weights run, and not the edits in memory."""
    source = str(tiny("llama", layer=2, layers=LAYERS))
    made = surgery.convert(source, output=tmp_path / "out", stream=True, fold="norm", **QUICK)
    weights = next((tmp_path / "out").glob("*.safetensors"))
    patient = Patient.admit(source, Loading(stream=True))
    from surgery.folds.registry import FOLDS
    from surgery.outputs.behaviour import behaviour

    def checks() -> dict[str, bool]:
        found = behaviour(patient, made.mask, FOLDS["norm"], tmp_path / "out", (), None)
        return {check.name: check.passed for check in found}

    assert all(checks().values())
    raw = bytearray(weights.read_bytes())
    raw[-4000:-3000] = bytes(1000)
    weights.write_bytes(bytes(raw))
    assert not all(checks().values())


def test_magnitudes_layer_by_layer(tiny: Tiny) -> None:
    from surgery.models.journey import first_magnitudes

    patient = Patient.admit(str(tiny("gemma2", layer=2, layers=LAYERS)), Loading(stream=True))
    sequences = patient.calibration()[:6]
    found = first_magnitudes(patient.ground, [3, 5], sequences)
    model = load_model(patient.plain.folder)
    known = sink_magnitudes(model, patient.anatomy, [3, 5], sequences)
    for layer in (3, 5):
        assert found[layer] == pytest.approx(known[layer], rel=1e-4)


def test_forks_share_nothing(tiny: Tiny) -> None:
    patient = Patient.admit(str(tiny("llama", layers=4)), Loading(stream=False))
    ground = patient.ground
    assert isinstance(ground, Loaded)
    stream = Stream.board(ground, [[1, 2, 3, 4], [5, 6, 7]])
    before = [states.clone() for states in stream.states]
    other = stream.fork()
    with ground.layer(0) as layer:
        other.step(0, layer)
    assert all(map(torch.equal, stream.states, before))
    assert not torch.equal(other.states[0], before[0])


def test_batches_hold_every_sequence_once() -> None:
    lengths = [3, 900, 2048, 256, 256, 256, 256, 250, 10, 40]
    sequences = [[7] * length for length in lengths]
    found = list(batches(sequences, torch.device("cpu")))
    assert sorted(place for batch in found for place in batch.places) == list(range(len(lengths)))
    for batch in found:
        assert batch.ids.numel() <= max(1024, max(batch.lengths))
        assert [lengths[place] for place in batch.places] == list(batch.lengths)


def test_what_fits_comfortably_is_loaded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Patient.admit(str(tiny("llama")), Loading())
    needed = 4 * sum(entry.size // 4 for entry in patient.plain.tensors.values())
    for room, streams in ((needed / COMFORTABLE * 1.1, False), (needed / COMFORTABLE * 0.9, True)):
        monkeypatch.setattr("surgery.models.loading.available", lambda room=room: int(room))
        again = Patient.admit(str(tiny("llama")), Loading())
        assert again.streams is streams


def test_a_sink_fold_that_misses_its_reference_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Far too few calibration tokens: the fold leaks more than the mask itself changes."""
    source = str(tiny("gemma3_text", layer=2, layers=LAYERS))
    options = {"fold": "sink", "scope": "all", "output": tmp_path / "out", "layer": 2}
    tokens = {"calibration_tokens": 64, "check_tokens": 512, "max_degradation": 9.0}
    with pytest.raises(QualityGate, match=r"is not near the mask .*--calibration-tokens.*--force"):
        surgery.convert(source, **options, **tokens)
    assert not (tmp_path / "out").exists()
    made = surgery.convert(source, force=True, **options, **tokens)
    assert json.loads((made.output / "surgery.json").read_text())["quality"]["forced"] is True


_LIMITED = """
import resource, sys
import torch, transformers, surgery
from surgery.models import loading
torch.set_num_threads(1)
source, output, stream, room = sys.argv[1:]
import numpy, scipy.stats, transformers.models.llama.modeling_llama
numpy.linalg.solve(numpy.eye(300), numpy.ones(300) @ numpy.ones((300, 300)))  # takes its buffers
from surgery.files.memory import available
import psutil
used = psutil.Process().memory_info().data
limit = used + int(room)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
options = {"check_tokens": 256, "max_degradation": 9.0}
surgery.convert(source, output=output, stream=stream == "True", **options)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts as it does on Linux")
def test_under_a_hard_limit_of_memory(tiny: Tiny, tmp_path: Path) -> None:
    """A checked conversion where the loaded way cannot run: its parameters exceed the limit."""
    wide = {"hidden_size": 768, "intermediate_size": 1536, "dtype": torch.bfloat16}
    source = tiny("llama", layer=2, layers=16, shards=4, **wide)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    room = 300_000_000
    assert 2 * size > 1.1 * room  # the parameters in float32
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def convert(stream: bool) -> subprocess.CompletedProcess[str]:
        words = [str(source), str(tmp_path / f"out-{stream}"), str(stream), str(room)]
        return subprocess.run(
            [sys.executable, "-c", _LIMITED, *words],
            capture_output=True,
            text=True,
            env=environment,
        )

    done = convert(True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert convert(False).returncode != 0
