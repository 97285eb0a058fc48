"""The optuna study behind a sweep: which points there are, and what came out of each.

Nothing is queued and nothing is locked: what is left to do follows from the trials that are there.
A worker starts a trial for the first point that has neither a result nor a worker, and looks once
more: where somebody took the same point a moment earlier, it leaves it to them. Two workers can
still score one point when they look at the same instant; points are deterministic, so that costs
time and changes nothing, and the first result is kept. A trial whose worker is silent fails by
optuna's heartbeat, and so its point is without a worker again.

Points claimed through files would do for a grid on one machine. A search needs optuna's sampler,
and several machines its PostgreSQL, so optuna keeps the grid too, through its public names alone.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings, SurgeryError, first_line
from surgery.files.paths import expanded

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

# A worker says every so many seconds that it lives, and counts as dead after so many without.
HEARTBEAT, GRACE = 2, 12
# A point whose worker died so often is given up: it is probably what kills them.
ATTEMPTS = 5
# Seconds to wait while another process makes the tables, and how often.
_PAUSE, _TRIES = 0.5, 10

_POSTGRESQL = ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """The points of a study.

    Attributes:
        values: of each parameter, the allowed ones.
        points: the parameters of each point, in the order of work; empty for a search.
        trials: so many points by search, numbers lying anywhere between their smallest and largest
            value, rates on a logarithmic scale; None for the given points.
    """

    values: Mapping[str, tuple[Any, ...]]
    points: Sequence[Parameters]
    trials: int | None = None

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's parameters, as the study's sampler has them."""
        found: dict[str, Any] = {}
        for name, values in self.values.items():
            if self.trials is not None and isinstance(values[0], float) and len(values) > 1:
                low, high = min(values), max(values)
                found[name] = trial.suggest_float(name, low, high, log=name == "rate")
            else:
                found[name] = trial.suggest_categorical(name, values)
        return found


@dataclass(frozen=True)
class Ended:
    """A point with its result.

    Attributes:
        parameters: of the point.
        score: what is minimised; None where the point could not be scored.
        figures: what was measured, as plain data; None without a score.
        error: why the point could not be scored, and never will be.
    """

    parameters: Parameters
    score: float | None
    figures: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        ended: points with a result, in the order of the points, each once.
        running: how many are being worked on.
        waiting: the parameters of those that wait; empty ones are for the sampler to fill.
        deaths: how often a worker died at a point.
    """

    ended: Sequence[Ended]
    running: int
    waiting: Sequence[Parameters]
    deaths: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, here or elsewhere."""
        return self.running == 0 and not self.waiting


class SharedStudy:
    """A study that any number of processes, on one machine or many, work on together."""

    def __init__(self, url: str, name: str, space: Space, seed: int) -> None:
        """Open the study, which is made where there is none.

        Args:
            url: sqlite:///FILE or postgresql://….
            name: of the study in that database.
            space: its points.
            seed: of a search; what is proposed does not depend on which worker asks.

        Raises:
            BadSettings: the database cannot be used.
        """
        self.url, self.name = database(url), name
        self._space, self._seed = space, seed
        self._facts: tuple[Mapping[str, Any], str] = ({}, "")
        self._study, self._beat = _open(self.url, name)

    # ----------------------------------------------------------------------------------------
    # What the study is about
    # ----------------------------------------------------------------------------------------

    def agree(self, facts: Mapping[str, Any], where: str) -> None:
        """Record what the study is about.

        Args:
            facts: by name; plain data.
            where: the study is, in words.

        Raises:
            BadSettings: it was about something else.
        """
        known = self._study.user_attrs
        for key, value in facts.items():
            if known.get(key, value) != value:
                raise BadSettings(
                    f"The study in {where} was made with other settings ({key}: "
                    f"{_words(known[key])} there, {_words(value)} here); give the same, or "
                    "another --output, or another --study."
                )
        for key, value in facts.items():
            if key not in known:
                self._study.set_user_attr(key, value)
        self._facts = facts, where

    def fact(self, key: str, value: Any = None) -> Any:
        """A recorded fact; `value`, which is recorded where it is not None, where there is none."""
        known = self._study.user_attrs
        if key not in known and value is not None:
            self._study.set_user_attr(key, value)
            known = self._study.user_attrs
        return known.get(key)

    # ----------------------------------------------------------------------------------------
    # Points
    # ----------------------------------------------------------------------------------------

    def look(self) -> Progress:
        """How far the study is. Points of dead workers wait."""
        import optuna

        self.agree(*self._facts)  # again: two that differ may have begun at the same moment
        optuna.storages.fail_stale_trials(self._study)
        trials = self._study.get_trials(deepcopy=False)
        ended = [_end_of(trial) for trial in trials if _has_ended(trial)]
        running = [trial.params for trial in trials if _has_worker(trial)]
        deaths = sum(map(_has_died, trials))
        if self._space.trials is not None:
            ended = ended[: self._space.trials]
            left = self._space.trials - len(ended)
            busy = min(left, len(running))
            return Progress(ended, busy, [{}] * (left - busy), deaths)
        results = {_key(end.parameters): end for end in reversed(ended)}
        left_out = results.keys() | {_key(parameters) for parameters in running}
        points = [(_key(point), point) for point in self._space.points]
        waiting = [point for key, point in points if key not in left_out]
        ended = [results[key] for key, _ in points if key in results]
        return Progress(ended, len(points) - len(ended) - len(waiting), waiting, deaths)

    def work(
        self, progress: Progress, score: Callable[[Parameters], Ended], like: Parameters
    ) -> Parameters:
        """Score a waiting point, unless it turns out to need no work or to have a worker.

        Args:
            progress: of the last look, with at least one point that waits.
            score: ends the point of these parameters. What it raises is raised here, and the point
                waits again.
            like: parameters that the point should share if possible, because the worker has what
                they need in memory.

        Returns:
            The point's parameters.
        """
        import optuna

        # Beside others not the next one in order, which they want too.
        first = random.choice if progress.running else operator.itemgetter(0)
        near = [one for one in progress.waiting if like.items() <= one.items()]
        parameters: Parameters = near[0] if like and near else first(progress.waiting)
        fixed = dict(parameters)
        raised: BaseException | None = None

        def objective(trial: optuna.Trial) -> float:
            nonlocal parameters, raised
            # A seed for each trial: what is proposed does not depend on which worker asks.
            sampler = optuna.samplers.TPESampler(seed=self._seed + trial.number, constant_liar=True)
            self._study.sampler = optuna.samplers.PartialFixedSampler(fixed, sampler)
            end = None
            try:
                parameters = self._space.suggest(trial)
                # A trial blocks a point from here on, so its end must be noticed: optuna fails none
                # whose worker died before the first heartbeat.
                self._beat.wait(GRACE)
                trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
                trials = self._study.get_trials(deepcopy=False)[: trial.number]
                twins = [twin for twin in trials if twin.params == parameters]
                if self._space.trials is not None or not any(map(_is_taken, twins)):
                    end = _known(parameters, twins) or score(parameters)
            except BaseException as error:
                raised = error
            if end is None:
                trial.set_user_attr("left", True)
            elif end.score is None:
                trial.set_user_attr("error", end.error)
            else:
                trial.set_user_attr("figures", dict(end.figures or {}))
                return end.score
            return math.nan  # which fails the trial

        self._beat.clear()
        # optuna's errors where somebody took this worker for dead and ended its trial.
        with suppress(ValueError, RuntimeError):
            self._study.optimize(objective, n_trials=1)
        if raised is not None:
            raise raised
        return parameters


def _open(url: str, name: str) -> tuple[optuna.Study, threading.Event]:
    """The study of that name, made where there is none, and what is set by each heartbeat."""
    try:
        import optuna
    except ImportError as error:
        raise SurgeryError(
            "surgery sweep needs optuna: pip install 'wemask-surgery[sweep]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    beat = threading.Event()

    class Beating(optuna.storages.RDBStorage):
        """A storage whose heart does not stop where the database is busy for once."""

        def record_heartbeat(self, trial_id: int) -> None:
            with suppress(optuna.exceptions.StorageInternalError):
                super().record_heartbeat(trial_id)
                beat.set()

    waits = {"connect_args": {"timeout": 60}}
    options = waits if url.startswith("sqlite") else {"pool_pre_ping": True}
    # optuna raises RuntimeError for a database of another version of itself.
    errors: tuple[type[Exception], ...] = (*_errors(), RuntimeError, OSError)
    tries = _TRIES
    while True:
        try:
            storage = Beating(url, dict(options), heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            study = optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            )
            return study, beat
        except errors as error:
            # Two processes that make the tables at the same moment get in each other's way.
            twins = "already exists" in str(error) or "UNIQUE" in str(error).upper()
            tries -= 1
            if not twins or not tries:
                raise _unusable(url, error) from error
        time.sleep(_PAUSE)


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turns what a database says in the block into BadSettings."""
    try:
        yield
    except _errors() as error:
        raise _unusable(url, error) from error


def _errors() -> tuple[type[Exception], ...]:
    import optuna
    import sqlalchemy

    return sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError


def _unusable(url: str, error: BaseException) -> BadSettings:
    import sqlalchemy

    place = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    while error.__cause__ is not None:
        error = error.__cause__
    return BadSettings(f"The study's database {place} cannot be used: {first_line(error)}")


def database(url: str) -> str:
    """The URL with its driver; BadSettings for other databases and where no driver is there."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("sqlite", "postgres", *_POSTGRESQL):
        raise BadSettings(
            "--storage must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE."
        )
    if scheme == "sqlite":
        path = expanded(rest.removeprefix("/"))
        if not rest.startswith("/") or not path.name:
            raise BadSettings("--storage sqlite:///FILE needs a file.")
        if not path.parent.is_dir():
            raise BadSettings(f"--storage names a file in {path.parent}, which is no folder.")
        return f"sqlite:///{path}"
    if "+" in scheme:
        return url
    for name in _POSTGRESQL[1:]:
        if find_spec(name.partition("+")[2]):
            return f"{name}://{rest}"
    raise BadSettings(
        "--storage postgresql://… needs a driver: pip install 'wemask-surgery[postgres]'."
    )


def _key(parameters: Parameters) -> frozenset[tuple[str, Any]]:
    return frozenset(parameters.items())


def _has_ended(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.values is not None or "error" in trial.user_attrs


def _has_worker(trial: optuna.trial.FrozenTrial) -> bool:
    return not trial.state.is_finished() and "worker" in trial.user_attrs


def _has_died(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.is_finished() and not _has_ended(trial) and "left" not in trial.user_attrs


def _is_taken(trial: optuna.trial.FrozenTrial) -> bool:
    return _has_ended(trial) or _has_worker(trial)


def _end_of(trial: optuna.trial.FrozenTrial) -> Ended:
    known = trial.user_attrs
    score = trial.values[0] if trial.values else None
    return Ended(dict(trial.params), score, known.get("figures"), known.get("error"))


def _known(parameters: Parameters, twins: Sequence[optuna.trial.FrozenTrial]) -> Ended | None:
    """How a point ended before, which searches propose again, or that it kills its workers."""
    for twin in twins:
        if _has_ended(twin):
            return _end_of(twin)
    died = sum(map(_has_died, twins))
    if died >= ATTEMPTS:
        return Ended(parameters, None, error=f"the worker died at this point, {died} times")
    return None


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return str(value)
