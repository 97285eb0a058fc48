"""Every parser that meets a stranger's bytes, each as a function of bytes.

A target returns, or raises a SurgeryError of one sentence. Whatever else it raises is a finding.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files import checkpoint, gguf_file, safetensors_file, text
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.safetensors_file import TensorEntry
from surgery.files.weights import Weights
from surgery.models import anatomy, families
from surgery.outputs import card, manifest, results, treatment
from surgery.training import recipe

# What a message may at most be long: it must not repeat a whole hostile file.
LONGEST_MESSAGE = 20_000


class _Bytes:
    """One file in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def size(self, file: str) -> int:
        return len(self.data)

    def read(self, file: str, begin: int, end: int) -> bytes:
        raw = self.data[begin:end]
        if len(raw) != end - begin:
            raise BadCheckpoint(f"{file} ends early; fetch it again.")
        return raw


@lru_cache(maxsize=1)
def _folder() -> Path:
    """A folder in memory where there is one, kept as long as the process lives."""
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="surgery-fuzz-", dir=base))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def safetensors(data: bytes) -> None:
    """A safetensors file, of which the header is read."""
    safetensors_file.parse_header(_Bytes(data), "model.safetensors")  # type: ignore[arg-type]


def index(data: bytes) -> None:
    """A checkpoint's index over one small shard."""
    folder = _folder() / "index"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        shard = len(header).to_bytes(8, "little") + header + b"x"
        (folder / "model-00001-of-00001.safetensors").write_bytes(shard)
    (folder / "model.safetensors.index.json").write_bytes(data)
    checkpoint.open_checkpoint(folder, Origin("directory", "x", "x"))


def config(data: bytes) -> None:
    """A config.json, from which the anatomy is described."""
    found = text.read_json(_file("config.json", data))
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(3)
        for name, shape in {
            "input_layernorm": (8,),
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.qkv_proj": (16, 8),
        }.items()
    }
    tensors = {
        name: TensorEntry(name, "F32", shape, "model.safetensors", 0, 0)
        for name, shape in shapes.items()
    }
    opened = Checkpoint(_folder(), _ORIGIN, found, _WEIGHTS, tensors, ())
    anatomy.depth_of(found)
    anatomy.width_of(found)
    anatomy.describe(opened)


_ORIGIN = Origin("directory", "x", "x")
_WEIGHTS = Weights("model.safetensors", ("model.safetensors",), None)


def gguf(data: bytes) -> None:
    """A GGUF file, of which metadata and tensor records are read."""
    gguf_file.read_gguf(_file("model.gguf", data))


def surgery_json(data: bytes) -> None:
    """A manifest, and the edits it describes."""
    manifest.parse_manifest(text.read_json(_file("surgery.json", data)), "surgery.json")


def recipe_yaml(data: bytes) -> None:
    """A training recipe, up to the point where TRL takes over."""
    raw = recipe.read_recipe(_file("recipe.yaml", data))
    recipe._treatment(raw.get(treatment.BLOCK), "recipe.yaml")


def recipe_through_trl(data: bytes) -> None:
    """A training recipe, through the configurations of TRL and transformers."""
    _through_trl(recipe.read_recipe(_file("recipe.yaml", data)))


def recipe_values(data: bytes) -> None:
    """A whole recipe in which some keys, known ones, have strange values: three bytes for each."""
    method = treatment.METHODS[data[0] % 3 if data else 0]
    block: dict[str, Any] = {"method": method}
    raw: dict[str, Any] = {"model_name_or_path": "model", "dataset_name": "data"}
    known = _known_keys(method)
    for at in range(1, min(len(data), 25) - 2, 3):
        value = STRANGE[data[at + 2] % len(STRANGE)]
        key = known[(data[at] * 256 + data[at + 1]) % len(known)]
        (block if key in _BLOCK else raw)[key] = value
    _through_trl({**raw, treatment.BLOCK: block})


def _through_trl(raw: dict[str, Any]) -> None:
    """Parse a recipe; writing anything anywhere meanwhile is a finding."""
    environment, folder = dict(os.environ), _folder()
    _watch_writing()
    _written.clear()
    try:
        recipe.parse_recipe(raw, "recipe.yaml", folder / "checkpoints")
    finally:
        for name in {*os.environ} - {*environment}:
            del os.environ[name]
        os.environ.update(environment)
        written = [path for path in _written if "__pycache__" not in path]
        assert not written, f"parsing a recipe wrote {written}"


@lru_cache(maxsize=3)
def _known_keys(method: str) -> list[str]:
    found = {field.name for kind in recipe._kinds(method) for field in fields(kind)}
    return sorted(found | _BLOCK)


_BLOCK = {field.name for field in fields(treatment.Treatment)}


_written: list[str] = []
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@lru_cache(maxsize=1)
def _watch_writing() -> None:
    def audit(event: str, given: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(given[2], int) and given[2] & _WRITING
        # A number is a file that is open already, which closing it would take away.
        if (
            opened
            or (event == "open" and isinstance(given[0], int))
            or event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen")
        ):
            _written.append(str(given[0]))

    # The first parse imports much, which writes byte code and makes folders of its own.
    recipe.parse_recipe({"model_name_or_path": "m", "dataset_name": "d"}, "recipe.yaml", _folder())
    sys.addaudithook(audit)


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**63, 10**300, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "no", "steps", "all", "auto", "cuda", "cpu", "1", "-1", "1e400", "nan", "{", "[1",
    "{}", '{"a": 1}', "/", "/dev/zero", "/etc/passwd", "../x", "a\0b", "\x1b[2J", "%s {0}",
    "x" * 5000, "full_shard auto_wrap", "adamw_torch",
    "cosine", "tensorboard", "float32", "float8", "\ud800",
    [], [None], [1, "a"], ["q_proj"], ["x"] * 300, [[[]]], [{}],
    {}, {"a": 1}, {1: 2}, {"path": "x"}, {"a": {"b": [None]}}, b"\xff", date(2020, 1, 1),
)  # fmt: skip


def model_card(data: bytes) -> None:
    """The base's model card, of which the front matter is inherited."""
    card.front_matter(_file("README.md", data))


def results_json(data: bytes) -> None:
    """A results file for a card."""
    found = text.read_json(_file("results.json", data))
    try:
        results.check_results(found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # as results_for does
        raise BadCheckpoint(f"damaged: {error!r}"[:200]) from error


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, which transformers reads."""
    _load_tokenizer("tokenizer.json", data)


def tokenizer_config(data: bytes) -> None:
    """A tokenizer_config.json, which transformers reads."""
    _load_tokenizer("tokenizer_config.json", data)


def special_tokens(data: bytes) -> None:
    """A special_tokens_map.json, which transformers reads."""
    _load_tokenizer("special_tokens_map.json", data)


def _load_tokenizer(name: str, data: bytes) -> None:
    from surgery.models.loading import load_tokenizer

    folder = _folder() / "tokenizer"
    folder.mkdir(exist_ok=True)
    whole = (Path(__file__).parent / "corpus" / "tokenizer" / "whole").read_bytes()
    usual = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": whole,
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    }
    for path in folder.iterdir():
        path.unlink()
    for file, content in {**usual, name: data}.items():
        (folder / file).write_bytes(content)
    load_tokenizer(folder)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "gguf": gguf,
    "surgery_json": surgery_json,
    "recipe_yaml": recipe_yaml,
    "recipe_through_trl": recipe_through_trl,
    "recipe_values": recipe_values,
    "model_card": model_card,
    "results_json": results_json,
    "tokenizer": tokenizer,
    "tokenizer_config": tokenizer_config,
    "special_tokens": special_tokens,
}


def attempt(name: str, data: bytes) -> bool:
    """Whether a target took the bytes; False after one sentence, anything else is raised."""
    try:
        TARGETS[name](data)
    except SurgeryError as error:
        message = str(error)
    else:
        return True
    assert message.strip(), "an error without words"
    assert len(message) < LONGEST_MESSAGE, f"{len(message)} characters of message"
    return False


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with: whole ones, and what once went wrong."""
    kept = sorted((Path(__file__).parent / "corpus" / name).glob("*"))
    made = []
    if name == "config":
        made = [
            json.dumps({"model_type": family.model_types[0], **_SMALL}).encode()
            for family in families.FAMILIES
        ]
    return [path.read_bytes() for path in kept] + made


_SMALL = {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2}
