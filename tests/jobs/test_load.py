"""Many conversions, and large plans."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
from script import start
from shared import Tiny

import surgery

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from crash_points import begin_child, end_of

linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc here")


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@linux
@pytest.mark.parametrize("number", [30, pytest.param(100, marks=pytest.mark.full)])
def test_a_hundred_in_a_row(
    number: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No growth of memory, open files, threads or temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    source = str(tiny("llama", shards=3))
    output = tmp_path / "work" / "out"

    def once() -> None:
        surgery.convert(source, layer=3, check=False, output=output, overwrite=True)

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for _ in range(10):
        once()
    before, memory = held(), resident()
    for _ in range(number):
        once()
    assert held() == before
    assert resident() - memory < 8e4 * number
    assert list(temporary.iterdir()) == []
    assert {path.name for path in output.parent.iterdir()} == {"out"}


@pytest.mark.parametrize(
    "shell", [False, pytest.param(True, marks=pytest.mark.full)], ids=["forked", "shell"]
)
def test_ten_at_once_into_one_output(shell: bool, tiny: Tiny, tmp_path: Path) -> None:
    """One wins, the others say that it exists; what is there is whole.

    In copies of this process, which begin at the same moment, or as typed ten times.
    """
    output = tmp_path / "work" / "out"
    ended = (typed_ten_times if shell else forked_ten_times)(tiny(), output, tmp_path)
    assert sorted(code for _, code in ended) == [0] + [2] * 9, ended
    for words, code in ended:
        assert "Traceback" not in words
        assert code == 0 or "exists already" in words or "failed" in words
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    assert surgery.verify(tmp_path / "work" / "out").passed


def typed_ten_times(source: Path, output: Path, _said: Path) -> list[tuple[str, int]]:
    """What each process says and its exit code."""
    words = ("--layer", "3", "--no-check", "--quiet", "-o", output)
    processes = [
        start(
            *(sys.executable, "-m", "surgery", "convert", source, *words),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(10)
    ]
    return [(process.communicate()[1], process.returncode) for process in processes]


def forked_ten_times(source: Path, output: Path, said: Path) -> list[tuple[str, int]]:
    """The same, in copies of this process."""

    def job(number: int) -> None:
        os.read(gate, 1)
        with open(said / f"{number}.txt", "w") as file:
            try:
                surgery.convert(str(source), layer=3, check=False, output=output)
            except surgery.SurgeryError as error:
                file.write(str(error))
                raise
            except BaseException:
                traceback.print_exc(file=file)
                raise

    gate, opener = os.pipe()
    children = [begin_child(partial(job, number)) for number in range(10)]
    os.close(gate)
    os.write(opener, b"x" * 10)
    os.close(opener)
    codes = [end_of(child) for child in children]
    return [((said / f"{number}.txt").read_text(), code) for number, code in enumerate(codes)]


def many(folder: Path, shards: int, each: int) -> Path:
    """A Llama checkpoint of empty-handed tensors in many shards: only its headers matter."""
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(4)
        for name, shape in {
            "input_layernorm": [16],
            **{f"self_attn.{letter}_proj": [16, 16] for letter in "qkvo"},
        }.items()
    }
    names = list(shapes) + [f"mtp.{number}" for number in range(shards * each - len(shapes))]
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, position = {}, 0
        for name in names[shard * each : (shard + 1) * each]:
            shape = shapes.get(name, [1])
            size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [position, position + size],
            }
            position += size
            weight_map[name] = file
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("shards", "each"), [(1, 10_000), (500, 20)])
def test_many_tensors_and_shards(shards: int, each: int, tmp_path: Path) -> None:
    """In less than two seconds of work; `benchmarks/planning.py` says how long it takes in all."""
    folder = many(tmp_path / "many", shards, each)
    begun = time.process_time()
    planned = surgery.convert(
        str(folder), layer=1, check=False, dry_run=True, output=tmp_path / "out"
    )
    assert time.process_time() - begun < 2
    assert len(planned.plan.files) == shards + 2
    done = surgery.convert(str(folder), layer=1, check=False, output=tmp_path / "out")
    assert len(done.plan.checkpoint.tensors) == 10_000
    assert len(done.plan.files) == shards + 2
    assert {edit.tensor for edit in done.plan.edits} == {"model.layers.2.input_layernorm.weight"}
