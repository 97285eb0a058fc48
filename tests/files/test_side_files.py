"""What a checkpoint carries beside its weights: an allow-list, in folders and in listings."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.side_files import carried, divided, is_hidden, other_files
from surgery.files.weights import INDEX, Weights

# Names that repositories on the Hub really hold.
KEPT = [
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "configuration.json"),
    *("hf_quant_config.json", "quantize_config.json", "config_1m.json", "tokenizer_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v11m1"),
    *("qwen.tiktoken", "tekken.json", "merges.txt", "vocab.json", "vocab.txt", "entity_vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "custom_generate/generate.py"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "vision/config.json", "vision/preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENCE.md", "LICENSE-2.0", "NOTICE", "USE_POLICY.md"),
    *("Llama_License.pdf", "GEMMA_TERMS_OF_USE.md", "COPYING", "README.md"),
    *("surgery.json",),
]
LEFT = [
    *(".env", ".gitattributes", ".gitignore", ".DS_Store", "vision/.env", ".ssh/config.json"),
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("wandb/debug.log", "runs/Nov25_host/events.out.tfevents.1.host.1", "logs/config.json"),
    *("checkpoint-5/config.json", "last-checkpoint/config.json", "checkpoint_best/config.json"),
    *("global_step100/config.json", "epoch_1/tokenizer.json", "__pycache__/x.pyc"),
    *("model.safetensors.bak", "config.json.bak", "LICENSE.bak", "tokenizer.json.incomplete"),
    *("config.json~", "adapter_config.json", "train_config.json", "ds_config.json"),
    *("all_results.json", "train.py", "secrets.yaml", "id_rsa", "notes.txt", "data.csv"),
    *("pytorch_model.bin", "onnx/config.json", "original/params.json", "model.gguf"),
]


NONE = Weights("", (), None, quantised=True)


def test_the_index_of_the_weights_and_no_other() -> None:
    shards = ("model-1.safetensors",)
    names = (INDEX, "pytorch_model.bin.index.json", *shards)
    assert divided(names, Weights(INDEX, shards, {"a": shards[0]})) == ((INDEX,), (names[1],))
    assert divided(names, Weights(shards[0], shards, None)) == ((), names[:2])


def fill(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_the_names_of_real_repositories() -> None:
    assert [name for name in KEPT if not carried(name)] == []
    assert [name for name in LEFT if carried(name)] == []
    kept, left = divided([*KEPT, *LEFT], NONE)
    assert set(kept) == set(KEPT)
    assert {".env", "training_args.bin", "wandb/", "runs/", "checkpoint-5/", ".ssh/"} <= set(left)


def test_a_folder_is_divided_as_its_listing_is(tmp_path: Path) -> None:
    fill(tmp_path, [*KEPT, *LEFT])
    kept, left = other_files(tmp_path, NONE)
    listed = divided(sorted([*KEPT, *LEFT]), NONE, (), tmp_path)
    assert (set(kept), set(left)) == (set(listed[0]), set(listed[1]))


@given(st.lists(st.sampled_from([*KEPT, *LEFT, "model.safetensors"]), unique=True))
def test_every_file_is_carried_or_named(names: list[str]) -> None:
    weights = Weights("model.safetensors", ("model.safetensors",), None)
    kept, left = divided(names, weights)
    for name in {*names} - {*weights.files}:
        named = [one for one in left if name == one or (one.endswith("/") and name.startswith(one))]
        assert (name in kept) != bool(named), name
    assert not any(is_hidden(name) for name in kept)


def test_code_that_configurations_name(tmp_path: Path) -> None:
    """And what it imports from beside; nothing else that is Python."""
    fill(tmp_path, ["train.py", "layers/attention.py", "layers/__init__.py", "layers/unused.py"])
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoModel": "modeling_own.Own", "AutoConfig": "x/y--elsewhere.Other"},
                "text_config": {"auto_map": {"AutoConfig": "configuration_own.Own"}},
                "custom_pipelines": {"pair": {"impl": "pairs.Pipeline", "pt": ["AutoModel"]}},
            }
        )
    )
    names = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
    (tmp_path / "modeling_own.py").write_text(
        "from .layers.attention import A\nfrom . import helpers as h\nfrom torch import nn\n"
    )
    (tmp_path / "helpers.py").write_text("def f():\n    from .deeper import (\n        x,\n    )\n")
    (tmp_path / "layers" / "attention.py").write_text("from ..modeling_own import Own\n")
    (tmp_path / "tokenization_own.py").write_text("this is no Python")
    fill(tmp_path, ["configuration_own.py", "deeper.py", "pairs.py", "elsewhere.py", "torch.py"])
    kept, left = other_files(tmp_path, NONE)
    assert {name for name in kept if name.endswith(".py")} == {
        *("modeling_own.py", "configuration_own.py", "tokenization_own.py", "pairs.py"),
        *("helpers.py", "deeper.py", "layers/attention.py"),
    }
    assert {"train.py", "elsewhere.py", "torch.py", "layers/unused.py"} <= set(left)


def test_pictures_that_the_card_shows_and_its_licence(tmp_path: Path) -> None:
    shown = ["a.png", "docs/b c.svg", "d.jpg", "e.webp", "thumb.png", "f.gif", "Terms.docx"]
    fill(tmp_path, [*shown, "not-shown.png", "data.csv", ".hidden/x.png"])
    (tmp_path / "README.md").write_text(
        "---\nlicense_link: Terms.docx\nthumbnail: 'thumb.png'\n---\n"
        '![a](a.png "title") ![b](docs/b%20c.svg)\n<img src="./d.jpg?raw=true" alt="">\n'
        "<source srcset='e.webp'> ![x](.hidden/x.png) ![c](data.csv) ![up](../../etc/x.png)\n"
        "![f](https://huggingface.co/some/model/resolve/main/f.gif)\n"
    )
    kept, left = other_files(tmp_path, NONE)
    assert set(kept) == {*shown, "README.md"}
    assert set(left) == {"not-shown.png", "data.csv", ".hidden/"}


def test_modules_of_a_sentence_encoder(tmp_path: Path) -> None:
    """A dense layer has weights of its own, which no other file holds."""
    files = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    fill(tmp_path, [*files, "3_Other/config.json", "3_Other/model.safetensors", "own_st.py"])
    modules = [
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "own_st.Dense"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    kept, left = other_files(tmp_path, NONE)
    assert set(kept) == {*files, "modules.json", "own_st.py"}
    # A folder with weights of its own is another model.
    assert set(left) == {"3_Other/config.json", "3_Other/model.safetensors"}


def test_more_on_request(tmp_path: Path) -> None:
    """But nothing hidden; and a pattern that matches nothing is a mistake."""
    fill(tmp_path, ["docs/a.md", "docs/deep/b.md", "wandb/kept.txt", "wandb/c.log", "x/.env"])
    kept, left = other_files(tmp_path, NONE, ("docs/*.md", "wandb/kept.txt"))
    assert set(kept) == {"docs/a.md", "docs/deep/b.md", "wandb/kept.txt"}
    assert set(left) == {"wandb/", "x/.env"}
    for pattern in ("nothing/*", "x/.env", ".e*"):
        with pytest.raises(BadSettings, match="--include"):
            other_files(tmp_path, NONE, (pattern,))
    assert "x/.env" not in other_files(tmp_path, NONE, ("*",))[0]


def test_links_to_folders(tmp_path: Path) -> None:
    """What wandb links to its latest run stays behind; another is asked about."""
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to(tmp_path / "wandb" / "run-1")
    (tmp_path / ".git").symlink_to(tmp_path / "wandb")
    assert other_files(tmp_path, NONE) == ((), (".git/", "wandb/"))
    (tmp_path / "vision").symlink_to(tmp_path / "wandb")
    with pytest.raises(BadCheckpoint, match="link to a folder"):
        other_files(tmp_path, NONE)


@pytest.mark.parametrize("text", ["", "[", "[" * 99999, "null", '{"auto_map": 3}', "[3, [1]]"])
def test_damaged_files_that_name_others(text: str, tmp_path: Path) -> None:
    fill(tmp_path, ["a.py"])
    for name in ("config.json", "modules.json", "README.md", "tokenizer_config.json"):
        (tmp_path / name).write_text(text)
    assert "a.py" in other_files(tmp_path, NONE)[1]
