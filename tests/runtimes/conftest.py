"""What every runtime is asked, and the table of what they answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.patient.source import _demo_file

PROMPTS = (
    "The lighthouse keeper walked up the stairs and",
    "Question: What is the capital of France?\nAnswer:",
    "def fibonacci(n):\n    ",
)
TOKENS = 32
# SmolLM2's Massive Emergence Layer; locating it is tested elsewhere.
LAYER = 11
RUNNERS = Path(__file__).with_name("runners.py")

Answer = dict[str, Any]
_rows: list[tuple[str, ...]] = []


@dataclass(frozen=True)
class Models:
    """The demo model and its conversions, in both containers.

    base, norm, sink: folders. base_gguf, norm_gguf: the same in float32 GGUF. quantised,
    norm_quantised: the Q4_1 file it came from and its conversion. adapter: the sink fold for
    llama.cpp.
    """

    base: Path
    norm: Path
    sink: Path
    base_gguf: Path
    norm_gguf: Path
    quantised: Path
    norm_quantised: Path
    adapter: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    work = tmp_path_factory.mktemp("models")
    quick: dict[str, Any] = {"layer": LAYER, "check": False}
    sink = {**quick, "fold": "sink", "calibration_tokens": 2048}
    base_gguf = float32_gguf(_demo_file(), work / "base.gguf")

    def made(model: str, name: str, **options: Any) -> Path:
        return surgery.convert(model, output=work / name, **options).output

    return Models(
        base=surgery.resolve("demo").folder,
        norm=made("demo", "norm", **quick),
        sink=made("demo", "sink", **sink),
        base_gguf=base_gguf,
        norm_gguf=made(str(base_gguf), "norm.gguf", **quick),
        quantised=_demo_file(),
        norm_quantised=made("demo", "norm-q4.gguf", **quick),
        adapter=made("demo", "adapter.gguf", form="gguf-adapter", **sink),
    )


def float32_gguf(source: Path, target: Path) -> Path:
    """The same GGUF with every tensor dequantised.

    llama.cpp quantises activations too where it multiplies them with quantised weights; in float32
    it computes what transformers computes on the dequantised weights.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            value = 0 if name == "general.file_type" else field.contents()
            writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="session")
def prompts(models: Models) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.base)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="session")
def ask(
    prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Answer]:
    """`ask(runtime, model, adapter)`: what a runtime answers, in a process of its own."""
    known: dict[tuple[str, ...], Answer] = {}

    def run(runtime: str, model: Path, adapter: Path | None = None, path: str = "") -> Answer:
        words = [runtime, str(model), *([str(adapter)] if adapter else [])]
        key = (*words, path)
        if key not in known:
            work = tmp_path_factory.mktemp("runtime")
            job = {"prompts": prompts, "tokens": TOKENS, "end": 2, "work": str(work)}
            paths = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))
            done = subprocess.run(
                [sys.executable, str(RUNNERS), *words],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"},
                timeout=1200,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            known[key] = json.loads(done.stdout.splitlines()[-1])
        return known[key]

    return run


@pytest.fixture(scope="session")
def report() -> Callable[..., None]:
    """`report(runtime, version, what agreed)`: a row of the table in the end."""

    def add(*row: str) -> None:
        _rows.append(row)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table for docs/runtimes.md."""
    if _rows:
        terminalreporter.section("runtimes against transformers, measured")
        for row in (("runtime", "version", "container", "agreed"), ("---",) * 4, *_rows):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
