"""Of several sets of weights, those are taken that stock transformers takes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import pytest
import script
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import BadCheckpoint
from surgery.files.checkpoint import weights_in
from surgery.files.weights import (
    ADAPTER_CONFIG,
    INDEX,
    PACKING,
    PICKLE,
    PICKLE_INDEX,
    SINGLE,
    choose,
    method_of,
    require_described,
)

Tiny = Callable[..., Path]

# Shards under the usual names and under others.
SHARDS = (
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ("part one.safetensors", "Z.safetensors"),
)
PICKLED = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
OTHERS = (ADAPTER_CONFIG, "consolidated.safetensors", "tf_model.h5")
# Nothing, all that an index names, some of it, or the shards alone.
WAYS = ("none", "whole", "without a shard", "without shards", "without the index")


def index(*files: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": dict(zip("abcd", files, strict=False))})


def indexed(way: str, entry: str, shards: tuple[str, str]) -> dict[str, str]:
    """The files of a sharded set of weights that is there in one of `WAYS`."""
    files = {} if way in ("none", "without the index") else {entry: index(*shards)}
    there = {"whole": shards, "without the index": shards, "without a shard": shards[1:]}
    return {**files, **dict.fromkeys(there.get(way, ()), "")}


def folders() -> Iterator[dict[str, str]]:
    """Every subset of what may lie in a folder of weights: names and contents."""
    some = list(chain.from_iterable(combinations((SINGLE, PICKLE, *OTHERS), n) for n in range(6)))
    for files, way, shards, pickled in product(some, WAYS, SHARDS, WAYS):
        if way == "none" and shards != SHARDS[0]:
            continue
        yield {
            "config.json": "{}",
            **dict.fromkeys(files, "{}"),
            **indexed(way, INDEX, shards),
            **indexed(pickled, PICKLE_INDEX, PICKLED),
        }


# The resolution of transformers itself, for every folder below one; in any release of it.
STOCK = """
import inspect, json, os, sys
from pathlib import Path
from transformers import modeling_utils
wanted = inspect.signature(modeling_utils._get_resolved_checkpoint_files).parameters
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    values = dict.fromkeys(wanted)
    values |= {"pretrained_model_name_or_path": str(folder), "subfolder": ""}
    values |= {"is_remote_code": False, "from_tf": False, "from_flax": False}
    values = {name: value for name, value in values.items() if name in wanted}
    try:
        files, _ = modeling_utils._get_resolved_checkpoint_files(**values)
    except OSError:
        files = []
    names = sorted(os.path.basename(file) for file in files)
    found[folder.name] = names if all((folder / name).is_file() for name in names) else []
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for number, files in enumerate(folders()):
        folder = root / f"{number:04}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    return root


def taken(choice: Callable[[], Any]) -> list[str]:
    try:
        return sorted(choice().files)
    except BadCheckpoint:
        return []


@pytest.mark.parametrize("release", ["this", "4.57"])
def test_every_folder_as_stock_transformers_takes_it(release: str, family: Path) -> None:
    """In a folder, and from a listing of the same files."""
    older = Path(sys.prefix) / "transformers-4.57"
    if release == "4.57" and not older.is_dir():
        pytest.skip(f"transformers 4.57 is not installed in {older} (make test puts it there)")
    env = {"PYTHONPATH": str(older)} if release == "4.57" else {}
    done = script.run(sys.executable, "-c", STOCK, family, env=env, check=True)
    stock: Mapping[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert len(stock) > 1000
    assert len({tuple(files) for files in stock.values()}) == 6, "each kind, and none"
    for number, files in enumerate(folders()):
        folder = family / f"{number:04}"
        listed = taken(lambda: choose(list(files), lambda name: json.loads(files[name]), "x"))  # noqa: B023
        assert taken(lambda: weights_in(folder)) == listed == stock[folder.name], list(files)  # noqa: B023


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ((INDEX,), "names a.safetensors, which is not there; fetch the missing shards."),
        ((INDEX, PICKLE), f"or delete {INDEX} to use {PICKLE}."),
        ((SHARDS[0][0],), f"but no {INDEX}; fetch the index too."),
        ((PICKLED[0],), f"but no {PICKLE_INDEX}; fetch the index too."),
        ((ADAPTER_CONFIG, "adapter_model.safetensors"), "is a PEFT adapter for me/base"),
        (("x.gguf",), "give the file itself, such as x.gguf."),
        (("consolidated.safetensors",), "what it holds (consolidated.safetensors) transformers"),
        ((), f"holds no {SINGLE}, no {PICKLE} and no index of either."),
    ],
)
def test_why_nothing_is_taken(files: tuple[str, ...], sentence: str) -> None:
    contents = {
        INDEX: {"weight_map": {"a": "a.safetensors"}},
        ADAPTER_CONFIG: {"base_model_name_or_path": "me/base"},
    }
    with pytest.raises(BadCheckpoint) as refused:
        choose(files, contents.__getitem__, "x")
    assert sentence in str(refused.value)


def test_following_the_advice_works(tiny_copy: Tiny) -> None:
    folder = tiny_copy("llama")
    torch.save(load_file(folder / SINGLE), folder / PICKLE)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(index("gone.safetensors"))
    with pytest.raises(BadCheckpoint, match=f"delete {INDEX}"):
        surgery.resolve(str(folder))
    (folder / INDEX).unlink()
    assert surgery.resolve(str(folder)).tensors


@pytest.mark.parametrize("named", [1, "", "../x.safetensors", "x.bin", ["x.safetensors"]])
def test_a_configuration_that_names_no_weights(named: Any) -> None:
    with pytest.raises(BadCheckpoint, match="transformers_weights"):
        choose((SINGLE,), lambda _: {}, "x", {"transformers_weights": named})


def test_weights_that_the_configuration_names(tiny_copy: Tiny, tmp_path: Path, run: Any) -> None:
    """As stock transformers, which then looks for no other."""
    folder = tiny_copy("llama")
    other = tiny_copy("llama", layer=4)
    shutil.copyfile(other / SINGLE, folder / "mine.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    settings["transformers_weights"] = "mine.safetensors"
    (folder / "config.json").write_text(json.dumps(settings))
    for more in ((), ("--stream",)):
        found = json.loads(run("analyze", folder, "--json", *more).ok().stdout)
        assert found["emergence"]["layer"] == 4
    run("convert", folder, "-o", tmp_path / "out").ok()
    assert not (tmp_path / "out" / SINGLE).exists()


def test_a_newer_file_beside_an_older_sharded_copy(
    tiny: Tiny, tiny_copy: Tiny, tmp_path: Path, run: Any
) -> None:
    """Analysed loaded and streamed, edited, and written: always what stock transformers loads."""
    folder, older = tiny_copy("llama"), tiny("llama", layer=4, shards=2)
    for path in older.glob("model*"):
        shutil.copyfile(path, folder / path.name)
    for more in ((), ("--stream",)):
        found = json.loads(run("analyze", folder, "--json", *more).ok().stdout)
        assert found["emergence"]["layer"] == 3
    out = tmp_path / "out"
    assert INDEX in run("convert", folder, "-o", out).ok().stdout  # named as left out
    assert [path.name for path in out.glob("model*")] == [SINGLE]
    before, after = load_file(folder / SINGLE), load_file(out / SINGLE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.4.input_layernorm.weight"}
    run("verify", out).ok()
    run("reproduce", out).ok()


def test_a_pickle_beside_other_safetensors(tiny_copy: Tiny, tmp_path: Path, run: Any) -> None:
    folder = tiny_copy("llama")
    tensors = load_file(folder / SINGLE)
    torch.save(tensors, folder / PICKLE)
    (folder / SINGLE).unlink()
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    torch.save({"y": torch.ones(1)}, folder / "pytorch_model-00001-of-00002.bin")
    run("convert", folder, "-o", tmp_path / "out", "--layer", 3, "--no-check").ok()
    assert load_file(tmp_path / "out" / SINGLE).keys() == tensors.keys()


# --------------------------------------------------------------------------------------------
# What lies beside a model and would change it
# --------------------------------------------------------------------------------------------


def put_adapter(folder: Path) -> None:
    """An adapter that changes what the model says, saved where the whole model lies."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    wanted = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, wanted)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 3)
    adapted.save_pretrained(folder)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([[0, 61, 87, 85, 43]])).logits
    return found


def test_an_adapter_beside_a_whole_model(
    tiny: Tiny, tiny_copy: Tiny, tmp_path: Path, run: Any
) -> None:
    """Left aside by every command, named, not carried: the weights are what is meant."""
    clean, folder = tiny("llama"), tiny_copy("llama")
    put_adapter(folder)
    assert not torch.allclose(logits(folder), logits(clean)), "stock transformers puts it on"
    said = run("analyze", folder).ok()
    assert f"Left aside: {ADAPTER_CONFIG}" in said.stderr
    measured = ("--check-tokens", 512)
    for name, source in (("clean", clean), ("adapted", folder)):
        run("convert", source, "-o", tmp_path / name, *measured).ok()
    known = [json.loads((tmp_path / name / "surgery.json").read_text()) for name in
             ("clean", "adapted")]  # fmt: skip
    assert known[0]["quality"] == known[1]["quality"]
    assert not list((tmp_path / "adapted").glob("adapter*"))
    assert torch.equal(logits(tmp_path / "clean"), logits(tmp_path / "adapted"))
    run("verify", tmp_path / "adapted").ok()
    compared = run("compare", folder, tmp_path / "adapted", "--no-reference", "--json").ok()
    assert compared.stdout.count('"perplexity"') >= 2


def test_settings_of_packing_beside_plain_weights(
    tiny_copy: Tiny, tmp_path: Path, run: Any
) -> None:
    folder = tiny_copy("llama")
    (folder / PACKING).write_text('{"bits": 4, "group_size": 128}')
    said = run("convert", folder, "-o", tmp_path / "out", "--layer", 3, "--no-check").ok()
    assert f"Left aside: {PACKING}" in said.stderr
    assert not (tmp_path / "out" / PACKING).exists()


def test_packed_weights_that_nothing_describes() -> None:
    for settings, advice in ((PACKING, '"quant_method": "gptq"'), ("x", "packed with")):
        with pytest.raises(BadCheckpoint, match=advice):
            require_described(("model.layers.0.q_proj.qweight",), {}, (settings,), "x")
    require_described(("a.qweight",), {"quantization_config": {"quant_method": "gptq"}}, (), "x")


def test_a_quantisation_that_is_switched_off(tiny_copy: Tiny, tmp_path: Path, run: Any) -> None:
    """Stock transformers loads such weights as they are stored, and so does everything here."""
    folder = tiny_copy("llama")
    settings = json.loads((folder / "config.json").read_text())
    off = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    settings["quantization_config"] = off
    assert not method_of(settings)
    assert method_of({"quantization_config": {**off, "load_in_8bit": True}})
    (folder / "config.json").write_text(json.dumps(settings))
    said = run("convert", folder, "-o", tmp_path / "out", "--fold", "sink").ok()
    assert "switched off" in said.stderr
    run("verify", tmp_path / "out").ok()
