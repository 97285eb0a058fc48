"""The same converted model in every runtime: what transformers computes, not what it did before.

`make test-runtimes` installs the runtimes and runs this; without it nothing here is collected.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.runtimes

Answer = dict[str, Any]
# Log-probabilities of the first token, where the runtime computes in float32 too (llama.cpp keeps
# keys and values in float16).
CLOSE = 1e-2
# What an edit does to them at least.
TOLD_APART = 0.05


def largest_difference(one: Answer, other: Answer) -> float:
    """Of the log-probabilities of the ten most likely first tokens, over all prompts."""
    return max(
        abs(chances[token] - known[token])
        for chances, known in zip(one["first"], other["first"], strict=True)
        for token in list(known)[:10]
        if token in chances
    )


def agree(name: str, answers: dict[str, Answer], known: dict[str, Answer]) -> str:
    """Assert that a runtime follows transformers on every model, and tells them apart."""
    differences = []
    for kind, answer in answers.items():
        assert answer["tokens"] == known[kind]["tokens"], f"{name} on {kind}"
        differences.append(largest_difference(answer, known[kind]))
        assert differences[-1] < CLOSE, f"{name} on {kind}"
    kinds = list(answers)
    for kind in kinds[1:]:
        assert answers[kinds[0]]["tokens"] != answers[kind]["tokens"], f"{name} ignores the edit"
        assert largest_difference(answers[kinds[0]], answers[kind]) > TOLD_APART
    count = sum(len(tokens) for tokens in known[kinds[0]]["tokens"])
    return (
        f"{', '.join(kinds)}: {count} of {count} greedy tokens each, "
        f"log-probabilities to {max(differences):.0e}"
    )


@pytest.fixture(scope="module")
def known(models: Any, ask: Callable[..., Answer]) -> dict[str, Answer]:
    """What the transformers of this environment computes."""
    return {kind: ask("transformers", getattr(models, kind)) for kind in ("base", "norm", "sink")}


def test_the_folds_show(known: dict[str, Answer], report: Callable[..., None]) -> None:
    assert known["base"]["tokens"] != known["norm"]["tokens"]
    assert known["base"]["tokens"] != known["sink"]["tokens"]
    report("transformers", known["base"]["version"], "safetensors", "the reference")


def old_transformers() -> str:
    """Where transformers 4.57 lies, kept apart from the one that is installed."""
    places = (
        os.environ.get("SURGERY_TRANSFORMERS_4", ""),
        str(Path(sys.prefix) / "transformers-4.57"),
    )
    found = next((place for place in places if place and Path(place).is_dir()), None)
    if found is None:
        pytest.fail("transformers 4.57 is not installed beside this environment")
    return found


def test_transformers_4(
    models: Any, ask: Callable[..., Answer], known: dict[str, Answer], report: Callable[..., None]
) -> None:
    path = old_transformers()
    kinds = ("base", "norm", "sink")
    answers = {kind: ask("transformers", getattr(models, kind), path=path) for kind in kinds}
    assert answers["base"]["version"].startswith("4.")
    agreed = agree("transformers 4", answers, known)
    report("transformers", answers["base"]["version"], "safetensors", agreed)


@pytest.mark.parametrize(
    ("runtime", "package", "container"),
    [
        ("ctranslate2", "ctranslate2", "its own, by its converter"),
        ("onnxruntime", "onnxruntime", "ONNX, by torch.onnx.export"),
        ("openvino", "openvino", "ONNX, by torch.onnx.export"),
    ],
)
def test_from_safetensors(
    models: Any,
    ask: Callable[..., Answer],
    known: dict[str, Answer],
    report: Callable[..., None],
    runtime: str,
    package: str,
    container: str,
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.fail(f"{package} is not installed; run make test-runtimes")
    answers = {kind: ask(runtime, getattr(models, kind)) for kind in ("base", "norm")}
    report(runtime, answers["base"]["version"], container, agree(runtime, answers, known))


def test_llama_cpp(
    models: Any, ask: Callable[..., Answer], known: dict[str, Answer], report: Callable[..., None]
) -> None:
    """From GGUF in float32, converted as GGUF; the sink fold as an adapter at load time."""
    answers = {
        "base": ask("llama.cpp", models.base_gguf),
        "norm": ask("llama.cpp", models.norm_gguf),
        "sink": ask("llama.cpp", models.base_gguf, models.adapter),
    }
    version = answers["base"]["version"]
    report(
        "llama.cpp (xllamacpp)",
        version,
        "GGUF, F32; sink as LoRA",
        agree("llama.cpp", answers, known),
    )


def test_llama_cpp_quantised(
    models: Any, ask: Callable[..., Answer], known: dict[str, Answer], report: Callable[..., None]
) -> None:
    """A Q4_1 file patched in place.

    Its activations are quantised too, so tokens may differ from transformers': what the edit does
    to log-probabilities must not.
    """
    base, norm = (
        ask("llama.cpp", models.quantised),
        ask("llama.cpp", models.norm_quantised),
    )
    sink = ask("llama.cpp", models.quantised, models.adapter)
    assert base["tokens"] != norm["tokens"]
    assert base["tokens"] != sink["tokens"]
    moved = shifts(base, norm, known["base"], known["norm"])
    correlation = correlate(moved)
    assert correlation > 0.7
    report(
        "llama.cpp (xllamacpp)",
        base["version"],
        "GGUF, Q4_1, patched in place",
        f"norm: change of log-probabilities correlates {correlation:.2f} with transformers'",
    )


def shifts(
    base: Answer, edited: Answer, known_base: Answer, known_edited: Answer
) -> list[tuple[float, float]]:
    """Change of log-probability by the edit, here and in transformers, per prompt and token."""
    pairs = []
    answers = (base["first"], edited["first"], known_base["first"], known_edited["first"])
    for one, two, three, four in zip(*answers, strict=True):
        for token in set(one) & set(two) & set(three) & set(four):
            pairs.append((two[token] - one[token], four[token] - three[token]))
    return pairs


def correlate(pairs: list[tuple[float, float]]) -> float:
    import numpy as np

    assert len(pairs) > 20
    return float(np.corrcoef(np.array(pairs).T)[0, 1])
