"""A Llama checkpoint of any size, made of random finite bfloat16: `big_checkpoint.py DIR`.

Written directly, block by block, because going through transformers would need the memory that
the benchmark is about.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_BLOCK = 8 * 1024 * 1024
# Bit 14 is the exponent's highest: without it every pattern is a finite number below 2.
_FINITE = 0xBFFF
# Consecutive bit patterns from 2**-15 on: positive, normal and all different, so that the largest
# gains are the same ones whoever sorts them.
_FIRST_GAIN = 0x3800


@dataclass(frozen=True)
class Shape:
    """The architecture; depth follows from the size that is asked for."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_heads: int
    depth: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order of the model."""
        hidden, head = self.hidden, self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.depth):
            yield from (
                (f"model.layers.{layer}.{name}.weight", shape)
                for name, shape in (
                    ("input_layernorm", (hidden,)),
                    ("self_attn.q_proj", (hidden, hidden)),
                    ("self_attn.k_proj", (self.key_heads * head, hidden)),
                    ("self_attn.v_proj", (self.key_heads * head, hidden)),
                    ("self_attn.o_proj", (hidden, hidden)),
                    ("post_attention_layernorm", (hidden,)),
                    ("mlp.gate_proj", (self.intermediate, hidden)),
                    ("mlp.up_proj", (self.intermediate, hidden)),
                    ("mlp.down_proj", (hidden, self.intermediate)),
                )
            )
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(_bytes(shape) for _name, shape in self.tensors())


_LARGE = Shape(hidden=2048, intermediate=8192, vocabulary=32_000, heads=32, key_heads=8)
_SMALL = Shape(hidden=256, intermediate=1024, vocabulary=1000, heads=4, key_heads=2)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def shape_for(gigabytes: float) -> Shape:
    """The architecture nearest to a size, at least three layers deep."""
    chosen = _LARGE if gigabytes >= 1 else _SMALL
    fixed, layer = chosen.size(), Shape(**{**vars(chosen), "depth": 1}).size() - chosen.size()
    depth = max(3, round((gigabytes * 1e9 - fixed) / layer))
    return Shape(**{**vars(chosen), "depth": depth})


def make(folder: Path, gigabytes: float, shards: int = 8) -> None:
    """Write the checkpoint: shards, index, config.json and the least tokenizer that loads."""
    shape = shape_for(gigabytes)
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(shape, shards), start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_shard(folder / name, tensors, random)
        weight_map |= dict.fromkeys((tensor for tensor, _shape in tensors), name)
    index = {"metadata": {"total_size": shape.size()}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "tokenizer.json", _TOKENIZER)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
    )


def _shards(shape: Shape, count: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in order, cut into shards of about equal size."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(count)]
    total, position = shape.size(), 0
    for name, dimensions in shape.tensors():
        middle = position + _bytes(dimensions) // 2
        shards[count * middle // total].append((name, dimensions))
        position += _bytes(dimensions)
    return shards


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], random: np.random.Generator
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in tensors:
            if name.endswith("layernorm.weight"):
                gain = _FIRST_GAIN + random.permutation(shape[0])
                file.write(gain.astype("<u2").tobytes())
                continue
            for start in range(0, _bytes(shape), _BLOCK):
                block = np.frombuffer(random.bytes(min(_BLOCK, _bytes(shape) - start)), "<u2")
                file.write((block & _FINITE).tobytes())


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


_TOKENIZER: dict[str, object] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "word": 1}, "unk_token": "<unk>"},
}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make a checkpoint in a folder that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--shards", type=int, default=8)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.gigabytes, arguments.shards)


if __name__ == "__main__":
    main()
