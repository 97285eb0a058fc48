"""The optuna study behind a sweep: which points there are, who works on which, what came out.

Every change of state happens under one lock, on SQLite a lock on a file beside the database and on
PostgreSQL an advisory lock. Both are released when their holder dies. optuna alone does not
suffice here: its grid sampler hands the same point to two workers that ask at the same moment, and
on SQLite two workers can both take the same waiting trial.
"""

from __future__ import annotations

import os
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings, SurgeryError

if TYPE_CHECKING:
    import optuna

# A worker says every so many seconds that it lives, and counts as dead after so many without.
HEARTBEAT, GRACE = 2, 12
# A point whose worker died so often is given up: it is probably what kills them.
ATTEMPTS = 5

_POSTGRESQL = ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")


@dataclass(frozen=True)
class Space:
    """What may vary, by name: the allowed values.

    search: numbers lie anywhere between their smallest and largest value, rates on a logarithmic
    scale, instead of being one of the values.
    """

    values: Mapping[str, tuple[Any, ...]]
    search: bool

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What optuna calls the values of the grid."""
        import optuna

        return {
            name: optuna.distributions.CategoricalDistribution(values)
            for name, values in self.values.items()
        }

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's parameters: those it has, or what the sampler says."""
        found: dict[str, Any] = {}
        for name, values in self.values.items():
            if self.search and isinstance(values[0], float) and len(values) > 1:
                found[name] = trial.suggest_float(
                    name, min(values), max(values), log=name == "rate"
                )
            else:
                found[name] = trial.suggest_categorical(name, values)
        return found


@dataclass(frozen=True)
class Claim:
    """A point that this worker alone may work on."""

    trial: int
    index: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """A point that has ended: with `figures`, or with an `error` in words."""

    index: int
    parameters: Mapping[str, Any]
    figures: Mapping[str, Any] | None
    error: str | None


@dataclass(frozen=True)
class Progress:
    """How many points have ended, are being worked on, and wait."""

    ended: int
    running: int
    waiting: int

    @property
    def finished(self) -> bool:
        return self.running == 0 and self.waiting == 0


class SharedStudy:
    """A study that any number of processes, on one machine or many, work on together."""

    def __init__(self, url: str, name: str, space: Space, seed: int) -> None:
        """url: sqlite:///FILE or postgresql://…; the study is created where there is none.

        Raises BadSettings where the database cannot be used.
        """
        try:
            import optuna
            import sqlalchemy
        except ImportError as error:
            raise SurgeryError(
                "surgery sweep needs optuna: pip install 'wemask-surgery[sweep]'."
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.name, self._space, self._url, self._seed = name, space, database(url), seed
        arguments: dict[str, Any] = {"pool_pre_ping": True}
        if self._url.startswith("sqlite"):
            arguments = {"connect_args": {"timeout": 60}}
        else:
            self._engine = sqlalchemy.create_engine(self._url, **arguments)
        try:
            with self.locked():
                self._storage = optuna.storages.RDBStorage(
                    self._url,
                    engine_kwargs=arguments,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                )
                self._study = optuna.create_study(
                    storage=self._storage,
                    study_name=name,
                    direction="minimize",
                    load_if_exists=True,
                )
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, OSError) as error:
            # optuna raises RuntimeError for a database of another version of itself.
            first = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            place = sqlalchemy.make_url(self._url).render_as_string(hide_password=True)
            raise BadSettings(f"The study's database {place} cannot be used: {first}") from error

    # ----------------------------------------------------------------------------------------
    # What the study is about
    # ----------------------------------------------------------------------------------------

    def require(self, facts: Mapping[str, Any], where: str) -> None:
        """Record what the study is about; BadSettings where it was about something else."""
        with self.locked():
            known = self._study.user_attrs
            for key, value in facts.items():
                if key in known and known[key] != value:
                    raise BadSettings(
                        f"The study in {where} was made with other settings ({key}: "
                        f"{_words(known[key])} there, {_words(value)} here); give the same, or "
                        "another --output, or another --study."
                    )
            for key, value in facts.items():
                if key not in known:
                    self._study.set_user_attr(key, value)

    def agree(self, key: str, value: Any) -> Any:
        """The first worker's value for a fact, which is `value` where there was none."""
        with self.locked():
            known = self._study.user_attrs
            if key not in known:
                self._study.set_user_attr(key, value)
                return value
            return known[key]

    def fact(self, key: str) -> Any:
        """A recorded fact; None where there is none."""
        return self._study.user_attrs.get(key)

    # ----------------------------------------------------------------------------------------
    # Points
    # ----------------------------------------------------------------------------------------

    def enqueue(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Every point that is not in the study yet waits from now on.

        points: the parameters of each; empty ones are for the sampler to fill.
        """
        with self.locked():
            missing = set(range(len(points))) - {trial.user_attrs["index"] for trial in self._all()}
            for index in sorted(missing):
                self._add(index, points[index], self._space.distributions())
            self._repair()

    def claim(self, like: Mapping[str, Any]) -> Claim | None:
        """A waiting point, now this worker's; None where none waits.

        like: parameters that the point should share if possible, because the worker has what
        they need in memory.
        """
        import optuna

        with self.locked():
            self._repair()
            waiting = self._all(optuna.trial.TrialState.WAITING)
            if not waiting:
                return None
            found = min(waiting, key=lambda trial: (not _shares(trial, like), trial.number))
            number = found._trial_id
            # The heartbeat comes first: a worker that dies between the two lines leaves no
            # running trial without one, which would never count as stale.
            self._storage.record_heartbeat(number)
            self._storage.set_trial_state_values(number, optuna.trial.TrialState.RUNNING)
            index = found.user_attrs["index"]
            # A seed for each point: what is proposed does not depend on which worker asks.
            self._study.sampler = optuna.samplers.TPESampler(
                seed=self._seed + index, constant_liar=True
            )
            trial = optuna.Trial(self._study, number)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            return Claim(number, index, self._space.suggest(trial))

    @contextmanager
    def alive(self, claim: Claim) -> Iterator[None]:
        """Heartbeats for the time of the block; the point is handed back if the block fails."""
        import optuna
        import sqlalchemy

        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                # One beat that a busy database did not take is no death; the next one may pass.
                with suppress(
                    sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError
                ):
                    self._storage.record_heartbeat(claim.trial)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._end(claim, optuna.trial.TrialState.FAIL, None, {"handed_back": True})
            raise
        finally:
            stop.set()
            thread.join()

    def complete(self, claim: Claim, score: float, figures: Mapping[str, Any]) -> None:
        """The point has its figures; dropped when it was given to another worker meanwhile."""
        import optuna

        attributes = {"figures": dict(figures)}
        self._end(claim, optuna.trial.TrialState.COMPLETE, [score], attributes)

    def give_up(self, claim: Claim, error: str) -> None:
        """The point cannot be scored, and trying again would not change that."""
        import optuna

        self._end(claim, optuna.trial.TrialState.FAIL, None, {"error": error})

    def progress(self) -> Progress:
        """How far the study is. Points of dead workers count as waiting."""
        import optuna

        with self.locked():
            self._repair()
            trials = self._all()
        states = Counter(trial.state for trial in trials)
        return Progress(
            len({trial.user_attrs["index"] for trial in trials if _has_ended(trial)}),
            states[optuna.trial.TrialState.RUNNING],
            states[optuna.trial.TrialState.WAITING],
        )

    def ended(self) -> list[Ended]:
        """Every point that has ended, in the order of the points."""
        found = [
            Ended(
                trial.user_attrs["index"],
                dict(trial.params),
                trial.user_attrs.get("figures") if trial.values else None,
                trial.user_attrs.get("error"),
            )
            for trial in self._all()
            if _has_ended(trial)
        ]
        return sorted(found, key=lambda end: end.index)

    def _end(
        self,
        claim: Claim,
        state: optuna.trial.TrialState,
        values: Sequence[float] | None,
        attributes: Mapping[str, Any],
    ) -> None:
        import optuna

        with self.locked():
            if self._storage.get_trial(claim.trial).state != optuna.trial.TrialState.RUNNING:
                return  # it counted as dead, and another worker has the point
            for key, value in attributes.items():
                self._storage.set_trial_user_attr(claim.trial, key, value)
            self._storage.set_trial_state_values(claim.trial, state, values)
            self._repair()

    def _repair(self) -> None:
        """Points that no worker has, and that have not ended, wait again. Needs the lock.

        optuna has a callback for this, which is not called when the process that notices a dead
        worker dies itself; here the next one to look repairs that too.
        """
        import optuna

        optuna.storages.fail_stale_trials(self._study)
        trials = self._all()
        live = {trial.user_attrs["index"] for trial in trials if _is_live(trial)}
        for trial in trials:
            index = trial.user_attrs["index"]
            if index in live:
                continue
            live.add(index)
            died = [
                other
                for other in trials
                if other.user_attrs["index"] == index and "handed_back" not in other.user_attrs
            ]
            error = None
            if len(died) >= ATTEMPTS:
                error = f"the worker died at this point, {len(died)} times"
            self._add(index, trial.params, trial.distributions, error)

    def _add(
        self,
        index: int,
        parameters: Mapping[str, Any],
        distributions: Mapping[str, optuna.distributions.BaseDistribution],
        error: str | None = None,
    ) -> None:
        """A trial that waits, or one that has ended with an error.

        Not by enqueue_trial, which would leave the parameters to be written one by one.
        """
        import optuna

        states = optuna.trial.TrialState
        self._study.add_trial(
            optuna.trial.create_trial(
                state=states.WAITING if error is None else states.FAIL,
                params=dict(parameters),
                distributions={name: distributions[name] for name in parameters},
                user_attrs={"index": index} if error is None else {"index": index, "error": error},
            )
        )

    def _all(self, *states: optuna.trial.TrialState) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that work on this study."""
        if self._url.startswith("sqlite"):
            import filelock

            with filelock.FileLock(f"{self._url.removeprefix('sqlite:///')}.lock"):
                yield
            return
        import sqlalchemy

        with self._engine.begin() as connection:
            # One lock for all studies of a database: making its tables concerns all of them.
            connection.execute(
                sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtext('surgery sweep'))")
            )
            yield


def database(url: str) -> str:
    """The URL with its driver; BadSettings for other databases and where no driver is there."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("sqlite", "postgres", *_POSTGRESQL):
        raise BadSettings(
            "--storage must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE."
        )
    if scheme == "sqlite":
        path = Path(rest.removeprefix("/"))
        if not rest.startswith("/") or not path.name:
            raise BadSettings("--storage sqlite:///FILE needs a file.")
        if not path.parent.is_dir():
            raise BadSettings(f"--storage names a file in {path.parent}, which is no folder.")
        return url
    if "+" in scheme:
        return url
    for name in _POSTGRESQL[1:]:
        if find_spec(name.partition("+")[2]):
            return f"{name}://{rest}"
    raise BadSettings(
        "--storage postgresql://… needs a driver: pip install 'wemask-surgery[postgres]'."
    )


def _shares(trial: optuna.trial.FrozenTrial, like: Mapping[str, Any]) -> bool:
    return bool(like) and all(trial.params.get(key) == value for key, value in like.items())


def _has_ended(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.values is not None or "error" in trial.user_attrs


def _is_live(trial: optuna.trial.FrozenTrial) -> bool:
    return not trial.state.is_finished() or _has_ended(trial)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return str(value)
