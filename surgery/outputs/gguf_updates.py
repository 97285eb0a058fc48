"""The updates of the sink fold under llama.cpp's names, and in its order of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import Unsupported
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.gguf_file import GgufFile, read_gguf, shards_of, values_of
from surgery.folds.edits import Edit, RankOne
from surgery.models.anatomy import Anatomy, is_multimodal, text_config
from surgery.outputs.gguf_names import MANIFEST_KEY, base_model, gguf_name
from surgery.outputs.low_rank import Term, response, terms_of

# Architectures whose GGUF keeps the rows of every projection in the checkpoint's order, and those
# whose q and k rows llama.cpp's converter regroups for its rotary embedding. By model_type.
_PLAIN = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
_REGROUPED = {"llama": "llama", "mistral": "llama", "smollm3": "smollm3"}
# The same for multimodal models that hold such a text decoder, by their own model_type; the
# converter calls Mistral 3 by that name since it knows Ministral 3, and llama before.
_MULTIMODAL = {"gemma3": "gemma3", "mistral3": "mistral3"}


@dataclass(frozen=True)
class GgufUpdate:
    """A rank-one update under llama.cpp's name of the tensor, rows in its order."""

    tensor: str
    a: NDArray[np.float32]
    b: NDArray[np.float32]


def llama_architecture(kind: str, config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a safetensors model's architecture.

    Args:
        kind: model_type of the text decoder.
        config: of the whole model.

    Raises:
        Unsupported: where its row order in GGUF is not known here.
    """
    architecture, whole = _PLAIN.get(kind) or _REGROUPED.get(kind), str(config.get("model_type"))
    if architecture is not None and is_multimodal(config):
        architecture = _MULTIMODAL.get(whole)
    if architecture is None:
        raise Unsupported(
            f"How llama.cpp orders the rows of {whole} projections is not known here; give the "
            ".gguf file itself as MODEL, from which --as gguf-adapter works for any architecture."
        )
    return architecture


def gguf_updates(
    terms: Sequence[Term], anatomy: Anatomy, config: Mapping[str, Any]
) -> tuple[str, list[GgufUpdate]]:
    """llama.cpp's architecture and updates for a safetensors base.

    Raises Unsupported for architectures whose row order in GGUF is not known here.
    """
    kind = anatomy.model_type
    architecture = llama_architecture(kind, config)
    text = text_config(config)
    heads = int(text["num_attention_heads"]) if kind in _REGROUPED else 0
    key_heads = int(text.get("num_key_value_heads") or heads) if heads else 0
    updates = []
    for term in terms:
        name = gguf_name(architecture, anatomy.depth, term.tensor)
        b = term.b
        if heads and name.endswith(("attn_q.weight", "attn_k.weight")):
            b = regroup(b, heads if name.endswith("attn_q.weight") else key_heads)
        updates.append(GgufUpdate(name, term.a, b))
    return architecture, updates


def regroup(rows: NDArray, heads: int) -> NDArray:
    """Rows from halves to pairs within each head: what llama.cpp's converter does to q and k."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def gguf_updates_of(
    files: Sequence[GgufFile], terms: Sequence[Term], anatomy: Anatomy, edits: Sequence[RankOne]
) -> tuple[str, list[GgufUpdate]]:
    """The same for a GGUF base, from its own tensors, whatever the order of their rows.

    Raises Unsupported where a tensor of the GGUF is not the dequantised one with its rows in
    another order.
    """
    architecture = str(files[0].values.get("general.architecture"))
    updates = []
    for term, edit in zip(terms, edits, strict=True):
        name = gguf_name(architecture, anatomy.depth, term.tensor)
        found = next(((f, f.tensors[name]) for f in files if name in f.tensors), None)
        b = None if found is None else response(values_of(*found), edit)
        if b is None or not np.allclose(np.sort(b), np.sort(term.b), rtol=1e-4, atol=1e-6):
            raise Unsupported(f"{name} of the GGUF does not hold the rows of {term.tensor}.")
        updates.append(GgufUpdate(name, term.a, b))
    return architecture, updates


def updates_for(
    checkpoint: Checkpoint, anatomy: Anatomy, edits: Sequence[Edit]
) -> tuple[str, list[GgufUpdate]]:
    """llama.cpp's architecture and the updates behind the edits of a sink fold."""
    terms = terms_of(checkpoint, anatomy, edits)
    if checkpoint.gguf is None:
        return gguf_updates(terms, anatomy, checkpoint.config)
    files = [read_gguf(shard) for shard in shards_of(checkpoint.gguf)]
    low_rank = [edit for edit in edits if isinstance(edit, RankOne)]
    return gguf_updates_of(files, terms, anatomy, low_rank)


def write_gguf_adapter(
    path: Path,
    architecture: str,
    updates: Sequence[GgufUpdate],
    strength: float,
    origin: Origin,
    manifest: str,
) -> None:
    """Write a LoRA that llama.cpp loads (--lora), with its provenance in the metadata."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", strength)
    writer.add_name(f"{origin.name.rsplit('/', 1)[-1]} WeMask")
    writer.add_finetune("WeMask")
    writer.add_base_model_count(1)
    for key, value in base_model(origin).items():
        writer.add_string(f"general.base_model.0.{key}", value)
    writer.add_string(MANIFEST_KEY, manifest)
    for update in updates:
        writer.add_tensor(f"{update.tensor}.lora_a", update.a[None, :])
        writer.add_tensor(f"{update.tensor}.lora_b", update.b[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
