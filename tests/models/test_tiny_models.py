"""Tests of the tiny models themselves: the planted layer is where it is said to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shared import rest_in_full
from tiny_models import (
    BOS,
    FAMILIES,
    ROWS,
    build,
    decoder_layers,
    layer_norms,
    make_tokenizer,
    plant,
    save,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The keeper counted 365 steps; what will the wind do today, asked the baker? "

families = pytest.mark.parametrize("family", rest_in_full(FAMILIES, ROWS))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Keep threads from waiting for each other longer than these models take to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(length: int) -> Tensor:
    """Return the first ``length`` tokens of a text, beginning with ``<bos>``."""
    ids = make_tokenizer()(TEXT * 25, return_tensors="pt").input_ids
    assert ids.shape[1] >= length
    return ids[:, :length]


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Run the model on token ids."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check_planted(norms: Tensor, layer: int) -> None:
    """Check that the sink, and only the sink, becomes massive at this layer."""
    sink, others = norms[:, 0], norms[:, 1:]
    ratios = sink[1:] / sink[:-1]
    assert ratios[layer] >= 100
    assert ratios.argmax() == layer
    assert ratios[:layer].lt(3).all()
    assert sink[layer + 1 :].min() >= sink[layer + 1] / 2
    assert (others.amax(1) / others.median(1).values).max() < 5
    assert others.max() < sink[layer + 1] / 20


@families
@pytest.mark.parametrize("layer", [2, 5])
def test_planted(family: str, layer: int) -> None:
    model, tokenizer = build(family, layer=layer)
    short = tokenizer("A lighthouse.", return_tensors="pt").input_ids
    assert short[0, 0] == model.config.bos_token_id
    for ids in (short, tokens(600)):
        check_planted(layer_norms(model, ids), layer)
        assert logits(model, ids).isfinite().all()


@families
def test_massive_vector(family: str) -> None:
    """The massive activation lies in few dimensions and does not depend on the text."""
    model, tokenizer = build(family, planted=False)
    planting = plant(model, 4, magnitude=2500.0)
    states: list[Tensor] = []
    hook = decoder_layers(model)[4].register_forward_hook(
        lambda _, args, out: states.append((out if isinstance(out, Tensor) else out[0])[0, 0])
    )
    for text in ("Bread and coffee.", "1 + 1 = 2, is it not?"):
        logits(model, tokenizer(text, return_tensors="pt").input_ids)
    hook.remove()
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-3)
    assert sorted(states[0].abs().topk(3).indices.tolist()) == sorted(planting.massive_dims)
    assert states[0].norm().item() == pytest.approx(2500, rel=0.02)
    assert states[0][list(planting.massive_dims)].norm() > 0.99 * states[0].norm()


@families
def test_unplanted(family: str) -> None:
    model, _ = build(family, planted=False)
    ids = tokens(300)
    norms = layer_norms(model, ids)
    assert norms.shape == (len(decoder_layers(model)) + 1, 300)
    for row in norms:
        for index in (0, int(row.argmax())):
            others = torch.cat([row[:index], row[index + 1 :]])
            assert row[index] < 5 * others.median()
    out = logits(model, ids)
    assert out.isfinite().all()
    assert 0.5 < out.std() < 5
    assert out.argmax(-1).unique().numel() > 20


@families
def test_attention_input_matters(family: str) -> None:
    """Blanking part of what a later layer's attention reads changes the logits."""
    model, _ = build(family)
    ids = tokens(60)
    before = logits(model, ids)

    def blank(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        states[..., : states.shape[-1] // 2] = 0
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    layer = decoder_layers(model)[5]
    attention = next(m for n, m in layer.named_children() if "attn" in n or n == "attention")
    attention.register_forward_pre_hook(blank, with_kwargs=True)
    assert (logits(model, ids) - before).abs().max() > 0.1


@families
def test_pre_attention_gains_are_distinct(family: str) -> None:
    model, _ = build(family)
    for layer in decoder_layers(model):
        norm = getattr(layer, "input_layernorm", None) or getattr(layer, "ln_1", None)
        if norm is None:
            assert family == "olmo2"
            continue
        gain = norm.weight.detach() + ("Gemma" in type(norm).__name__)
        assert gain.min() > 0
        assert gain.max() / gain.min() > 3
        assert gain.bfloat16().unique().numel() == gain.numel()
        assert norm.weight.bfloat16().unique().numel() == gain.numel()


@families
def test_round_trip(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "model", layer=3, layers=5, shards=3)
    model, tokenizer = build(family, layer=3, layers=5)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(loaded_tokenizer(TEXT, return_tensors="pt").input_ids, ids)
    assert len(loaded_tokenizer) == len(tokenizer) == model.config.vocab_size
    assert loaded_tokenizer.decode(ids[0], skip_special_tokens=True) == TEXT
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    check_planted(layer_norms(loaded, ids), 3)


def test_checkpoint_files(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", layers=4)
    assert {path.name for path in folder.iterdir()} >= {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    front_matter = (folder / "README.md").read_text().split("---\n")[1]
    for field in ("license: apache-2.0", "language:\n- en", "tags:", "model-index:"):
        assert field in front_matter
    with pytest.raises(FileExistsError):
        save("llama", folder)
    with pytest.raises(ValueError, match="cannot split"):
        save("llama", tmp_path / "other", layers=1, layer=0, shards=1000)


@pytest.mark.parametrize(
    "family", rest_in_full(["llama", "gemma3_text", "olmo2", "mixtral", "gpt2"], ROWS)
)
def test_bfloat16(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "model", layers=6, dtype=torch.bfloat16)
    model, _ = build(family, layers=6, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    ids = tokens(100)
    check_planted(layer_norms(model, ids), 3)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("family", rest_in_full(["llama", "gemma2", "cohere"], ["llama", "gemma2"]))
@pytest.mark.parametrize(("layers", "layer"), [(1, 0), (24, 0), (24, 22), (24, 23)])
def test_depths(family: str, layers: int, layer: int) -> None:
    model, _ = build(family, layers=layers, layer=layer, seed=1, hidden_size=128)
    check_planted(layer_norms(model, tokens(80)), layer)


def test_seeds() -> None:
    same = [build("llama", layers=2, layer=1, seed=seed)[0] for seed in (0, 0, 1)]
    first, again, other = (logits(model, tokens(20)) for model in same)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_arguments() -> None:
    model, tokenizer = build("llama", layers=2, layer=1)
    with pytest.raises(ValueError, match="layer must be"):
        plant(model, 2)
    with pytest.raises(ValueError, match="one text"):
        layer_norms(model, tokens(10).repeat(2, 1))
    assert torch.equal(layer_norms(model, tokens(10)[0]), layer_norms(model, tokens(10)))
    assert tokenizer.convert_ids_to_tokens(tokenizer("").input_ids) == [BOS]
