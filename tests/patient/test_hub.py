"""A model on the Hub: the same files of it are read, fetched and copied as in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quantised_models
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from surgery.files.weights import ADAPTER_CONFIG, INDEX, PICKLE, SINGLE

Tiny = Callable[..., Path]
CARD = "README.md"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import HfFileSystem

    with HubServer(tmp_path / "server") as server:
        cache = {"huggingface_hub.constants.HF_HUB_CACHE": str(tmp_path / "home")}
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        for name, value in {**server.patches(), **cache}.items():
            monkeypatch.setattr(name, value, raising=False)
        HfFileSystem.clear_instance_cache()
        yield server


def fetched(tmp_path: Path) -> set[str]:
    """Names of the files in the Hub's cache."""
    return {path.name for path in (tmp_path / "home").glob("models--*/snapshots/*/**/*")}


def test_a_newer_file_beside_an_older_sharded_copy(
    hub: HubServer, tiny: Tiny, tiny_copy: Tiny, tmp_path: Path, run: Any
) -> None:
    """Read on the Hub, published from it, and fetched: what stock transformers takes."""
    folder = tiny_copy("llama")
    for path in tiny("llama", layer=4, shards=2).glob("model*"):
        shutil.copyfile(path, folder / path.name)
    torch.save({"x": torch.ones(1)}, folder / PICKLE)
    hub.add_repo("some/model", folder)
    found = json.loads(run("analyze", "some/model", "--json").ok().stdout)
    assert found["emergence"]["layer"] == 3
    assert SINGLE not in fetched(tmp_path), "read on the Hub"
    run("convert", "some/model", "--remote", "--push-to-hub", "me/remote", "--layer", 3).ok()
    out = tmp_path / "out"
    run("convert", "some/model", "-o", out, "--layer", 3, "--no-check").ok()
    weights = {name for name in fetched(tmp_path) if name.endswith((".safetensors", ".bin"))}
    assert weights == {SINGLE}
    for name, path in hub.files("me/remote").items():
        if name not in (CARD, "surgery.json", ".gitattributes"):
            assert path.read_bytes() == (out / name).read_bytes(), name
    assert INDEX not in hub.files("me/remote")


def test_a_pickle_beside_other_safetensors(
    hub: HubServer, tiny_copy: Tiny, tmp_path: Path, run: Any
) -> None:
    folder = tiny_copy("llama")
    tensors = load_file(folder / SINGLE)
    torch.save(tensors, folder / PICKLE)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / SINGLE).unlink()
    hub.add_repo("some/model", folder)
    out = tmp_path / "out"
    run("convert", "some/model", "-o", out, "--layer", 3, "--no-check").ok()
    assert load_file(out / SINGLE).keys() == tensors.keys()


def test_an_adapter_is_refused_before_it_is_fetched(
    hub: HubServer, tiny_copy: Tiny, tmp_path: Path, run: Any
) -> None:
    folder = tiny_copy("llama")
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / ADAPTER_CONFIG).write_text('{"base_model_name_or_path": "some/base"}')
    hub.add_repo("some/adapter", folder)
    for words in (("analyze", "some/adapter"), ("convert", "some/adapter", "-o", tmp_path / "x")):
        assert "is a PEFT adapter for some/base" in run(*words).sentence()
    assert not fetched(tmp_path) & {"adapter_model.safetensors"}


def test_a_quantised_model_that_is_not_in_the_cache(
    hub: HubServer, tiny: Tiny, tmp_path: Path, run: Any
) -> None:
    """Packed weights are not streamed; they are fetched, and unpacked here."""
    folder = tmp_path / "packed"
    quantised_models.quantise(tiny("llama"), folder, "gptq")
    hub.add_repo("some/packed", folder)
    here = json.loads(run("analyze", folder, "--json").ok().stdout)
    there = json.loads(run("analyze", "some/packed", "--json").ok().stdout)
    assert there["emergence"]["layer"] == here["emergence"]["layer"] is not None
    assert there["emergence"]["rows"] == here["emergence"]["rows"]
