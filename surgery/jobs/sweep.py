"""Many settings of a conversion on one loaded model: which is best, and at what price.

The points are rates × scopes × folds × selections × strengths. Each is an edit in memory
(`surgery.scoring`); an optuna study (`surgery.study`) holds what is to be done and what came out,
so that a sweep goes on where it was killed, and any number of workers share it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, Unsupported
from surgery.files.staging import write_whole
from surgery.files.text import read_json
from surgery.jobs.convert import convert
from surgery.measure.tasks import TaskScorer, TaskSettings, task_settings
from surgery.method.mask import attention_targets, mask_size
from surgery.models.anatomy import width_of
from surgery.outputs.card import command_line
from surgery.outputs.manifest import clean_numbers
from surgery.outputs.pipeline import Conversion
from surgery.outputs.plan import check_apart
from surgery.patient.locating import find_emergence
from surgery.patient.patient import examine
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings
from surgery.sweeping.queue import SharedStudy, Space
from surgery.sweeping.study import Claim, Progress

if TYPE_CHECKING:
    from surgery.files.checkpoint import Checkpoint
    from surgery.measure.scoring import Scorer
    from surgery.models.anatomy import Anatomy

RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# What can be minimised: the name in a point's figures, and in words.
SCORES = {
    "perplexity": ("perplexity", "perplexity"),
    "kl": ("kl_from_reference", "KL(reference ‖ folded), nats"),
    "tasks": ("task_error", "error on the tasks (1 − score, mean)"),
}
STUDY, RESULTS, FIGURE = "study.db", "results.json", "sweep.png"
# Seconds between two looks at what other workers do.
_LOOK = 0.5


@dataclass(frozen=True)
class Point:
    """One combination of settings; see `surgery convert --help` for their meaning."""

    rate: float
    scope: str
    fold: str
    select: str
    strength: float

    def settings(self, common: Settings) -> Settings:
        """The settings of a conversion at this point."""
        return replace(common, **asdict(self))


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a sweep finds.

    common: the settings that all points share. values: of each that varies. text: a file to
    measure on instead of the bundled held-out text. trials: so many points by search; None for
    every point of the grid. tasks: what to score by where score is "tasks".
    """

    common: Settings
    values: Mapping[str, tuple[Any, ...]]
    score: str
    text: str | None
    trials: int | None
    tasks: TaskSettings | None = None

    @property
    def space(self) -> Space:
        return Space(self.values, self.trials is not None)

    @property
    def points(self) -> list[dict[str, Any]]:
        """Parameters by point, in the order of work; empty where the sampler chooses.

        Folds change fastest: they share the mask, and so the reference.
        """
        if self.trials is not None:
            return [{} for _ in range(self.trials)]
        order = ("scope", "select", "strength", "rate", "fold")
        return [
            dict(zip(order, combination, strict=True))
            for combination in itertools.product(*(self.values[name] for name in order))
        ]

    def point(self, parameters: Mapping[str, Any]) -> Point:
        """The point with these parameters; numbers that a search found are rounded."""
        numbers = {name: float(parameters[name]) for name in ("rate", "strength")}
        if self.trials is not None:
            numbers = {name: round(value, 4) for name, value in numbers.items()}
        return Point(**{**parameters, **numbers})

    def facts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a study is about, as it is recorded in it."""
        common, origin = self.common, checkpoint.origin
        return {
            "model": origin.name,
            "commit": origin.commit,
            "score": self.score,
            "search": self.trials is not None,
            **{f"{name}s": list(values) for name, values in self.values.items()},
            "layer": common.layer,
            "seed": common.seed,
            "dtype": common.dtype,
            "check tokens": common.check_tokens,
            "calibration tokens": common.calibration_tokens,
            "sha256 of the text": _text_hash(self.text, "heldout"),
            "sha256 of the calibration text": _text_hash(common.calibration, "calibration"),
            **({"tasks": _task_facts(self.tasks)} if self.tasks is not None else {}),
        }


@dataclass(frozen=True)
class Row:
    """A point and what it measured, or why it could not be measured.

    score: what is minimised. on_front: on the Pareto front of score against
    KL(reference ‖ folded), and of that against perplexity where it is the score itself. figures:
    see `surgery.scoring.Figures`. command: makes this checkpoint.
    """

    point: Point
    score: float | None
    on_front: bool
    figures: Mapping[str, Any] | None
    error: str | None
    command: str


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. rows: best first, points that could not be measured last."""

    output: Path
    model: str
    commit: str | None
    score: str
    layer: int | None
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    converted: Conversion | None = None

    @property
    def best(self) -> Row | None:
        """The point with the lowest score; None where none could be measured."""
        return self.rows[0] if self.rows and self.rows[0].figures is not None else None

    @property
    def base_perplexity(self) -> float | None:
        """Of the model as it is."""
        return self._of_base("base_perplexity")

    @property
    def base_score(self) -> float | None:
        """The score of the model as it is; None for KL, which is the distance from another."""
        return self._of_base({"tasks": "base_task_error"}.get(self.score, f"base_{self.score}"))

    def _of_base(self, figure: str) -> float | None:
        best = self.best
        return best.figures.get(figure) if best and best.figures else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        best = self.best
        return {
            "output": str(self.output),
            "model": self.model,
            "commit": self.commit,
            "score": self.score,
            "emergence_layer": self.layer,
            "base_perplexity": self.base_perplexity,
            "base_score": self.base_score,
            "settings": dict(self.settings),
            "best": best.command if best else None,
            "points": [
                {
                    **asdict(row.point),
                    "score": row.score,
                    "on_front": row.on_front,
                    **(row.figures or {}),
                    "error": row.error,
                    "command": row.command,
                }
                for row in self.rows
            ],
            "converted": str(self.converted.output) if self.converted else None,
        }


def sweep(
    model: str,
    *,
    rates: Sequence[float] = RATES,
    scopes: Sequence[str] = ("first", "all"),
    folds: Sequence[str] | None = None,
    selects: Sequence[str] = ("weight", "activation", "random"),
    strengths: Sequence[float] = (1.0,),
    score: str = "perplexity",
    text: str | None = None,
    output: str | Path | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    jobs: int = 1,
    trials: int | None = None,
    convert_best: str | Path | None = None,
    layer: int | None = None,
    seed: int = 0,
    check_tokens: int = 2048,
    calibration: str | None = None,
    calibration_tokens: int = 4096,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    tasks: Sequence[str] = (),
    reporter: Reporter = SILENT,
    **task_options: Any,
) -> Sweep:
    """Score every combination of settings on one loaded model; results.json and a figure.

    model: a folder, a Hub id, a .gguf file or "demo". folds: by default `norm` (`qkv` where that
    is not possible) and `sink`. score: "perplexity", "kl" or "tasks" (the mean error on lm-eval
    tasks), each minimised. tasks, task_options: as in `surgery.compare`. text: a file to measure
    on. storage: the study's database, by default an SQLite file in `output`; workers on several
    machines share a postgresql:// one. jobs: local processes, each on a device of its own where
    there are several. trials: search so many points (TPE) instead of the whole grid.
    convert_best: a folder to convert to with the best settings. The others: see `Settings`.
    A sweep that was interrupted goes on where it was. Raises BadSettings when its study was made
    with other settings, and another SurgeryError for what prevents every point; what prevents one
    point stands in its row.
    """
    common = Settings(
        model=model,
        layer=layer,
        revision=revision,
        seed=seed,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        check_tokens=check_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    checkpoint = resolve(model, common.revision, reporter.say)
    anatomy = examine(checkpoint, trust_remote_code=common.trust_remote_code)
    values = {
        "rate": rates,
        "scope": scopes,
        "fold": _folds(anatomy, folds),
        "select": selects,
        "strength": strengths,
    }
    if (score == "tasks") != bool(tasks):
        raise BadSettings(
            "--score tasks and --tasks belong together: which tasks, and that they decide."
        )
    chosen = task_settings(tasks, task_options)
    plan = Plan(common, _checked(common, values), score, text, trials, chosen)
    _check(plan, anatomy, checkpoint, jobs)
    name = checkpoint.origin.name.rsplit("/", 1)[-1]
    folder = Path(output) if output is not None else Path(f"{name}-sweep")
    _make_folder(folder, checkpoint.sources)
    url = storage or f"sqlite:///{(folder / STUDY).absolute()}"
    shared = SharedStudy(url, study_name or f"{name}-sweep", plan.space, common.seed)
    facts = plan.facts(checkpoint)
    shared.require(facts, "the given storage" if storage else str(folder))
    shared.enqueue(plan.points)
    progress = shared.progress()
    if progress.ended:
        reporter.say(f"{progress.ended} points are known from before")
    if not progress.finished:
        with reporter.bar("Sweeping", progress.running + progress.waiting) as advance:
            if jobs == 1:
                _work(plan, checkpoint, anatomy, shared, reporter, _counting(progress, advance))
            else:
                _employ(plan, shared, url, jobs, _counting(progress, advance))
    found = _result(plan, shared, checkpoint, folder, facts)
    _write(found, shared)
    if convert_best is not None and found.best is not None:
        best = asdict(found.best.point.settings(_for_convert(common)))
        found = replace(found, converted=convert(output=convert_best, reporter=reporter, **best))
        _write(found, shared)
    return found


# --------------------------------------------------------------------------------------------
# Before
# --------------------------------------------------------------------------------------------


def _folds(anatomy: Anatomy, folds: Sequence[str] | None) -> Sequence[str]:
    if folds is not None:
        return folds
    try:
        anatomy.require("norm")
    except Unsupported:
        return ("qkv", "sink")
    return ("norm", "sink")


def _checked(common: Settings, values: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """Each list without repetitions; BadSettings where a value makes no sense."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, given in values.items():
        if not given:
            raise BadSettings(f"--{name}s names nothing.")
        for value in given:
            replace(common, **{name: value})  # raises BadSettings
        numbers = name in ("rate", "strength")
        found[name] = tuple(dict.fromkeys(float(v) if numbers else v for v in given))
    return found


def _check(plan: Plan, anatomy: Anatomy, checkpoint: Checkpoint, jobs: int) -> None:
    from surgery.patient import texts

    if plan.score not in SCORES:
        raise BadSettings(f"--score must be one of {', '.join(SCORES)}; not {plan.score!r}.")
    if jobs < 1:
        raise BadSettings("--jobs must be at least 1.")
    if plan.trials is not None and plan.trials < 1:
        raise BadSettings("--trials must be at least 1.")
    for rate in plan.values["rate"]:
        mask_size(rate, width_of(checkpoint.config))
    for fold in plan.values["fold"]:
        anatomy.require(fold)
    if plan.common.layer is not None:
        attention_targets(plan.common.layer, anatomy.attends, "all")
    for path in (plan.text, plan.common.calibration):
        if path is not None:
            texts.read_texts(Path(path))


def _text_hash(path: str | None, bundled: str) -> str:
    from surgery.patient import texts

    file = Path(path) if path is not None else texts.FOLDER / f"{bundled}.jsonl"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _task_facts(tasks: TaskSettings) -> dict[str, Any]:
    """As JSON has it; where the documents lie differs between machines, what they are may not."""
    facts = {name: value for name, value in asdict(tasks).items() if name != "data"}
    return dict(json.loads(json.dumps(facts)))


def _make_folder(folder: Path, sources: Sequence[Path]) -> None:
    """Raise BadSettings for a folder that is the model's, or holds something else than a sweep."""
    check_apart(sources, folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and not any(name.startswith(STUDY) for name in names) and not _swept(folder):
        raise BadSettings(
            f"{folder} holds files of something else ({sorted(names)[0]}); choose another --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSettings(f"The folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadSettings(f"{folder} is not writable; choose another --output.")


def _swept(folder: Path) -> bool:
    """Whether a folder has the results of a sweep whose study is kept elsewhere."""
    try:
        return "points" in read_json(folder / RESULTS)
    except BadCheckpoint:
        return False


# --------------------------------------------------------------------------------------------
# Work
# --------------------------------------------------------------------------------------------

Watch = Callable[[Progress], None]


def _counting(start: Progress, advance: Callable[[int], None]) -> Watch:
    """Turns how far a study is into how much further it is than at the last look."""
    known = start.ended

    def watch(progress: Progress) -> None:
        nonlocal known
        advance(progress.ended - known)
        known = progress.ended

    return watch


def _work(
    plan: Plan,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    shared: SharedStudy,
    reporter: Reporter,
    watch: Watch,
) -> None:
    """Score points until all of the study have ended, here or elsewhere."""
    scorer = _scorer(plan, checkpoint, anatomy, shared, reporter)
    last: Mapping[str, Any] = {}
    while not (progress := shared.progress()).finished:
        watch(progress)
        claim = shared.claim({name: value for name, value in last.items() if name != "fold"})
        if claim is None:
            time.sleep(_LOOK)  # the points that are left are with other workers
            continue
        last = claim.parameters
        with shared.alive(claim):
            _score(plan, shared, claim, scorer)
    watch(progress)
    scorer.require_untouched()


def _score(plan: Plan, shared: SharedStudy, claim: Claim, scorer: Scorer) -> None:
    from surgery.measure.scoring import Touched

    point = plan.point(claim.parameters)
    for ended in shared.ended() if plan.trials is not None else ():
        if ended.figures is not None and plan.point(ended.parameters) == point:
            shared.complete(claim, _score_of(plan.score, ended.figures), ended.figures)
            return
    try:
        figures = asdict(scorer.score(point.settings(plan.common)))
    except Touched:
        raise
    except SurgeryError as error:
        shared.give_up(claim, str(error))
        return
    score = _score_of(plan.score, figures)
    if math.isnan(score):
        shared.give_up(claim, "the model's answers are not numbers at these settings")
    else:
        shared.complete(claim, score, figures)


def _scorer(
    plan: Plan,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    shared: SharedStudy,
    reporter: Reporter,
) -> Scorer:
    from surgery.measure.scoring import Scorer

    subject = Subject(checkpoint, plan.common, reporter)
    layer = plan.common.layer
    if layer is None:
        layer = shared.fact("emergence layer")
    if layer is None:
        emergence = find_emergence(subject, anatomy, plan.common, reporter)
        reporter.show(emergence)
        layer = shared.agree("emergence layer", emergence.require())
    tasks = None
    if plan.tasks is not None:
        reporter.say("Running the tasks on the model as it is")
        tasks = TaskScorer(plan.tasks, subject, plan.common, SILENT)
        if shared.agree("sha256 of the documents", tasks.documents) != tasks.documents:
            raise BadSettings("The study was made with other documents of the same tasks.")
    scorer = Scorer(subject, anatomy, layer, plan.common, plan.text, tasks)
    if shared.agree("sha256 of the parameters", scorer.parameters) != scorer.parameters:
        raise BadSettings(
            f"The study was made with other weights than those of {checkpoint.origin.name} here; "
            "give another --output, or another --study."
        )
    return scorer


def _employ(plan: Plan, shared: SharedStudy, url: str, jobs: int, watch: Watch) -> None:
    """Processes of this machine work on the study until all points have ended."""
    with tempfile.TemporaryFile("w+") as errors, _workers(plan, shared, url, jobs, errors) as all_:
        while not (progress := shared.progress()).finished:
            watch(progress)
            if all(worker.poll() is not None for worker in all_):
                break
            time.sleep(_LOOK)
        else:
            watch(progress)
        codes = [worker.wait() for worker in all_]
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    if not shared.progress().finished:
        reason = said[-1] if said else f"exit codes {', '.join(str(code) for code in codes)}"
        raise SurgeryError(f"All workers of the sweep stopped before its end: {reason}")


@contextmanager
def _workers(
    plan: Plan, shared: SharedStudy, url: str, jobs: int, errors: Any
) -> Iterator[list[subprocess.Popen[str]]]:
    """Worker processes, which end with this block, and with this process whatever ends it."""
    found: list[subprocess.Popen[str]] = []
    program = "from surgery.sweeping import serve; serve()"
    try:
        for number in range(jobs):
            common = replace(plan.common, device=_device(plan.common.device, number))
            # By the pipe, not by the command line: a storage's URL may hold a password.
            order = {
                "plan": _plain(replace(plan, common=common)),
                "study": shared.name,
                "url": url,
                "jobs": jobs,
            }
            worker = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
            )
            found.append(worker)
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        yield found
    finally:
        for worker in found:
            worker.terminate()
            worker.wait()


def _device(given: str | None, number: int) -> str | None:
    """The device of a worker: the given one, else one each as far as there are several."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if given is None and count > 1 else given


def serve() -> None:
    """The life of a worker process: an order on stdin, then work until the study has ended."""
    import torch

    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // order["jobs"]))
    try:
        plan = _from_plain(order["plan"])
        common = plan.common
        checkpoint = resolve(common.model, common.revision)
        anatomy = examine(checkpoint, trust_remote_code=common.trust_remote_code)
        shared = SharedStudy(order["url"], order["study"], plan.space, common.seed)
        _work(plan, checkpoint, anatomy, shared, SILENT, lambda _progress: None)
    except SurgeryError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    """The pipe closes when the parent ends, however it ends."""
    sys.stdin.read()
    os._exit(1)


def _plain(plan: Plan) -> dict[str, Any]:
    found = {field.name: getattr(plan, field.name) for field in fields(plan)}
    tasks = asdict(plan.tasks) if plan.tasks is not None else None
    return {**found, "common": asdict(plan.common), "tasks": tasks}


def _from_plain(plain: Mapping[str, Any]) -> Plan:
    values = {name: tuple(given) for name, given in plain["values"].items()}
    tasks = plain["tasks"]
    if tasks is not None:
        lists = {name: tuple(tasks[name]) for name in ("tasks", "seeds")}
        tasks = TaskSettings(**{**tasks, **lists})
    common = Settings(**plain["common"])
    return Plan(**{**plain, "common": common, "values": values, "tasks": tasks})


# --------------------------------------------------------------------------------------------
# After
# --------------------------------------------------------------------------------------------


def _score_of(score: str, figures: Mapping[str, Any]) -> float:
    return float(figures[SCORES[score][0]])


def _for_convert(common: Settings) -> Settings:
    """The gate of `convert` measures as much as it does by default, not as much as a sweep."""
    return replace(common, check_tokens=Settings(model=common.model).check_tokens)


def front(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each place is on the Pareto front: no other is as small in both and smaller in one.

    places: two figures of each, both better when smaller.
    """
    return [
        not any(
            other[0] <= place[0] and other[1] <= place[1] and other != place for other in places
        )
        for place in places
    ]


def _result(
    plan: Plan,
    shared: SharedStudy,
    checkpoint: Checkpoint,
    folder: Path,
    facts: Mapping[str, Any],
) -> Sweep:
    ended = shared.ended()
    measured = [end for end in ended if end.figures is not None]
    price = "perplexity" if plan.score == "kl" else "kl_from_reference"
    places = [
        (_score_of(plan.score, figures), float(figures[price]))
        for figures in (end.figures for end in measured)
        if figures is not None
    ]
    marks = dict(zip((end.index for end in measured), front(places), strict=True))
    rows = []
    for end in ended:
        point = plan.point(end.parameters)
        rows.append(
            Row(
                point=point,
                score=_score_of(plan.score, end.figures) if end.figures is not None else None,
                on_front=marks.get(end.index, False),
                figures=end.figures,
                error=end.error,
                command=command_line(point.settings(_for_convert(plan.common))),
            )
        )
    rows.sort(key=lambda row: math.inf if row.score is None else row.score)
    rows.sort(key=lambda row: row.figures is None)
    layer = plan.common.layer
    return Sweep(
        output=folder,
        model=checkpoint.origin.name,
        commit=checkpoint.origin.commit,
        score=plan.score,
        layer=shared.fact("emergence layer") if layer is None else layer,
        settings=facts,
        rows=tuple(rows),
    )


def _write(found: Sweep, shared: SharedStudy) -> None:
    text = json.dumps(clean_numbers(found.as_dict()), indent=2) + "\n"
    with shared.locked():  # other processes of this sweep may end now too
        write_whole(found.output / RESULTS, text.encode())
    if found.best is not None:
        from surgery.report.plots import plot_sweep

        plot_sweep(found, found.output / FIGURE)
