"""Situations from public reports, held against what stock transformers makes of them.

The table in docs/reliability.md names each with its source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shared import Run, Tiny

from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.files.weights import SINGLE
from surgery.models.anatomy import describe
from surgery.patient import texts

LAYER = 3
IDS = torch.tensor([[0, 61, 87, 85, 43, 99, 120, 7]])


def put(folder: Path, tensors: dict[str, torch.Tensor], name: str = SINGLE) -> None:
    copies = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(copies, folder / name, metadata={"format": "pt"})


def stock(folder: Path) -> torch.Tensor:
    """Logits of stock transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def convert(run: Run, folder: Path, output: Path, *options: str) -> Path:
    run("convert", folder, "--layer", LAYER, "--check-tokens", 256, "-o", output, *options).ok()
    return output


def all_but_one_are_kept(folder: Path, output: Path) -> str:
    """The name of the one tensor that differs; all the others are the same bytes."""
    before, after = load_file(folder / SINGLE), load_file(output / SINGLE)
    assert before.keys() == after.keys()
    differing = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(differing) == 1
    return differing[0]


def is_sound(run: Run, folder: Path, output: Path) -> None:
    """One gain is edited, stock transformers loads the output, and only later layers notice."""
    assert all_but_one_are_kept(folder, output).split(".")[-2:] == ["input_layernorm", "weight"]
    assert torch.isfinite(stock(output)).all()
    assert not torch.equal(stock(folder), stock(output))
    run("verify", output, "-q").ok()


def test_strength_nothing_changes_nothing(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    """Where nothing is edited, stock transformers gives the same logits."""
    output = convert(run, tiny(), tmp_path / "out", "--strength", "0", "--force")
    assert torch.equal(stock(tiny()), stock(output))


def test_tied_heads_stored_twice(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """lm_head.weight beside the embedding that it is tied to."""
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    put(folder, tensors)
    is_sound(run, folder, convert(run, folder, tmp_path / "out", "--force"))


def test_names_without_their_prefix(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """GPT-2's own files say h.0…, without `transformer.`; stock transformers adds it."""
    folder = tiny_copy("gpt2")
    tensors = load_file(folder / SINGLE)
    put(folder, {name.removeprefix("transformer."): tensors[name] for name in tensors})
    output = tmp_path / "out"
    run("convert", folder, "--layer", LAYER, "--fold", "qkv", "--no-check", "-o", output).ok()
    before, after = load_file(folder / SINGLE), load_file(output / SINGLE)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"h.{LAYER + 1}.attn.c_attn.weight"]
    assert torch.isfinite(stock(output)).all()


@pytest.mark.parametrize("depth", [6, 10])
def test_a_depth_that_disagrees(tiny_copy: Tiny, run: Run, tmp_path: Path, depth: int) -> None:
    """Fewer layers than stored: what stock runs is analysed. More: the first missing is named."""
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": depth}
    (folder / "config.json").write_text(json.dumps(config))
    if depth == 6:
        is_sound(run, folder, convert(run, folder, tmp_path / "out"))
        return
    outcome = run("analyze", folder, "-q")
    assert "model.layers.8" in outcome.sentence()
    assert outcome.code == 7


def test_scales_of_a_cache(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """FP8 exports keep k_scale and v_scale beside attention; they are carried as they are."""
    folder = tiny_copy()
    tensors = load_file(folder / SINGLE)
    for layer in range(8):
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(0.25 + layer)
    put(folder, tensors)
    is_sound(run, folder, convert(run, folder, tmp_path / "out"))


def test_old_buffers(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """rotary_emb.inv_freq in every layer, as old releases saved it."""
    folder = tiny_copy()
    tensors = load_file(folder / SINGLE)
    for layer in range(8):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    put(folder, tensors)
    is_sound(run, folder, convert(run, folder, tmp_path / "out"))


def test_old_masks(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """GPT-2's attn.bias and attn.masked_bias, which are no parameters."""
    folder = tiny_copy("gpt2")
    tensors = load_file(folder / SINGLE)
    for layer in range(8):
        prefix = f"transformer.h.{layer}.attn"
        tensors[f"{prefix}.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e4)
    put(folder, tensors)
    output = tmp_path / "out"
    run("convert", folder, "--layer", LAYER, "--fold", "qkv", "-o", output, "--force").ok()
    weight = f"transformer.h.{LAYER + 1}.attn.c_attn.weight"
    assert all_but_one_are_kept(folder, output) == weight
    assert torch.isfinite(stock(output)).all()


def test_an_invalid_generation_config(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """A temperature without sampling, which newer releases refuse to save: carried as it is."""
    folder = tiny_copy()
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    output = convert(run, folder, tmp_path / "out")
    is_sound(run, folder, output)
    assert (output / path.name).read_bytes() == path.read_bytes()


def test_no_padding_token(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tiny_copy()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text())
    table.pop("pad_token", None)
    path.write_text(json.dumps(table))
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
    output = convert(run, folder, tmp_path / "out")
    is_sound(run, folder, output)
    run("compare", folder, output, "-q").ok()


def test_the_first_token_twice(tiny_copy: Tiny, run: Run) -> None:
    """A text that begins with the token that the tokenizer puts there: both stay, as in stock."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_copy())
    text = texts.Text("text", f"{tokenizer.bos_token}Numbers are useful as well. " * 4)
    (ids,) = texts.encode(tokenizer, [text], 100)
    assert ids == tokenizer(text.text)["input_ids"][:100]
    assert ids[:2] == [tokenizer.bos_token_id] * 2


def test_saved_truncation_and_padding(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """tokenizer.json that cuts and fills every text to 16 tokens: the analysis sees whole ones."""
    plain, folder = tiny_copy(), tiny_copy()
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    table["truncation"] = {
        "direction": "Right",
        "max_length": 16,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    table["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    path.write_text(json.dumps(table))
    expected = run("analyze", plain, "--json", "-q").ok().json()
    found = run("analyze", folder, "--json", "-q").ok().json()
    assert found["emergence"] == expected["emergence"]
    output = convert(run, folder, tmp_path / "out")
    assert (output / path.name).read_bytes() == path.read_bytes()


def test_a_consolidated_copy(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """Mistral's consolidated.safetensors: the same weights under other names, left out and said."""
    folder = tiny_copy()
    put(folder, load_file(folder / SINGLE), "consolidated.safetensors")
    outcome = run("convert", folder, "--layer", LAYER, "--no-check", "-o", tmp_path / "out").ok()
    assert "consolidated.safetensors" in outcome.stdout
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    is_sound(run, folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["with space", "größe-模型", "a.b@c", "[x]'$y", "-o", "100%"])
def test_strange_names_of_folders(tiny_copy: Tiny, run: Run, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in" / name
    folder.parent.mkdir()
    tiny_copy().rename(folder)
    (tmp_path / "out").mkdir()
    is_sound(run, folder, convert(run, folder, tmp_path / "out" / name))


def test_odd_front_matter(tiny_copy: Tiny, run: Run, tmp_path: Path) -> None:
    """A base's card that is no YAML, or has text before it: a card is written all the same."""
    folder = tiny_copy()
    for number, card in enumerate(("---\n: [\n---\n# x", "---\n", "\n\n# no matter\n", "")):
        (folder / "README.md").write_text(card)
        output = convert(run, folder, tmp_path / f"out-{number}", "--no-check")
        written = (output / "README.md").read_text()
        assert written.startswith("---\n")
        assert "- wemask" in written.split("---\n")[1]


def test_extra_rows_are_read_by_nobody(tiny: Tiny) -> None:
    """The table of families finds the same gain in the header that stock transformers loads."""
    checkpoint = open_checkpoint(tiny(), Origin("directory", "x", "x"))
    anatomy = describe(checkpoint)
    assert anatomy is not None
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    found = anatomy.at(LAYER)
    gain = model.get_submodule(found.norm).weight.detach().numpy()
    assert np.array_equal(checkpoint.read(found.gain), gain)
