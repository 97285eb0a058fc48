"""Hands models to the harness, all of them with the base's tokenizer and configuration."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surgery.errors import BadSettings, SurgeryError, first_line
from surgery.measure.task_loading import LoadedTasks, generates, hushed
from surgery.measure.task_models import counting_transformers, counting_vllm, free_memory
from surgery.measure.task_scores import Run
from surgery.patient.patient import Patient
from surgery.reporter import Reporter

if TYPE_CHECKING:
    from surgery.measure.logits import Context

logger = logging.getLogger(__name__)

CPU_BATCH = "8"
END_OF_THOUGHT = "</think>"


class Host:
    """Runs loaded tasks on one model after the other, under one configuration.

    Attributes:
        recorded: that configuration, for the results.
    """

    def __init__(self, loaded: LoadedTasks, base: Patient, reporter: Reporter) -> None:
        """Decide the configuration.

        Args:
            loaded: the tasks.
            base: whose tokenizer, template and defaults of generation hold for all models.
            reporter: whom to tell.

        Raises:
            BadSettings: for a chat template that the tokenizer does not have.
        """
        self._loaded, self._options = loaded, loaded.settings
        self._base, self._loading, self._reporter = base, base.loading, reporter
        self._vllm = self._options.backend == "vllm"
        template = getattr(base.tokenizer, "chat_template", None)
        if self._options.chat_template and template is None:
            raise BadSettings(
                "--chat-template was given, but the base's tokenizer has no template."
            )
        wanted = self._options.chat_template
        self._template: bool = template is not None if wanted is None else wanted
        on_cpu = base.device.type == "cpu" and not self._vllm
        self._batch = self._options.batch_size or (CPU_BATCH if on_cpu else "auto")
        self._generation: Any = None
        self._several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.recorded = self._recorded(str(template))

    def _recorded(self, template: str) -> dict[str, Any]:
        kept = asdict(self._options)
        # A folder of this machine says nothing elsewhere, that it was a local one does.
        kept["data"] = "local folder" if self._options.data else None
        kept["tasks"] = [name for name, _ in self._loaded.rows]
        kept |= {"chat_template": self._template, "batch_size": self._batch}
        kept["few_shot_examples"] = 0
        if self._template:
            kept["chat_template_sha256"] = hashlib.sha256(template.encode()).hexdigest()
        kept["generation"] = {
            name: dict(task.get_config("generation_kwargs"))
            for name, task in self._loaded.tasks.items()
            if generates(task)
        }
        return kept

    @contextmanager
    def model(self, patient: Patient, notes: list[str]) -> Iterator[Any]:
        """A patient as the harness's own kind of model, which is empty after the block.

        Its memory is free then, whoever still holds it; but not that of the base's own model,
        which stays for the next block until it is released.
        """
        options: dict[str, Any] = {"batch_size": self._batch}
        if self._template:
            options["enable_thinking"] = self._options.thinking
        if self._options.thinking:
            options["think_end_token"] = END_OF_THOUGHT
        with hushed(self._reporter):
            if self._vllm:
                lm = counting_vllm()(
                    pretrained=str(patient.checkpoint.folder),
                    tokenizer=str(self._base.checkpoint.folder),
                    dtype=self._loading.dtype,
                    trust_remote_code=self._loading.trust_remote_code,
                    **options,
                )
            else:
                lm = self._transformers(patient, options)
                self._same_generation(lm.model, patient, notes)
        try:
            yield lm
        finally:
            # The block's own variable outlives it, so what it holds is let go of, not it alone.
            vars(lm).clear()
            if patient is not self._base:
                patient.release()
            free_memory()

    def release_base(self) -> None:
        """Forget the base's own model too, and give back its memory."""
        self._base.release()
        free_memory()

    def _transformers(self, patient: Patient, options: dict[str, Any]) -> Any:
        if self._several:
            # The harness places and shards a model that it loads itself.
            source: Any = str(patient.checkpoint.folder)
            options |= {
                "dtype": self._loading.dtype,
                "trust_remote_code": self._loading.trust_remote_code,
                "device": str(self._base.device),
            }
        else:
            source = patient.model
        return counting_transformers()(
            pretrained=source, tokenizer=self._base.tokenizer, backend="causal", **options
        )

    def _same_generation(self, model: Any, patient: Patient, notes: list[str]) -> None:
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
                f"{patient.checkpoint.origin.name} has another generation_config.json than the "
                "base; the base's was used for both."
            )
        model.generation_config = self._generation

    def run(self, name: str, lm: Any, context: Context) -> Run:
        """Every task on one model: sampled ones once per seed, the others once.

        Args:
            name: of the model, for the reporter.
            lm: what `model` gives.
            context: within which it runs.
        """
        loaded, seeds = self._loaded, self._options.seeds
        found = Run({}, {})
        once = [task for name, task in loaded.tasks.items() if name not in loaded.sampled]
        often = [task for name, task in loaded.tasks.items() if name in loaded.sampled]
        plan = ([(seeds[0], once)] if once else []) + [(seed, often) for seed in seeds if often]
        hits: dict[str, list[bool | None]] = {}
        for number, (seed, tasks) in enumerate(plan, 1):
            self._reporter.say(f"Running tasks on {name} ({number} of {len(plan)}, seed {seed})")
            logger.info("%d tasks on %s, seed %d", len(tasks), name, seed)
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
        from lm_eval import evaluator, simple_evaluate  # an extra; imports datasets

        # It asks git about the current folder, and git may answer on the user's terminal.
        evaluator.get_git_commit_hash = lambda: None
        if self._vllm:
            # vLLM's sampler has a seed of its own, per request.
            for task in tasks:
                if generates(task):
                    task.set_config(key="generation_kwargs", value={"seed": seed}, update=True)
        try:
            result = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                num_fewshot=0,
                limit=self._options.limit,
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
