"""A token id without a row in the embedding: one sentence, before any forward pass, everywhere.

transformers 12763 and 11102, llama.cpp 6111: words added to a tokenizer alone, or the first token
of another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_server import HubServer
from shared import Run, Tiny, use_hub
from small_recipes import least_recipe

import surgery
from surgery.errors import BadCheckpoint
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.models.anatomy import describe
from surgery.models.loading import skeleton
from surgery.models.stored import StoredParameters
from surgery.models.stream import LayerStream

TOKEN, ROWS = "<|start|>", 512


def other_first_token(folder: Path) -> Path:
    """A first token that the tokenizer knows and the embedding does not."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": TOKEN})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    words = json.dumps(table["post_processor"]).replace('"<bos>"', f'"{TOKEN}"')
    table["post_processor"] = json.loads(words.replace('"ids": [0]', f'"ids": [{ROWS}]'))
    path.write_text(json.dumps(table))
    assert tokenizer.convert_tokens_to_ids(TOKEN) == ROWS
    return folder


@pytest.fixture
def folder(tiny_copy: Tiny) -> Path:
    return other_first_token(tiny_copy())


@pytest.fixture
def no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where an embedding is asked for anything."""

    embed = torch.nn.Embedding.forward

    def forward(module: Any, ids: torch.Tensor) -> torch.Tensor:
        assert ids.device.type == "meta", "a forward pass began"  # where a trace runs
        return embed(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)


def names_all(sentence: str) -> None:
    for part in (TOKEN, f"id {ROWS}", f"{ROWS} rows"):
        assert part in sentence


COMMANDS: dict[str, Callable[[Path, Path], tuple[Any, ...]]] = {
    "analyze": lambda folder, _: ("analyze", folder),
    "stream": lambda folder, _: ("analyze", folder, "--stream"),
    "report": lambda folder, out: ("analyze", folder, "--report", out),
    "convert": lambda folder, out: ("convert", folder, "-o", out),
    "told": lambda folder, out: ("convert", folder, "--layer", 3, "-o", out),
    "sink": lambda f, out: ("convert", f, "--layer", 3, "--fold", "sink", "--no-check", "-o", out),
    "compare": lambda folder, _: ("compare", folder, folder),
    "sweep": lambda folder, out: ("sweep", folder, "--output", out),
}


@pytest.mark.usefixtures("no_forward_pass")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(run: Run, folder: Path, tmp_path: Path, command: str) -> None:
    outcome = run(*COMMANDS[command](folder, tmp_path / "out"), "-q")
    assert outcome.code == 7
    names_all(outcome.sentence())


def test_verify(run: Run, tiny_copy: Tiny, tmp_path: Path) -> None:
    """The base's tokenizer has changed since it was converted."""
    base = tiny_copy()
    run("convert", base, "--layer", 3, "--no-check", "-o", tmp_path / "out").ok()
    other_first_token(base)
    names_all(run("verify", tmp_path / "out", "-q").sentence())


def test_on_the_hub(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(tmp_path / "server") as hub:
        use_hub(hub, monkeypatch, tmp_path / "home")
        hub.add_repo("tester/model", folder)
        names_all(run("analyze", "tester/model", "-q").stderr.splitlines()[-1])
        words = ("--push-to-hub", "tester/out", "--remote", "-q")
        # Beside the bar of the download.
        names_all(run("convert", "tester/model", *words).stderr.splitlines()[-1])


@pytest.mark.usefixtures("no_forward_pass")
def test_finetune(tmp_path: Path, folder: Path) -> None:
    """Where the mask is given, too, so that nothing is located before."""
    recipe = least_recipe(
        tmp_path / "recipe.yaml", folder, {"method": "sft", "intervention": "none"}
    )
    with pytest.raises(BadCheckpoint, match=f"{ROWS} rows") as caught:
        surgery.finetune(recipe, output=tmp_path / "out")
    names_all(str(caught.value))


def added_word(folder: Path, **special: str) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([TOKEN], special_tokens=True)
    tokenizer.add_special_tokens(special)
    # Of an earlier release, and read before what is saved now.
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("no_forward_pass")
@pytest.mark.parametrize("special", [{}, {"pad_token": TOKEN}])
def test_finetune_on_added_words(tmp_path: Path, tiny_copy: Tiny, special: dict[str, str]) -> None:
    """Words that stand in the data alone, or fill up the shorter rows."""
    folder = added_word(tiny_copy(), **special)
    path = least_recipe(tmp_path / "recipe.yaml", folder, {"method": "sft", "intervention": "none"})
    rows = tmp_path / "rows.jsonl"
    word = "" if special else TOKEN
    rows.write_text(json.dumps({"prompt": "The keeper", "completion": f" counted {word}."}) + "\n")
    with pytest.raises(BadCheckpoint, match=f"{ROWS} rows"):
        surgery.finetune(path, output=tmp_path / "out")


def test_a_word_that_is_never_used(run: Run, tiny_copy: Tiny, tmp_path: Path) -> None:
    """A padding token without a row is common, and does no harm where nothing is padded."""
    folder = added_word(tiny_copy(), pad_token=TOKEN)
    run("analyze", folder).ok()
    run("convert", folder, "-o", tmp_path / "out").ok()


def test_a_stream_stays_in_its_tensor(tiny: Tiny) -> None:
    """Asked for other rows, it reads no neighbour's bytes."""
    folder = tiny()
    checkpoint = open_checkpoint(folder, Origin("directory", "x", "x"))
    anatomy = describe(checkpoint)
    assert anatomy is not None
    for token in (ROWS, -1, 10**6):
        with pytest.raises(BadCheckpoint, match=f"{token} has no row in model.embed_tokens"):
            LayerStream(checkpoint, anatomy).locate([[1, 2, token]])
    model = skeleton(checkpoint, dtype=torch.float32)
    stored = StoredParameters(checkpoint, model, torch.float32, torch.device("cpu"))
    name = "model.embed_tokens.weight"
    whole = stored.values(name, (ROWS, 64))
    assert torch.equal(stored.rows(name, [0, 7, ROWS - 1], (ROWS, 64)), whole[[0, 7, ROWS - 1]])
    with pytest.raises(BadCheckpoint, match="is stored with the shape"):
        stored.rows(name, [0], (ROWS + 8, 64))
