"""Benchmark tasks, run by lm-evaluation-harness on every model under one recorded configuration.

The scores are the harness's own: each model is handed to `simple_evaluate`, and the per-document
results it logs are paired by document here. Under `accelerate launch` every process takes its
share of the documents, and the first one reports.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings, SurgeryError, first_line
from surgery.files.checkpoint import Checkpoint
from surgery.files.resources import resource_folder
from surgery.measure.statistics import Difference, over_seeds, paired, score
from surgery.method.mask import Mask
from surgery.models.anatomy import Anatomy
from surgery.reporter import Reporter
from surgery.settings import Settings, option

if TYPE_CHECKING:
    from collections.abc import Mapping

# The paper's limits on generated tokens (§5.1).
MAX_NEW_TOKENS, GSM8K_NEW_TOKENS = 512, 128
SEEDS = (0, 1, 2)
CPU_BATCH = "8"
END_OF_THOUGHT = "</think>"
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run; every field is an option of `compare` and `sweep`.

    Attributes:
        tasks: names of lm-evaluation-harness, ours, or YAML files.
        data: a folder with local copies of the documents.
        limit: documents per task.
        batch_size: a number or "auto"; None: auto on a GPU, 8 on the CPU.
        seeds: for tasks that sample; the first one for all others.
        max_new_tokens: None for the paper's 512, and 128 for GSM8K.
        temperature: None for each task's own; 0 is greedy.
        chat_template: None for "where the tokenizer has one".
        thinking: the template's `enable_thinking`.
        backend: what runs the models.
    """

    tasks: tuple[str, ...] = option(
        (),
        "knowledge, math, safety, any name of lm-evaluation-harness, or YAML files and folders.",
        metavar="LIST",
    )
    data: str | None = option(None, "Local documents for the shipped tasks.", metavar="DIR")
    limit: int | None = option(None, "Documents per task.")
    batch_size: str | None = option(None, "A number or auto.  [default: auto; 8 on the CPU]")
    seeds: tuple[int, ...] = option(SEEDS, "For sampling tasks.")
    max_new_tokens: int | None = option(
        None, "Per generation.  [default: 512; GSM8K 128, as the paper]"
    )
    temperature: float | None = option(
        None, "For all generations; 0 is greedy.  [default: the task's]"
    )
    chat_template: bool | None = option(
        None,
        "Pose tasks as chat.  [default: where the tokenizer has a template]",
        name="--chat-template/--no-chat-template",
    )
    thinking: bool = option(
        False, "The template's enable_thinking.", name="--thinking/--no-thinking"
    )
    backend: str = option(
        "hf",
        "What runs the tasks; vllm runs checkpoints only, not the reference.",
        choices=("hf", "vllm"),
    )

    def __post_init__(self) -> None:
        """Raise BadSettings for values that make no sense."""
        if self.limit is not None and self.limit < 1:
            raise BadSettings("--limit must be at least 1.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise BadSettings("--max-new-tokens must be at least 1.")
        if self.temperature is not None and not 0 <= self.temperature <= 10:
            raise BadSettings("--temperature must be between 0 (greedy) and 10.")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise BadSettings("--seeds must be different numbers that are not negative.")
        if self.batch_size not in (None, "auto") and not (
            str(self.batch_size).isdigit() and int(str(self.batch_size)) > 0
        ):
            raise BadSettings("--batch-size must be a number or auto.")
        if self.data is not None and not Path(self.data).is_dir():
            raise BadSettings(f"--data {self.data} is not a folder.")
        if self.backend not in ("hf", "vllm"):
            raise BadSettings("--backend must be hf or vllm.")
        if self.backend == "vllm" and find_spec("vllm") is None:
            raise BadSettings(
                "--backend vllm needs vllm, which is not installed; run: pip install vllm, or use "
                "--backend hf."
            )


@dataclass(frozen=True)
class VariantScore:
    """One model on one task.

    mean: over documents (and seeds), with its standard error over documents;
    seed_standard_deviation: of the seeds' means, None for a task that seeds do not change.
    truncated: share of generations that hit the limit of new tokens. difference: against base.
    """

    mean: float
    standard_error: float
    by_seed: tuple[float, ...]
    seed_standard_deviation: float | None
    truncated: float | None
    difference: Difference | None


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task, on every model.

    n: documents, of `available`. seeds: those that were run; deterministic: seeds change nothing,
    so one was run. filter: which of the harness's answer filters the scores are of. dataset:
    where the documents come from. hashes, scores: per document, for pairing again.
    """

    task: str
    metric: str
    higher_is_better: bool
    filter: str
    n: int
    available: int
    deterministic: bool
    seeds: tuple[int, ...]
    max_new_tokens: int | None
    dataset: dict[str, Any]
    variants: dict[str, VariantScore]
    hashes: tuple[str, ...] = ()
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks ready to run. rows: (name, leaf tasks), a group that aggregates being one row.

    manager: the harness's index, which takes it seconds to build.
    """

    settings: TaskSettings
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    tasks: Mapping[str, Any]
    sampled: frozenset[str]
    notes: tuple[str, ...] = ()
    manager: Any = None


def task_settings(tasks: Sequence[str], options: Mapping[str, Any]) -> TaskSettings | None:
    """What a user asked for, None without tasks; raises where the harness is missing."""
    if not tasks:
        return None
    require_harness()
    return TaskSettings(tasks=tuple(tasks), **options)


def require_harness() -> None:
    """Raise SurgeryError, saying what to install, where lm-evaluation-harness is missing."""
    needed = ("lm_eval", "datasets", "scipy", "accelerate", "peft")
    lacking = [name for name in needed if find_spec(name) is None]
    if lacking:
        raise SurgeryError(
            f"--tasks needs lm-evaluation-harness ({lacking[0]} is not installed); run: "
            "pip install 'wemask-surgery[eval]'."
        )


# --------------------------------------------------------------------------------------------
# Finding tasks
# --------------------------------------------------------------------------------------------


def load_tasks(settings: TaskSettings, reporter: Reporter) -> LoadedTasks:
    """The tasks a user named, with their documents, and what they are to be run with.

    Raises BadSettings for a name that is none, SurgeryError where documents cannot be had.
    """
    reporter.say("Loading tasks")
    shipped = resource_folder("recipes") / "tasks"
    folders = [Path(name) for name in settings.tasks if Path(name).is_dir()]
    files = [Path(name) for name in settings.tasks if Path(name).is_file()]
    notes: list[str] = []
    with _hushed(reporter):
        manager = _manager(shipped, [*folders, *(file.parent for file in files)], settings, False)
        names = _names(manager, settings, folders)
        if any(name not in manager.task_index and not Path(name).is_file() for name in names):
            manager = _manager(shipped, [*folders, *(f.parent for f in files)], settings, True)
        rows: list[tuple[str, tuple[str, ...]]] = []
        tasks: dict[str, Any] = {}
        for name in names:
            for part in _available(manager, name, shipped, settings, notes):
                loaded = _load(manager, part)
                tasks.update(loaded["tasks"])
                rows += _rows(loaded)
    sampled = frozenset(name for name, task in tasks.items() if _configure(name, task, settings))
    if settings.thinking:
        scored = [n for n, task in tasks.items() if not _generates(task)]
        if scored:
            raise BadSettings(
                f"--thinking is for tasks that generate; {scored[0]} compares the likelihood of "
                "given answers."
            )
    kept = tuple(dict.fromkeys(rows))
    return LoadedTasks(settings, kept, tasks, sampled, tuple(notes), manager)


def _manager(shipped: Path, folders: Sequence[Path], settings: TaskSettings, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    data = {"data": str(Path(settings.data).resolve())} if settings.data else {}
    paths = [str(path) for path in dict.fromkeys((shipped, *folders))]
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
        (here if (Path(settings.data) / file).is_file() else lacking).append((member, file))
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


def _generates(task: Any) -> bool:
    return bool(task.get_config("output_type") == "generate_until")


def _configure(name: str, task: Any, settings: TaskSettings) -> bool:
    """Set a task's limits and temperature; whether it samples, so that seeds matter."""
    task.set_config(key="num_fewshot", value=0)
    if not _generates(task):
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


# --------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What one model gave: per leaf task and seed, the harness's per-document records."""

    samples: dict[str, list[list[dict[str, Any]]]]
    truncated: dict[str, float | None]


def run_tasks(
    loaded: LoadedTasks,
    subject: Subject,
    anatomy: Anatomy | None,
    references: Mapping[str, Mask],
    edited: Sequence[tuple[str, Checkpoint]],
    settings: Settings,
    reporter: Reporter,
    notes: list[str],
) -> tuple[tuple[TaskRow, ...], dict[str, Any]]:
    """All tasks on base, references and edited checkpoints, one model in memory at a time.

    Returns the rows and the configuration that all models ran under. Under `accelerate launch`
    only the first process gets rows.
    """
    from surgery.models.reference import masked

    options = loaded.settings
    host, recorded = _host(loaded, subject, settings, reporter)
    runs: dict[str, _Run] = {}
    with host.model(subject.checkpoint, notes) as lm:
        runs["base"] = host.run("base", lm, nullcontext)
        for name, mask in references.items():
            if options.backend == "vllm":
                notes.append("vLLM takes no hooks, so the reference did not run the tasks.")
                break

            assert anatomy is not None
            runs[name] = host.run(name, lm, partial(masked, lm.model, anatomy, mask))
    subject.release()
    for name, checkpoint in edited:
        lm = None  # one model at a time
        with host.model(checkpoint, notes) as lm:
            runs[name] = host.run(name, lm, nullcontext)
    if any(run.samples == {} for run in runs.values()):
        return (), recorded
    rows = tuple(row for name, leaves in loaded.rows for row in _score(name, leaves, loaded, runs))
    deterministic = sorted({row.task for row in rows if row.deterministic})
    if deterministic and len(options.seeds) > 1:
        notes.append(
            f"Seeds change nothing in {', '.join(deterministic)} (no sampling), so these ran once "
            "and have no deviation over seeds."
        )
    compared = sum(len(row.variants) - 1 for row in rows)
    if compared > 1:
        notes.append(
            f"{compared} differences were tested at 95 % each: about {compared * 0.05:.1g} would "
            "be called better or worse by chance alone."
        )
    return rows, recorded


class TaskScorer:
    """Tasks on one loaded model: as it is, and under edits in memory."""

    def __init__(
        self, options: TaskSettings, subject: Subject, settings: Settings, reporter: Reporter
    ) -> None:
        """Runs the tasks on the model as it is; every edit is compared with that."""
        self._loaded, self._subject = load_tasks(options, reporter), subject
        self._host, self.configuration = _host(self._loaded, subject, settings, reporter)
        self._base = self._run("base", nullcontext)

    def score(self, context: Callable[[], AbstractContextManager[Any]]) -> tuple[TaskRow, ...]:
        """Rows of "base" and "edited", which is the model within the context."""
        runs = {"base": self._base, "edited": self._run("edited", context)}
        return tuple(
            row
            for name, leaves in self._loaded.rows
            for row in _score(name, leaves, self._loaded, runs)
        )

    @property
    def documents(self) -> str:
        """sha256 over the documents that were run, which other workers must run too."""
        found = {
            task: [document["doc_hash"] for document in runs[0]]
            for task, runs in sorted(self._base.samples.items())
        }
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _run(self, name: str, context: Callable[[], AbstractContextManager[Any]]) -> _Run:
        with self._host.model(self._subject.checkpoint, []) as lm:
            return self._host.run(name, lm, context)


def _host(
    loaded: LoadedTasks, subject: Subject, settings: Settings, reporter: Reporter
) -> tuple[_Host, dict[str, Any]]:
    """What hands models to the harness, and the configuration that all of them run under."""
    options, tokenizer = loaded.settings, subject.tokenizer
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if options.chat_template and not has_template:
        raise BadSettings("--chat-template was given, but the base's tokenizer has no template.")
    template = has_template if options.chat_template is None else options.chat_template
    on_cpu = subject.device.type == "cpu"
    batch = options.batch_size or (CPU_BATCH if on_cpu and options.backend == "hf" else "auto")
    recorded = _recorded(loaded, template, tokenizer, batch)
    return _Host(loaded, subject, settings, batch, template, reporter), recorded


def _recorded(loaded: LoadedTasks, template: bool, tokenizer: Any, batch: str) -> dict[str, Any]:
    kept = asdict(loaded.settings)
    # A folder of this machine says nothing elsewhere, that it was a local one does.
    kept["data"] = "local folder" if loaded.settings.data else None
    kept["tasks"] = [name for name, _ in loaded.rows]
    kept |= {"chat_template": template, "batch_size": batch, "few_shot_examples": 0}
    if template:
        text = str(tokenizer.chat_template)
        kept["chat_template_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    kept["generation"] = {
        name: dict(task.get_config("generation_kwargs"))
        for name, task in loaded.tasks.items()
        if _generates(task)
    }
    return kept


class _Host:
    """Hands models to the harness, all of them with the base's tokenizer and configuration."""

    def __init__(
        self,
        loaded: LoadedTasks,
        subject: Subject,
        settings: Settings,
        batch: str,
        template: bool,
        reporter: Reporter,
    ) -> None:
        self._loaded, self._subject, self._settings = loaded, subject, settings
        self._batch, self._template, self._reporter = batch, template, reporter
        self._thinking = loaded.settings.thinking
        self._generation: Any = None
        self._several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    @contextmanager
    def model(self, checkpoint: Checkpoint, notes: list[str]) -> Iterator[Any]:
        """A checkpoint as the harness's own kind of model."""
        base = checkpoint is self._subject.checkpoint
        options: dict[str, Any] = {"batch_size": self._batch}
        if self._template:
            options["enable_thinking"] = self._thinking
        if self._thinking:
            options["think_end_token"] = END_OF_THOUGHT
        with _hushed(self._reporter):
            if self._loaded.settings.backend == "vllm":
                lm = _counting_vllm()(
                    pretrained=str(checkpoint.folder),
                    tokenizer=str(self._subject.checkpoint.folder),
                    dtype=self._settings.dtype,
                    trust_remote_code=self._settings.trust_remote_code,
                    **options,
                )
            else:
                lm = self._transformers(checkpoint, base, options)
                self._same_generation(lm.model, checkpoint, notes)
        try:
            yield lm
        finally:
            _free_memory()

    def _transformers(self, checkpoint: Checkpoint, base: bool, options: dict[str, Any]) -> Any:
        from surgery.models.loading import load_model, require_finite

        settings, device = self._settings, self._subject.device
        if self._several:
            # The harness places and shards a model that it loads itself.
            source: Any = str(checkpoint.folder)
            options |= {
                "dtype": settings.dtype,
                "trust_remote_code": settings.trust_remote_code,
                "device": str(device),
            }
        elif base:
            source = self._subject.model
        else:
            source = load_model(
                checkpoint.folder,
                dtype=settings.dtype,
                device=device,
                trust_remote_code=settings.trust_remote_code,
            )
            require_finite(source)
        kind = _counting_transformers()
        return kind(
            pretrained=source, tokenizer=self._subject.tokenizer, backend="causal", **options
        )

    def _same_generation(self, model: Any, checkpoint: Checkpoint, notes: list[str]) -> None:
        """Defaults of generation come from the base, for every model."""
        own = getattr(model, "generation_config", None)
        if own is None:
            return
        if self._generation is None:
            self._generation = own
            return

        def content(config: Any) -> dict[str, Any]:
            return {key: value for key, value in config.to_dict().items() if key[0] != "_"}

        if content(own) != content(self._generation):
            notes.append(
                f"{checkpoint.origin.name} has another generation_config.json than the base; the "
                "base's was used for both."
            )
        model.generation_config = self._generation

    def run(self, name: str, lm: Any, context: Callable[[], AbstractContextManager[Any]]) -> _Run:
        """Every task on one model: sampled ones once per seed, the others once."""
        loaded, options = self._loaded, self._loaded.settings
        found = _Run({}, {})
        once = [task for name, task in loaded.tasks.items() if name not in loaded.sampled]
        often = [task for name, task in loaded.tasks.items() if name in loaded.sampled]
        plan = ([(options.seeds[0], once)] if once else []) + [
            (seed, often) for seed in options.seeds if often
        ]
        hits: dict[str, list[bool | None]] = {}
        for number, (seed, tasks) in enumerate(plan, 1):
            self._reporter.say(f"Running tasks on {name} ({number} of {len(plan)}, seed {seed})")
            with _hushed(self._reporter), context():
                samples = self._evaluate(lm, tasks, seed)
            for task, documents in (samples or {}).items():
                found.samples.setdefault(task, []).append(documents)
                if _generates(loaded.tasks[task]):
                    hits.setdefault(task, []).extend(
                        lm.hit_the_limit(document["arguments"][0][0]) for document in documents
                    )
        for task, flags in hits.items():
            known = [flag for flag in flags if flag is not None]
            found.truncated[task] = sum(known) / len(known) if known else None
        return found

    def _evaluate(self, lm: Any, tasks: list[Any], seed: int) -> Any:
        from lm_eval import evaluator, simple_evaluate

        # It asks git about the current folder, and git may answer on the user's terminal.
        evaluator.get_git_commit_hash = lambda: None
        if self._loaded.settings.backend == "vllm":
            # vLLM's sampler has a seed of its own, per request.
            for task in tasks:
                if _generates(task):
                    task.set_config(key="generation_kwargs", value={"seed": seed}, update=True)
        try:
            result = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                num_fewshot=0,
                limit=self._loaded.settings.limit,
                apply_chat_template=self._template,
                task_manager=self._loaded.manager,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except SurgeryError:
            raise
        except Exception as error:
            names = ", ".join(str(task.config.task) for task in tasks[:3])
            raise SurgeryError(
                f"lm-evaluation-harness failed on {names}: {first_line(error)}"
            ) from error
        return result["samples"] if result is not None else None


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _counting_transformers() -> type:
    """The harness's transformers model, which also tells whose generation hit the limit."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        """Same results; remembers by prompt whether the generation ended by itself."""

        def hit_the_limit(self, prompt: str) -> bool | None:
            return self.__dict__.get("_hits", {}).get(prompt)

        def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
            self._prompts = list(strings)
            return super().tok_batch_encode(strings, *args, **kwargs)

        def _model_generate(
            self, context: Any, max_length: int, stop: list[str], **kwargs: Any
        ) -> Any:
            result = super()._model_generate(
                context=context, max_length=max_length, stop=stop, **kwargs
            )
            hits = self.__dict__.setdefault("_hits", {})
            ends = self._ends()
            for prompt, tokens in zip(self._prompts, result.tolist(), strict=True):
                new = tokens[context.shape[1] :]
                full = len(tokens) >= max_length and ends.isdisjoint(new)
                if full and stop:
                    text = self.tok_decode(new)
                    full = not any(word and word in text for word in stop)
                hits[prompt] = full
            return result

        def _ends(self) -> set[int]:
            eos = getattr(self.model.generation_config, "eos_token_id", None)
            found = set(eos if isinstance(eos, list) else [eos])
            return {token for token in {*found, self.eot_token_id} if token is not None}

    return Counting


def _counting_vllm() -> type:
    """The same for vLLM, which says by itself why a generation ended."""
    from lm_eval.models.vllm_causallms import VLLM

    class Counting(VLLM):
        """Same results; remembers by prompt why the generation ended."""

        def hit_the_limit(self, prompt: str) -> bool | None:
            tokens = tuple(self.tok_encode(prompt))
            return self.__dict__.get("_hits", {}).get(tokens)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            results = super()._model_generate(*args, **kwargs)
            hits = self.__dict__.setdefault("_hits", {})
            for result in results:
                hits[tuple(result.prompt_token_ids)] = result.outputs[0].finish_reason == "length"
            return results

    return Counting


@contextmanager
def _hushed(reporter: Reporter) -> Iterator[None]:
    """The harness speaks on stderr only, so that stdout stays JSON; not at all when silent."""
    from surgery.models.loading import quiet

    silent = getattr(reporter, "silent", True)
    sink: Any = io.StringIO() if silent else sys.stderr
    before = logging.root.manager.disable
    with quiet(), redirect_stdout(sink), redirect_stderr(sink) if silent else nullcontext():
        try:
            yield
        finally:
            logging.disable(before)


# --------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------


def _score(
    name: str, leaves: Sequence[str], loaded: LoadedTasks, runs: Mapping[str, _Run]
) -> Iterator[TaskRow]:
    """One row per metric whose aggregate is the mean over documents."""
    first = loaded.tasks[leaves[0]]
    chosen = _filter(runs["base"].samples[leaves[0]][0])
    documents = runs["base"].samples[leaves[0]][0]
    sample = next(document for document in documents if document["filter"] == chosen)
    means = {
        metric
        for metric, function in first.aggregation().items()
        if getattr(function, "__name__", "") == "mean"
    }
    directions = first.higher_is_better()
    sampled = any(leaf in loaded.sampled for leaf in leaves)
    limits = [loaded.tasks[leaf].get_config("generation_kwargs") or {} for leaf in leaves]
    for metric in sample["metrics"]:
        if metric not in means or not _is_number(sample[metric]):
            continue
        scores: dict[str, list[list[float]]] = {}
        hashes: tuple[str, ...] = ()
        for variant, run in runs.items():
            by_seed = _by_document(leaves, run, chosen, metric)
            order = sorted(by_seed[0])
            found = tuple(by_seed[0][key][0] for key in order)
            if hashes and found != hashes:
                raise SurgeryError(
                    f"The documents of {name} changed between two models; run it again."
                )
            hashes = found
            scores[variant] = [[seed[key][1] for key in order] for seed in by_seed]
        averaged = {
            variant: tuple(sum(column) / len(column) for column in zip(*by_seed, strict=True))
            for variant, by_seed in scores.items()
        }
        higher = directions.get(metric) is not False
        yield TaskRow(
            task=name,
            metric=metric,
            higher_is_better=higher,
            filter=chosen,
            n=len(hashes),
            available=sum(len(loaded.tasks[leaf].eval_docs) for leaf in leaves),
            deterministic=not sampled,
            seeds=loaded.settings.seeds if sampled else loaded.settings.seeds[:1],
            max_new_tokens=limits[0].get("max_gen_toks"),
            dataset=_dataset(first, loaded.settings),
            variants={
                variant: _variant_score(
                    variant, scores[variant], averaged, _truncation(leaves, runs[variant]), higher
                )
                for variant in runs
            },
            hashes=hashes,
            scores=averaged,
        )


def _variant_score(
    variant: str,
    by_seed: list[list[float]],
    averaged: Mapping[str, tuple[float, ...]],
    truncated: float | None,
    higher: bool,
) -> VariantScore:
    summary = score(averaged[variant])
    means = [sum(values) / len(values) for values in by_seed]
    difference = None
    if variant != "base":
        difference = paired(averaged["base"], averaged[variant], higher_is_better=higher)
    return VariantScore(
        summary.mean, summary.standard_error, tuple(means), over_seeds(means)[1], truncated,
        difference,
    )  # fmt: skip


def _truncation(leaves: Sequence[str], run: _Run) -> float | None:
    known = [run.truncated[leaf] for leaf in leaves if run.truncated.get(leaf) is not None]
    return sum(share for share in known if share is not None) / len(known) if known else None


def _filter(documents: Sequence[Mapping[str, Any]]) -> str:
    """One of a task's answer filters: the tolerant one where it has several."""
    names = list(dict.fromkeys(str(document["filter"]) for document in documents))
    return "flexible-extract" if "flexible-extract" in names else names[0]


def _is_number(value: Any) -> bool:
    import numpy as np

    return isinstance(value, bool | int | float | np.number | np.bool_)


def _by_document(
    leaves: Sequence[str], run: _Run, chosen: str, metric: str
) -> list[dict[tuple[str, int], tuple[str, float]]]:
    """Per seed: hash and score by (task, document)."""
    seeds = max(len(run.samples[leaf]) for leaf in leaves)
    found: list[dict[tuple[str, int], tuple[str, float]]] = [{} for _ in range(seeds)]
    for leaf in leaves:
        for seed, documents in enumerate(run.samples[leaf]):
            for document in documents:
                if document["filter"] == chosen and metric in document:
                    key = leaf, int(document["doc_id"])
                    found[seed][key] = str(document["doc_hash"]), float(document[metric])
    return found


def _dataset(task: Any, settings: TaskSettings) -> dict[str, Any]:
    """Where documents come from, for the results file and the card."""
    config = task.config
    ours = config.dataset_kwargs or {}
    local = settings.data is not None and "hub" in ours
    return {
        "path": ours.get("hub") or config.dataset_path or str(config.task),
        "config": ours.get("config") or config.dataset_name,
        "split": ours.get("split") or config.test_split or config.validation_split,
        "local_file": ours.get("file") if local else None,
    }
