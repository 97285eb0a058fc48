"""Damaged checkpoints are named as such, in one sentence, before anything is read or written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from surgery.errors import BadCheckpoint, SurgeryError, Unsupported
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.safetensors_file import read_header
from surgery.files.weights import INDEX, SINGLE
from surgery.outputs.plan import make_plan

Tiny = Callable[..., Path]

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, Origin("directory", folder.name, str(folder)))


def refused(folder: Path) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(BadCheckpoint) as error:
        opened(folder)
    assert error.value.exit_code == 7
    sentence = str(error.value)
    assert "\n" not in sentence
    assert len(sentence) > 20
    return sentence


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", count) + text + data)


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two tensors of 16 bytes."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(CONFIG))
    raw_file(
        target / SINGLE,
        {
            "__metadata__": {"format": "pt"},
            "a": tensor([4], 0, 16),
            "b": tensor([2, 2], 16, 32),
        },
        np.arange(8, dtype="<f4").tobytes(),
    )
    return target


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """a and b in one file, c in another, and the index that says so."""
    target = tmp_path / "sharded"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(CONFIG))
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(2, 2)}, target / one)
    save_file({"c": torch.ones(3)}, target / two)
    index(target, {"a": one, "b": one, "c": two})
    return target


def index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map})
    (folder / INDEX).write_text(text)


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


# --------------------------------------------------------------------------------------------
# Sound ones
# --------------------------------------------------------------------------------------------


def test_reads_what_is_there(folder: Path) -> None:
    found = opened(folder)
    assert list(found.tensors) == ["a", "b"]
    assert found.tensors["b"].shape == (2, 2)
    assert found.read("b").tolist() == [[4, 5], [6, 7]]
    assert found.weight_files == (SINGLE,)
    assert found.model_type == "llama"
    assert found.size == (folder / SINGLE).stat().st_size


def test_reads_shards(sharded: Path) -> None:
    found = opened(sharded)
    assert set(found.tensors) == {"a", "b", "c"}
    assert len(found.weight_files) == 2
    assert found.read("c").tolist() == [1, 1, 1]
    assert INDEX in found.side_files


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_headers_agree_with_the_library(family: str, tiny: Tiny) -> None:
    found = opened(tiny(family, shards=3))
    assert len(found.weight_files) >= 3
    names = set()
    for file in found.weight_files:
        with safe_open(found.folder / file, "np") as library:
            for name in library.keys():  # noqa: SIM118 - no mapping
                names.add(name)
                entry = found.tensors[name]
                expected = library.get_tensor(name)
                assert entry.file == file
                assert entry.shape == expected.shape
                np.testing.assert_array_equal(found.read(name), expected)
    assert names == set(found.tensors)


def test_empty_and_scalar_tensors(folder: Path) -> None:
    header = {"e": tensor([0, 4], 0, 0), "s": tensor([], 0, 4), "z": tensor([0], 4, 4)}
    raw_file(folder / SINGLE, header, np.float32(2.5).tobytes())
    found = opened(folder)
    assert found.read("s") == 2.5
    assert found.read("e").shape == (0, 4)


def test_sub_byte_and_integer_formats_are_carried_but_not_read(folder: Path) -> None:
    header = {"p": tensor([8], 0, 4, "F4"), "i": tensor([4], 4, 8, "I8")}
    raw_file(folder / SINGLE, header, bytes(8))
    found = opened(folder)
    for name in ("p", "i"):
        with pytest.raises(Unsupported, match="quantised"):
            found.read(name)


# --------------------------------------------------------------------------------------------
# Damaged headers
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 9, 40, -16, -1])
def test_truncated(folder: Path, keep: int) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    assert SINGLE in refused(folder)


def test_too_long(folder: Path) -> None:
    with open(folder / SINGLE, "ab") as file:
        file.write(b"\0")
    assert "fetch the file again" in refused(folder)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_absurd_header_length(folder: Path, length: int) -> None:
    raw_file(folder / SINGLE, {"a": tensor([4], 0, 16)}, bytes(16), length=length)
    assert "no valid safetensors header" in refused(folder)


def test_header_length_above_what_the_library_reads(folder: Path) -> None:
    """A sparse file that claims a header of 200 MB: refused without reading it."""
    with open(folder / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    assert "no valid safetensors header" in refused(folder)


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, 24, "overlap"),
        ({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}, 16, "overlap"),
        ({"a": tensor([4], 0, 16), "b": tensor([4], 20, 36)}, 36, "gap"),
        ({"a": tensor([4], 4, 20)}, 20, "gap"),
        ({"a": tensor([4], 0, 16)}, 20, "bytes"),
        ({"a": tensor([5], 0, 16)}, 16, "disagree"),
        ({"a": tensor([2, 3], 0, 16)}, 16, "disagree"),
        ({"a": tensor([4], 0, 16, "BF16")}, 16, "disagree"),
        ({"a": tensor([3], 0, 1, "F4")}, 1, "disagree"),
        ({"a": tensor([4], 16, 0)}, 16, "disagree"),
        ({"a": tensor([2**62, 2**62], 0, 16)}, 16, "disagree"),
        ({"a": tensor([4], 0, 16, "F33")}, 16, "malformed"),
        ({"a": tensor([-4], 0, -16)}, 16, "malformed"),
        ({"a": tensor([4.0], 0, 16)}, 16, "malformed"),
        ({"a": tensor([True], 0, 4)}, 4, "malformed"),
        ({"a": tensor([2**63 + 1, 0], 0, 0)}, 0, "malformed"),
        ({"a": tensor([1] * 65, 0, 4)}, 4, "malformed"),
        ({"a": tensor([int("9" * 4000)] * 1000, 0, 4)}, 4, "malformed"),
        ({"a": tensor([4], 0, 10**4000)}, 16, "malformed"),
        ({"a": {"dtype": "F32", "shape": [4]}}, 16, "malformed"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, 16, "malformed"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, 16, "malformed"),
        ({"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, 16, "malformed"),
        ({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, 16, "malformed"),
        ({"a": "F32"}, 16, "malformed"),
        ({"a": None}, 16, "malformed"),
        ([], 0, "no JSON object"),
        (b"{}}", 0, "damaged"),
        (b'{"a"', 0, "damaged"),
        (b'{"\xff": 1}', 0, "damaged"),
        (b"[" * 100_000, 0, "damaged"),
    ],
)
def test_bad_header(folder: Path, header: Any, data: int, word: str) -> None:
    raw_file(folder / SINGLE, header, bytes(data))
    assert word in refused(folder)


def test_name_given_twice(folder: Path) -> None:
    entry = json.dumps(tensor([4], 0, 16))
    raw_file(folder / SINGLE, f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(16))
    assert "'a' appears twice" in refused(folder)


@hypothesis.settings(max_examples=150)
@given(data=st.binary(max_size=80))
def test_any_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint):
        read_header(path)


@hypothesis.settings(max_examples=150)
@given(position=st.integers(0, 250), value=st.integers(0, 255))
def test_any_byte_changed(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Either refused, or as the library reads it; never another exception."""
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        found = read_header(path)
    except BadCheckpoint:
        return
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(found)


# --------------------------------------------------------------------------------------------
# Index and files
# --------------------------------------------------------------------------------------------


def test_missing_shard(sharded: Path) -> None:
    name = weight_map(sharded)["c"]
    (sharded / name).unlink()
    assert f"names {name}, which is not there; fetch the missing shards." in refused(sharded)


def test_index_names_a_tensor_that_is_not_there(sharded: Path) -> None:
    index(sharded, {**weight_map(sharded), "d": weight_map(sharded)["c"]})
    assert "places d in" in refused(sharded)


def test_index_omits_a_tensor(sharded: Path) -> None:
    table = weight_map(sharded)
    del table["b"]
    index(sharded, table)
    assert "the index omits it" in refused(sharded)


def test_tensor_in_another_file(sharded: Path) -> None:
    table = weight_map(sharded)
    table["b"] = table["c"]
    index(sharded, table)
    sentence = refused(sharded)
    assert "places b in model-00002" in sentence
    assert "lies in model-00001" in sentence


def test_tensor_in_two_files(sharded: Path) -> None:
    save_file({"c": torch.ones(3), "a": torch.ones(4)}, sharded / weight_map(sharded)["c"])
    assert "stored both in" in refused(sharded)


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".", ".."),
        *("\0", "a\nb", "\ud800", 7, None, ["x"]),
    ],
)
def test_index_that_leaves_the_folder(sharded: Path, name: Any) -> None:
    save_file({"c": torch.ones(3)}, sharded.parent / "outside.safetensors")
    index(sharded, {**weight_map(sharded), "c": name})
    refused(sharded)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff", "[" * 99999],
)
def test_damaged_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content, encoding="latin-1")
    assert INDEX in refused(sharded)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert "fetch the index too" in refused(sharded)


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert SINGLE in refused(folder)


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    refused(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"{'a': 1}", b"[" * 99999, b"9" * 5000],
)
def test_damaged_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(folder)


def test_not_a_folder(tmp_path: Path) -> None:
    assert "not a directory" in refused(tmp_path / "nothing")


# --------------------------------------------------------------------------------------------
# Side files
# --------------------------------------------------------------------------------------------

SIDE = [
    "LICENSE",
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.model",
    "1_Pooling/config.json",
]
OTHER_WEIGHTS = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "model.fp16.safetensors",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/config.json",
    "original/params.json",
    "openvino/openvino_model.xml",
]
NOT_OF_THE_MODEL = [".git/HEAD", ".cache/huggingface/download/x.metadata"]
LEFT_OUT = {*OTHER_WEIGHTS, ".git/", ".cache/"}


def test_side_files(folder: Path) -> None:
    for name in (*SIDE, *OTHER_WEIGHTS, *NOT_OF_THE_MODEL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    found = opened(folder)
    assert set(found.side_files) == {*SIDE, "config.json"}
    assert set(found.left_out) == LEFT_OUT
    assert found.file_sizes["merges.txt"] == len("merges.txt")
    plan = make_plan(found, (), folder.parent / "out")
    assert set(plan.summary()["left_out"]) == LEFT_OUT
    assert {file["name"] for file in plan.summary()["files"]} == {*SIDE, "config.json", SINGLE}


def test_a_stray_pickle_is_left_out_and_named(
    tiny_copy: Tiny, run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tiny_copy()
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    words = ("convert", folder, "--layer", 3, "--no-check", "-o", tmp_path / "out")
    assert "pytorch_model.bin" in run(*words, "--dry-run").ok().stdout
    run(*words, "--quiet").ok()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert manifest["left_out"] == ["pytorch_model.bin"]


def test_the_hubs_cache_is_made_of_links(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(tmp_path / "models--a--b" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert opened(snapshot).file_sizes


@pytest.mark.parametrize("name", ["config.json", SINGLE, "merges.txt", "deep/config.json"])
def test_links_that_leave_the_folder(name: str, folder: Path, tmp_path: Path) -> None:
    """Or a stranger's checkpoint could have a file of the user's copied and published."""
    (folder / "deep").mkdir()
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert "link out of its checkpoint" in refused(folder)


def test_links_within_the_folder(folder: Path) -> None:
    (folder / "merges.txt").symlink_to("config.json")
    assert "merges.txt" in opened(folder).side_files


def test_links_to_folders_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "more").symlink_to(tmp_path)
    assert "link to a folder" in refused(folder)


def test_a_broken_link_is_named(folder: Path) -> None:
    (folder / "merges.txt").symlink_to(folder / "gone")
    assert "merges.txt" in refused(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "merges.txt")
    assert "merges.txt" in refused(folder)


def test_shapes_against_the_configuration(tiny_copy: Tiny, tmp_path: Path) -> None:
    """Headers and config.json must describe the same model."""
    import surgery

    for change in (
        {"hidden_size": 65},
        {"num_hidden_layers": 9},
        {"num_hidden_layers": 10**9},
        {"vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 10**8}},
        {"num_local_experts": 10**8},
        {"hidden_size": "x"},
        {"num_hidden_layers": None},
        {"hidden_size": True},
    ):
        folder = tiny_copy()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(SurgeryError) as error:
            surgery.convert(str(folder), layer=3, check=False, output=tmp_path / "out")
        assert error.value.exit_code == 7, change
        shutil.rmtree(folder)


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "head_dim"])
def test_a_model_larger_than_what_is_stored(key: str, tiny_copy: Tiny, tmp_path: Path) -> None:
    """Gigabytes that transformers would make before it compares shapes."""
    import surgery

    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 10**7}))
    with pytest.raises(BadCheckpoint, match="parameters, but it holds only"):
        surgery.analyze(str(folder))
    with pytest.raises(BadCheckpoint, match="parameters, but it holds only"):
        surgery.convert(str(folder), layer=3, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_missing_from_one_layer(tiny_copy: Tiny, tmp_path: Path) -> None:
    import surgery

    folder = tiny_copy()
    with safe_open(folder / SINGLE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["model.layers.6.self_attn.k_proj.weight"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"lacks model\.layers\.6\.self_attn\.k_proj\.weight"):
        surgery.convert(str(folder), layer=3, check=False, output=tmp_path / "out")
