"""A few layers and words of the demo model's GGUF, written by the gguf package, quantised."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from surgery.patient.source import _demo_file

KEPT = 4
# The vocabulary is in the order in which its tokens were merged: any beginning of it is one too.
WORDS = 2000
# From here on the sink token is large enough to be told from the others.
LAYER = 2


def gguf_cut(path: Path, *, tensors_per_shard: int = 0) -> Path:
    """Write the first layers of SmolLM2-135M-Instruct, Q4_1; returns the (first) file."""
    reader, contents = _demo()
    contents = dict(contents)
    tokens = contents["tokenizer.ggml.tokens"][:WORDS]
    known = set(tokens)
    contents["tokenizer.ggml.tokens"] = tokens
    contents["tokenizer.ggml.token_type"] = contents["tokenizer.ggml.token_type"][:WORDS]
    contents["tokenizer.ggml.merges"] = [
        merge
        for merge in contents["tokenizer.ggml.merges"]
        if {merge.replace(" ", ""), *merge.split(" ")} <= known
    ]
    contents["llama.block_count"] = KEPT
    contents["llama.vocab_size"] = len(tokens)
    writer = GGUFWriter(path, "llama", split_max_tensors=tensors_per_shard)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, contents[name], field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or int(parts[1]) < KEPT:
            rows = tensor.data[: len(tokens)] if parts[0] == "token_embd" else tensor.data
            writer.add_tensor(tensor.name, rows, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}*.gguf"))


@lru_cache(maxsize=1)
def _demo() -> tuple[GGUFReader, dict[str, Any]]:
    """The demo's file and the values in its header, which take seconds to read."""
    reader = GGUFReader(_demo_file())
    return reader, {name: field.contents() for name, field in reader.fields.items()}
