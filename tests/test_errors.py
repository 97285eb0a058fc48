"""The one line that has the reason, of what libraries say in several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import Run, Tiny

from surgery.errors import first_line


def raised_from(message: str, cause: str) -> Exception:
    error = ValueError(message)
    error.__cause__ = KeyError(cause)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("plain"), "plain"),
        (ValueError("a\nb"), "a"),
        (ValueError("\n  \n a \n b"), "a"),
        (ValueError("validator 'x':\n    ValueError: 6 is not 8"), "validator 'x': ValueError: 6"),
        (ValueError("one of:\n(1) this,\n(2) that\nmore"), "one of: (1) this, (2) that"),
        (ValueError(), "ValueError()"),
        (AssertionError("\n"), "AssertionError('\\n')"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (raised_from("", "rope"), "KeyError: 'rope'"),
        (raised_from("It failed:", "rope"), "It failed: KeyError: 'rope'"),
        (raised_from("It failed.", "rope"), "It failed."),
        (
            ValueError("Advice:\n do that \nWeightsUnpickler error: posix.system"),
            "WeightsUnpickler",
        ),
        (ValueError(":\n" * 50), ": : : : : :"),
    ],
)
def test_the_line_has_the_reason(error: Exception, expected: str) -> None:
    found = first_line(error)
    assert found.startswith(expected)
    assert "\n" not in found


def test_errors_in_a_circle() -> None:
    one, other = ValueError(""), ValueError("")
    one.__cause__, other.__cause__ = other, one
    assert first_line(one) == "ValueError('')"


def test_pydantic() -> None:
    class Model(pydantic.BaseModel):
        layers: int

    with pytest.raises(pydantic.ValidationError) as caught:
        Model.model_validate({"layers": "many"})
    assert "layers Input should be a valid integer" in first_line(caught.value)


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layer_types_of_another_depth(tiny_copy: Tiny, run: Run) -> None:
    """NeMo Automodel 2010: the second line has the reason."""
    folder = tiny_copy("qwen2")
    changed_config(folder, num_hidden_layers=6, layer_types=["full_attention"] * 8)
    sentence = run("analyze", folder, "-q").sentence()
    assert "6" in sentence
    assert "8" in sentence


def test_a_resized_embedding(tiny_copy: Tiny, run: Run) -> None:
    """transformers 17257: which tensor does not fit stood in a log that is switched off."""
    folder = tiny_copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], torch.zeros(8, 64)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = run("analyze", folder, "-q")
    assert "lm_head.weight" in outcome.sentence()
    assert "[520, 64]" in outcome.sentence()
    assert "[512, 64]" in outcome.sentence()
    assert outcome.code == 7


@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_an_embedding_of_another_size(tiny_copy: Tiny, run: Run, options: tuple[str, ...]) -> None:
    folder = tiny_copy()
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(8, 64)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = run("analyze", folder, "-q", *options)
    assert f"{name} is stored with the shape [520, 64]" in outcome.sentence()
    assert outcome.code == 7


def test_no_tokenizer(tiny_copy: Callable[..., Path], run: Run) -> None:
    folder = tiny_copy()
    for path in (*folder.glob("tokenizer*"), folder / "special_tokens_map.json"):
        path.unlink(missing_ok=True)
    assert "there is none, such as tokenizer.json" in run("analyze", folder, "-q").sentence()
