"""How benchmark tasks are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from surgery.errors import BadSettings, SurgeryError
from surgery.files.paths import expanded
from surgery.settings import option

# The paper's limits on generated tokens (§5.1).
MAX_NEW_TOKENS, GSM8K_NEW_TOKENS = 512, 128
SEEDS = (0, 1, 2)
BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run; every field is an option of `compare` and `sweep`.

    Attributes:
        tasks: lm-eval task names, groups, YAML files or folders of these.
        data: a folder with local copies of the documents.
        limit: documents per task.
        batch_size: a number or "auto"; None: auto on a GPU, 8 on the CPU.
        seeds: for tasks that sample; the first one for all others.
        max_new_tokens: None for the paper's 512, and 128 for GSM8K.
        temperature: None for each task's own; 0 is greedy.
        chat_template: None for "where the tokenizer has one".
        thinking: whether the template lets the model think; its thoughts are not scored.
        backend: what runs the models, "hf" or "vllm".
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
        choices=BACKENDS,
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
        if self.data is not None and not expanded(self.data).is_dir():
            raise BadSettings(f"--data {self.data} is not a folder.")
        if self.backend not in BACKENDS:
            raise BadSettings(f"--backend must be {' or '.join(BACKENDS)}.")
        if self.backend == "vllm" and find_spec("vllm") is None:
            raise BadSettings(
                "--backend vllm needs vllm, which is not installed; run: pip install vllm, or use "
                "--backend hf."
            )


def task_settings(given: Mapping[str, Any]) -> TaskSettings | None:
    """What a user asked for; None without tasks.

    Args:
        given: the local variables of a function that spells the settings out, among others.

    Raises:
        SurgeryError: where the harness is missing.
        BadSettings: for values that make no sense.
    """
    if not given["tasks"]:
        return None
    require_harness()
    options = {known.name: given[known.name] for known in fields(TaskSettings)}
    tasks = tuple(str(expanded(name)) if name[:1] == "~" else name for name in given["tasks"])
    return TaskSettings(**{**options, "tasks": tasks})


def require_harness() -> None:
    """Raise SurgeryError, saying what to install, where lm-evaluation-harness is missing."""
    needed = ("lm_eval", "datasets", "scipy", "accelerate", "peft")
    lacking = [name for name in needed if find_spec(name) is None]
    if lacking:
        raise SurgeryError(
            f"--tasks needs lm-evaluation-harness ({lacking[0]} is not installed); run: "
            "pip install 'wemask-surgery[eval]'."
        )
