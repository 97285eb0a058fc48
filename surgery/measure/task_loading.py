"""Tasks of lm-evaluation-harness by name, with their documents, ready to run."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import BadSettings, SurgeryError, first_line
from surgery.files.paths import expanded
from surgery.files.resources import resource_folder
from surgery.measure.task_settings import GSM8K_NEW_TOKENS, MAX_NEW_TOKENS, TaskSettings
from surgery.reporter import Reporter

logger = logging.getLogger(__name__)

# What a task may call the limit of new tokens.
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks ready to run.

    Attributes:
        settings: that they are run with.
        rows: of the results: name and leaf tasks, a group that aggregates being one row.
        tasks: the harness's own, by name.
        sampled: names of those that sample, so that seeds matter.
        notes: what was left out.
        manager: the harness's index, which takes it seconds to build.
    """

    settings: TaskSettings
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    tasks: Mapping[str, Any]
    sampled: frozenset[str]
    notes: tuple[str, ...] = ()
    manager: Any = None


def load_tasks(settings: TaskSettings, reporter: Reporter) -> LoadedTasks:
    """The tasks a user named, with their documents, and what they are to be run with.

    Raises:
        BadSettings: for a name that is none.
        SurgeryError: where documents cannot be had.
    """
    reporter.say("Loading tasks")
    shipped = resource_folder("recipes") / "tasks"
    folders = [Path(name) for name in settings.tasks if Path(name).is_dir()]
    beside = [Path(name).parent for name in settings.tasks if Path(name).is_file()]
    paths = [str(path) for path in dict.fromkeys((shipped, *folders, *beside))]
    notes: list[str] = []
    with hushed(reporter):
        manager = _manager(paths, settings, defaults=False)
        names = _names(manager, settings, folders)
        if any(name not in manager.task_index and not Path(name).is_file() for name in names):
            manager = _manager(paths, settings, defaults=True)
        rows: list[tuple[str, tuple[str, ...]]] = []
        tasks: dict[str, Any] = {}
        for name in names:
            for part in _available(manager, name, shipped, settings, notes):
                loaded = _load(manager, part)
                tasks.update(loaded["tasks"])
                rows += _rows(loaded)
    sampled = frozenset(name for name, task in tasks.items() if configure(name, task, settings))
    if settings.thinking:
        scored = [n for n, task in tasks.items() if not generates(task)]
        if scored:
            raise BadSettings(
                f"--thinking is for tasks that generate; {scored[0]} compares the likelihood of "
                "given answers."
            )
    kept = tuple(dict.fromkeys(rows))
    logger.info("%d tasks in %d rows", len(tasks), len(kept))
    return LoadedTasks(settings, kept, tasks, sampled, tuple(notes), manager)


def _manager(paths: list[str], settings: TaskSettings, *, defaults: bool) -> Any:
    """The harness's index of tasks; with its own ones it takes several seconds."""
    from lm_eval.tasks import TaskManager  # an extra; imports datasets

    data = {"data": str(expanded(settings.data).resolve())} if settings.data else {}
    return TaskManager(include_path=paths, include_defaults=defaults, metadata=data)


def _names(manager: Any, settings: TaskSettings, folders: Sequence[Path]) -> list[str]:
    """Task names and files, folders replaced by what they define."""
    found: list[str] = []
    for name in settings.tasks:
        if Path(name) not in folders:
            found.append(name)
            continue
        root = Path(name).resolve()
        inside = {
            key: entry
            for key, entry in manager.task_index.items()
            if entry.yaml_path and root in Path(entry.yaml_path).resolve().parents
        }
        members = {
            str(member)
            for entry in inside.values()
            if isinstance((entry.cfg or {}).get("task"), list)
            for member in (entry.cfg or {})["task"]
        }
        outer = [key for key in inside if key not in members]
        if not outer:
            raise BadSettings(f"The folder {name} holds no task that lm-evaluation-harness reads.")
        found += sorted(outer)
    return found


def _available(
    manager: Any, name: str, shipped: Path, settings: TaskSettings, notes: list[str]
) -> list[str]:
    """A shipped group's tasks whose documents are in the local folder; any other name itself."""
    entry = manager.task_index.get(name)
    if settings.data is None or entry is None or entry.yaml_path is None:
        return [name]
    if Path(entry.yaml_path).resolve().parent != shipped.resolve():
        return [name]
    members = entry.cfg["task"] if isinstance(entry.cfg.get("task"), list) else [name]
    here: list[tuple[str, str]] = []
    lacking: list[tuple[str, str]] = []
    for member in members:
        file = manager.task_index[member].cfg["dataset_kwargs"]["file"]
        (here if (expanded(settings.data) / file).is_file() else lacking).append((member, file))
    if not here:
        raise BadSettings(f"--data {settings.data} has no {lacking[0][1]}, which {name} needs.")
    if lacking:
        left = ", ".join(member for member, _ in lacking)
        notes.append(f"Left out of {name}, because their files are not in --data: {left}.")
    return [member for member, _ in here]


def _load(manager: Any, name: str) -> Any:
    known = name in manager.task_index or Path(name).is_file()
    if not known:
        raise BadSettings(
            f"There is no task or group named {name!r}, here or in lm-evaluation-harness; "
            "`lm-eval ls tasks` lists its names."
        )
    try:
        return manager.load([name])
    except Exception as error:
        # Whatever a task file, the Hub or the network makes of it.
        raise SurgeryError(f"The task {name} cannot be loaded: {first_line(error)}") from error


def _rows(loaded: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Rows of results: a group that aggregates is one, other groups are their members."""
    groups, members = loaded.get("groups") or {}, loaded.get("group_map") or {}

    def walk(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        group = groups.get(name)
        if group is None:
            yield name, (name,)
        elif group.aggregate_metric_list:
            yield name, tuple(task.task_name for task in group.get_all_tasks())
        else:
            for member in members[name]:
                yield from walk(member)

    inner = {member for names in members.values() for member in names}
    leaves = [name for name in loaded["tasks"] if name not in inner]
    outer = [name for name in groups if name not in inner]
    return [row for name in (*outer, *leaves) for row in walk(name)]


def generates(task: Any) -> bool:
    """Whether a task has the model write an answer, instead of comparing likelihoods."""
    return bool(task.get_config("output_type") == "generate_until")


def configure(name: str, task: Any, settings: TaskSettings) -> bool:
    """Set a task's limits and temperature; whether it samples, so that seeds matter."""
    task.set_config(key="num_fewshot", value=0)
    if not generates(task):
        return False
    options = {
        key: value
        for key, value in (task.get_config("generation_kwargs") or {}).items()
        if key not in _TOKEN_LIMITS
    }
    default = GSM8K_NEW_TOKENS if "gsm8k" in name.lower() else MAX_NEW_TOKENS
    options["max_gen_toks"] = settings.max_new_tokens or default
    if settings.temperature == 0:
        options = {key: value for key, value in options.items() if key not in ("top_p", "top_k")}
        options |= {"do_sample": False, "temperature": 0.0}
    elif settings.temperature is not None:
        options |= {"do_sample": True, "temperature": settings.temperature}
    task.set_config(key="generation_kwargs", value=options)
    temperature = float(options.get("temperature", 0.0) or 0.0)
    return bool(options.get("do_sample", temperature > 0)) and temperature > 0


@contextmanager
def hushed(reporter: Reporter) -> Iterator[None]:
    """The harness speaks on stderr only, so that stdout stays JSON; not at all when silent."""
    from surgery.models.loading import quiet  # imports torch

    silent = getattr(reporter, "silent", True)
    sink: Any = io.StringIO() if silent else sys.stderr
    before = logging.root.manager.disable
    with quiet(), redirect_stdout(sink), redirect_stderr(sink) if silent else nullcontext():
        try:
            yield
        finally:
            logging.disable(before)
