"""Where known decoder families keep their attention input: data, not code.

Every entry is checked against the model itself by `surgery.trace` before anything is written
(unless the checks are switched off), so a wrong or outdated row is a refusal, not a corrupted
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """One layout of decoder layers.

    layers: module path of the list of decoder layers. norm: the pre-attention norm, relative to
    a layer. attention: the attention module. readers: the linears that read the attention input.
    null_gain: the stored gain that means zero (-1 in unit-offset norms, which multiply by 1 + w).
    transposed: readers are Conv1D, stored [in, out]. shared_norm: who else reads the norm's
    output; empty when it feeds attention alone. refusal: why no fold is possible at all.
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    norm: str = "input_layernorm"
    attention: str = "self_attn"
    readers: tuple[str, ...] = _QKV
    null_gain: float = 0.0
    transposed: bool = False
    shared_norm: str = ""
    refusal: str = ""


_POST_NORM = (
    "attention reads the residual stream directly (the norms come after attention), so there is "
    "no normed attention input to mask"
)
_PARALLEL = "the MLP, which runs in parallel to attention, reads the same norm"

FAMILIES: tuple[Family, ...] = (
    Family(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "mixtral",
            "granite",
            "smollm3",
        )
    ),
    Family(("gemma", "gemma2", "gemma3_text"), null_gain=-1.0),
    Family(("phi3",), readers=("self_attn.qkv_proj",)),
    Family(
        ("gpt_neox",),
        layers="gpt_neox.layers",
        attention="attention",
        readers=("attention.query_key_value",),
    ),
    Family(
        ("gpt2",),
        layers="transformer.h",
        norm="ln_1",
        attention="attn",
        readers=("attn.c_attn",),
        transposed=True,
    ),
    Family(("cohere",), shared_norm=_PARALLEL),
    Family(("phi",), shared_norm=_PARALLEL),
    Family(("olmo2", "olmo3", "exaone4"), refusal=_POST_NORM),
)

_BY_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a configuration, or None when the table does not know it."""
    return _BY_TYPE.get(str(config.get("model_type", "")))
