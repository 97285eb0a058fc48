"""On an accelerator: journey, locating, mask and generation against the processor's figures.

Marked `gpu` (`make test-gpu`), and skipped, saying so, where CUDA is not there. Tiny models alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery.measure.trial import Edited, run_trial
from surgery.models.loading import load_model, load_tokenizer
from surgery.models.masking import wemask
from surgery.outputs.operation import decide
from surgery.patient.patient import Loading, Patient
from surgery.settings import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

Tiny = Callable[..., Path]
LAYERS, PLANTED = 8, 2
# How far figures may be from the processor's in float32, relatively.
NEAR = {"float32": 1e-3, "bfloat16": 0.1}
PLACES = [(dtype, stream) for dtype in NEAR for stream in (False, True)]


@pytest.fixture
def source(tiny: Tiny) -> str:
    return str(tiny("qwen3", layer=PLANTED, layers=LAYERS))


def trial(source: str, device: str, dtype: str, stream: bool):
    """What the gate measures of the sink fold in all later layers, whose mask is also checked."""
    settings = Settings(
        source, fold="sink", scope="all", device=device, dtype=dtype, stream=stream,
        calibration_tokens=1024,
    )  # fmt: skip
    patient = Patient.admit(source, settings.loading)
    made = decide(patient, settings)
    assert made.emergence is not None
    assert made.emergence.layer == PLANTED
    edited = Edited(patient.plain, made.mask, made.edits, made.calibration.directions)
    return made.mask, run_trial(patient.ground, edited, patient.held_out(512))


@pytest.mark.parametrize(("dtype", "stream"), PLACES)
def test_the_journey(source: str, dtype: str, stream: bool) -> None:
    mask, here = trial(source, "cuda", dtype, stream)
    known_mask, known = trial(source, "cpu", "float32", False)
    assert mask == known_mask
    for one, other in zip(here.sequences, known.sequences, strict=True):
        for name in ("base", "reference", "folded"):
            np.testing.assert_allclose(
                one.losses[name].mean(), other.losses[name].mean(), rtol=NEAR[dtype]
            )
    layer = mask.layers[0]
    np.testing.assert_allclose(
        here.answers[layer].leak.sink_smallest, known.answers[layer].leak.sink_smallest, rtol=0.05
    )


@pytest.mark.parametrize(("dtype", "stream"), PLACES)
def test_locating(source: str, dtype: str, stream: bool) -> None:
    here = surgery.analyze(source, device="cuda", dtype=dtype, stream=stream).emergence
    known = surgery.analyze(source, device="cpu").emergence
    assert here.layer == known.layer == PLANTED
    assert here.magnification == pytest.approx(known.magnification, rel=NEAR[dtype])


@pytest.mark.parametrize("dtype", list(NEAR))
def test_the_mask_and_generation(source: str, dtype: str) -> None:
    patient = Patient.admit(source, Loading(device="cpu"))
    mask = decide(patient, Settings(source, layer=PLANTED)).mask
    words = load_tokenizer(Path(source))("What is a massive activation?", return_tensors="pt")
    found = []
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        model = load_model(Path(source), dtype=kind, device=torch.device(device))
        ids = {name: values.to(device) for name, values in words.items() if "type" not in name}
        with wemask(model, mask), torch.inference_mode():
            logits = model(**ids).logits.float().cpu()
            made = model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert made.shape[1] == ids["input_ids"].shape[1] + 8
        found.append(logits)
    np.testing.assert_allclose(found[1], found[0], rtol=NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.parametrize(("dtype", "stream"), PLACES)
def test_a_whole_conversion(source: str, tmp_path: Path, dtype: str, stream: bool) -> None:
    options = {"layer": PLANTED, "check_tokens": 512, "max_degradation": 9.0}
    made = surgery.convert(
        source, output=tmp_path / "here", device="cuda", dtype=dtype, stream=stream, **options
    )
    known = surgery.convert(source, output=tmp_path / "known", device="cpu", **options)
    assert made.mask == known.mask
    assert made.verification.passed
    for path in known.output.glob("*.safetensors"):
        assert (made.output / path.name).read_bytes() == path.read_bytes()
