"""Hands models to the harness, all of them with the base's tokenizer and configuration."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
)
from dataclasses import asdict
from typing import Any

from surgery.errors import BadSettings, SurgeryError, first_line
from surgery.files.checkpoint import Checkpoint
from surgery.measure.task_loading import LoadedTasks, generates, hushed
from surgery.measure.task_models import counting_transformers, counting_vllm, free_memory
from surgery.measure.task_scores import Run
from surgery.patient.patient import Patient
from surgery.reporter import Reporter

CPU_BATCH = "8"
END_OF_THOUGHT = "</think>"


def make_host(
    loaded: LoadedTasks, patient: Patient, reporter: Reporter
) -> tuple[Host, dict[str, Any]]:
    """What hands models to the harness, and the configuration that all of them run under."""
    options, tokenizer = loaded.settings, patient.tokenizer
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if options.chat_template and not has_template:
        raise BadSettings("--chat-template was given, but the base's tokenizer has no template.")
    template = has_template if options.chat_template is None else options.chat_template
    on_cpu = patient.device.type == "cpu"
    batch = options.batch_size or (CPU_BATCH if on_cpu and options.backend == "hf" else "auto")
    recorded = recorded_settings(loaded, template, tokenizer, batch)
    return Host(loaded, patient, batch, template, reporter), recorded


def recorded_settings(
    loaded: LoadedTasks, template: bool, tokenizer: Any, batch: str
) -> dict[str, Any]:
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
        if generates(task)
    }
    return kept


class Host:
    """Hands models to the harness, all of them with the base's tokenizer and configuration."""

    def __init__(
        self,
        loaded: LoadedTasks,
        patient: Patient,
        batch: str,
        template: bool,
        reporter: Reporter,
    ) -> None:
        self._loaded, self._patient, self._loading = loaded, patient, patient.loading
        self._batch, self._template, self._reporter = batch, template, reporter
        self._thinking = loaded.settings.thinking
        self._generation: Any = None
        self._several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    @contextmanager
    def model(self, checkpoint: Checkpoint, notes: list[str]) -> Iterator[Any]:
        """A checkpoint as the harness's own kind of model."""
        base = checkpoint is self._patient.checkpoint
        options: dict[str, Any] = {"batch_size": self._batch}
        if self._template:
            options["enable_thinking"] = self._thinking
        if self._thinking:
            options["think_end_token"] = END_OF_THOUGHT
        with hushed(self._reporter):
            if self._loaded.settings.backend == "vllm":
                lm = counting_vllm()(
                    pretrained=str(checkpoint.folder),
                    tokenizer=str(self._patient.checkpoint.folder),
                    dtype=self._loading.dtype,
                    trust_remote_code=self._loading.trust_remote_code,
                    **options,
                )
            else:
                lm = self._transformers(checkpoint, base, options)
                self._same_generation(lm.model, checkpoint, notes)
        try:
            yield lm
        finally:
            free_memory()

    def _transformers(self, checkpoint: Checkpoint, base: bool, options: dict[str, Any]) -> Any:
        from surgery.models.loading import load_model, require_finite

        settings, device = self._loading, self._patient.device
        if self._several:
            # The harness places and shards a model that it loads itself.
            source: Any = str(checkpoint.folder)
            options |= {
                "dtype": settings.dtype,
                "trust_remote_code": settings.trust_remote_code,
                "device": str(device),
            }
        elif base:
            source = self._patient.model
        else:
            source = load_model(
                checkpoint.folder,
                dtype=settings.dtype,
                device=device,
                trust_remote_code=settings.trust_remote_code,
            )
            require_finite(source)
        kind = counting_transformers()
        return kind(
            pretrained=source, tokenizer=self._patient.tokenizer, backend="causal", **options
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

    def run(self, name: str, lm: Any, context: Callable[[], AbstractContextManager[Any]]) -> Run:
        """Every task on one model: sampled ones once per seed, the others once."""
        loaded, options = self._loaded, self._loaded.settings
        found = Run({}, {})
        once = [task for name, task in loaded.tasks.items() if name not in loaded.sampled]
        often = [task for name, task in loaded.tasks.items() if name in loaded.sampled]
        plan = ([(options.seeds[0], once)] if once else []) + [
            (seed, often) for seed in options.seeds if often
        ]
        hits: dict[str, list[bool | None]] = {}
        for number, (seed, tasks) in enumerate(plan, 1):
            self._reporter.say(f"Running tasks on {name} ({number} of {len(plan)}, seed {seed})")
            with hushed(self._reporter), context():
                samples = self._evaluate(lm, tasks, seed)
            for task, documents in (samples or {}).items():
                found.samples.setdefault(task, []).append(documents)
                if generates(loaded.tasks[task]):
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
                if generates(task):
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
