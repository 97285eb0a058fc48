"""The sink fold as an adapter: exactly a LoRA of rank 1, for a base that stays untouched.

W ← W − γ (W (m ⊙ c)) vᵀ is the low-rank update W + (α / r) B A with r = 1, A = vᵀ,
B = −W (m ⊙ c) and α = γ, so `lora_alpha` is the strength.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import BadCheckpoint, Unsupported
from surgery.files.checkpoint import Checkpoint, Origin
from surgery.files.safetensors_file import write_safetensors
from surgery.folds.fold import Edit
from surgery.models.anatomy import Anatomy, is_multimodal, text_config
from surgery.outputs.verification import Check, checked

if TYPE_CHECKING:
    from surgery.files.gguf_file import GgufFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class RankOne:
    """The update of one linear: W + α b aᵀ.

    module: its path in the loaded model. a: what it answers to, v, [D]; b: what it then adds,
    −W (m ⊙ c), [out]; both float32.
    """

    module: str
    tensor: str
    layer: int
    a: NDArray[np.float32]
    b: NDArray[np.float32]


def rank_one_terms(
    checkpoint: Checkpoint, anatomy: Anatomy, edits: Sequence[Edit]
) -> list[RankOne]:
    """The updates behind the edits of a sink fold, from the base's own weights."""
    terms = []
    for edit in edits:
        if edit.sink is None:
            raise Unsupported("Only --fold sink is a low-rank update; an adapter needs it.")
        found = anatomy.at(edit.layer)
        if edit.tensor not in found.weights:
            raise BadCheckpoint(f"{edit.tensor} does not read the attention input of its layer.")
        weight = checkpoint.read(edit.tensor)
        terms.append(
            RankOne(
                module=found.readers[found.weights.index(edit.tensor)],
                tensor=edit.tensor,
                layer=edit.layer,
                a=edit.sink.detector,
                b=response(weight if edit.axis == 1 else weight.T, edit),
            )
        )
    return terms


def response(weight: NDArray, edit: Edit) -> NDArray[np.float32]:
    """−W (m ⊙ c) of a weight [out, D], in float64, rounded once."""
    assert edit.sink is not None
    columns = weight[:, list(edit.dimensions)].astype(np.float64)
    return (-(columns @ edit.sink.center.astype(np.float64))).astype(np.float32)


def base_name(origin: Origin) -> str:
    """What `from_pretrained` finds a base by: a Hub id where there is one, else its path."""
    if origin.note:  # the demo: where its weights come from
        return origin.note.split(" ", 1)[0]
    return origin.name if origin.kind == "hub" else origin.typed


def peft_config(
    origin: Origin, terms: Sequence[RankOne], strength: float, *, transposed: bool
) -> dict[str, Any]:
    """adapter_config.json. Modules are named in full, so that no other module answers to a name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(origin),
        "revision": origin.commit,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": int(strength) if strength == int(strength) else strength,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": [term.module for term in terms],
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def write_peft(
    folder: Path, origin: Origin, terms: Sequence[RankOne], strength: float, *, transposed: bool
) -> tuple[str, ...]:
    """Write a PEFT adapter into a folder; returns the names of its files."""
    config = peft_config(origin, terms, strength, transposed=transposed)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, NDArray] = {}
    for term in terms:
        name = f"base_model.model.{term.module}"
        tensors[f"{name}.lora_A.weight"] = term.a[None, :]
        tensors[f"{name}.lora_B.weight"] = term.b[:, None]
    write_safetensors(
        folder / WEIGHTS,
        {name: ("F32", values.shape) for name, values in tensors.items()},
        lambda name: np.ascontiguousarray(tensors[name], dtype="<f4").tobytes(),
        {"format": "pt"},
    )
    return CONFIG, WEIGHTS


def peft_size(terms_out: Mapping[str, int], hidden_size: int) -> int:
    """About how many bytes an adapter takes, from the output sizes of the linears it updates."""
    return sum(4 * (hidden_size + size) + 400 for size in terms_out.values())


def verify_peft(
    folder: Path, terms: Sequence[RankOne], strength: float, *, transposed: bool
) -> Check:
    """The adapter's tensors and scale are what the base's weights and the manifest give."""
    from surgery.files.ranges import LocalFiles
    from surgery.files.safetensors_file import parse_header
    from surgery.files.text import read_json

    def test() -> str:
        config = read_json(folder / CONFIG)
        expected = peft_config(Origin("", "", ""), terms, strength, transposed=transposed)
        # Other keys too: PEFT takes patterns from some, which it searches for in its own time.
        for key in sorted({*expected, *config} - {"base_model_name_or_path", "revision"}):
            if config.get(key) != expected.get(key):
                raise BadCheckpoint(f"{CONFIG} has another {key}")
        files = LocalFiles(folder)
        entries = parse_header(files, WEIGHTS)
        for term in terms:
            for part, values in (("lora_A", term.a), ("lora_B", term.b)):
                name = f"base_model.model.{term.module}.{part}.weight"
                entry = entries.pop(name, None)
                if entry is None or files.read(WEIGHTS, entry.begin, entry.end) != values.tobytes():
                    raise BadCheckpoint(f"{name} is not what the base and the manifest give")
        if entries:
            raise BadCheckpoint(f"{WEIGHTS} holds the unexpected tensor {next(iter(entries))}")
        return f"{len(terms)} rank-one updates recomputed"

    return checked("the adapter equals the update recomputed from the base", test)


# --------------------------------------------------------------------------------------------
# For llama.cpp
# --------------------------------------------------------------------------------------------

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


def gguf_updates(
    terms: Sequence[RankOne], anatomy: Anatomy, config: Mapping[str, Any]
) -> tuple[str, list[GgufUpdate]]:
    """llama.cpp's architecture and updates for a safetensors base.

    Raises Unsupported for architectures whose row order in GGUF is not known here.
    """
    kind, whole = anatomy.model_type, str(config.get("model_type"))
    architecture = _PLAIN.get(kind) or _REGROUPED.get(kind)
    if architecture is not None and is_multimodal(config):
        architecture = _MULTIMODAL.get(whole)
    if architecture is None:
        raise Unsupported(
            f"How llama.cpp orders the rows of {whole} projections is not known here; give the "
            ".gguf file itself as MODEL, from which --as gguf-adapter works for any architecture."
        )
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


def gguf_name(architecture: str, depth: int, tensor: str) -> str:
    """llama.cpp's name of a checkpoint's tensor; Unsupported where its table has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if kinds:
        table = get_tensor_name_map(kinds[0], depth)
        # In a multimodal model the text decoder is one part of several, spelled in two ways.
        plain = tensor.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        found = table.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is not None:
            return str(found)
    raise Unsupported(f"llama.cpp's table of names for {architecture!r} has no {tensor}.")


def gguf_updates_of(
    files: Sequence[GgufFile], terms: Sequence[RankOne], anatomy: Anatomy, edits: Sequence[Edit]
) -> tuple[str, list[GgufUpdate]]:
    """The same for a GGUF base, from its own tensors, whatever the order of their rows.

    Raises Unsupported where a tensor of the GGUF is not the dequantised one with its rows in
    another order.
    """
    from surgery.files.gguf_file import values_of

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

    from surgery.outputs.gguf_conversion import MANIFEST_KEY

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


def base_model(origin: Origin) -> dict[str, str]:
    """A base as GGUF's `general.base_model.N.*` describes it."""
    organisation, _, name = (
        base_name(origin) if origin.kind == "hub" or origin.note else origin.name
    ).rpartition("/")
    found = {"name": name}
    if organisation:
        found["organization"] = organisation
        found["repo_url"] = f"https://huggingface.co/{organisation}/{name}"
    if origin.commit:
        found["version"] = origin.commit
    return found
