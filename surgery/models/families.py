"""Where known decoder families keep their attention input: data, not code.

Every entry is checked against the model itself by `surgery.trace` before anything is written
(unless the checks are switched off), so a wrong or outdated row is a refusal, not a corrupted
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Mixer:
    """One of several attention modules that the layers of a family may have.

    Attributes:
        attention: as in `Family`.
        readers: as in `Family`.
        last: name of a field of the configuration; the mixer belongs to that many last layers
            alone. Empty: to any layer.
    """

    attention: str
    readers: tuple[str, ...]
    last: str = ""


@dataclass(frozen=True)
class Case:
    """What differs from a family's row where its configuration says so.

    Attributes:
        when: fields of the configuration, each with the value it must have and the value that
            transformers takes when the field is missing.
        change: fields of `Family`.
    """

    when: tuple[tuple[str, Any, Any], ...]
    change: Mapping[str, Any]

    @property
    def condition(self) -> str:
        """The case in the words of a configuration."""
        return ", ".join(f"{field} = {str(value).lower()}" for field, value, _ in self.when)

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration is such a case."""
        return all(config.get(field, default) == value for field, value, default in self.when)


@dataclass(frozen=True)
class Family:
    """One layout of decoder layers.

    Attributes:
        model_types: the configurations that have it.
        layers: module path of the list of decoder layers.
        norm: the pre-attention norm, relative to a layer.
        attention: the attention module, relative to a layer.
        readers: the linears that read the attention input, relative to a layer.
        mixers: what stands in place of attention and readers in some layers; a layer has the first
            of all these whose tensors the checkpoint holds.
        hybrid: layers without any of them are legal, and have no attention.
        norm_kind: for people.
        null_gain: the stored gain that means zero (-1 in norms that multiply by 1 + w).
        has_gain: whether the norm has parameters at all.
        transposed: readers are Conv1D, stored [in, out].
        shared_norm: who else reads the norm's output; empty when it feeds attention alone.
        refusal: why no fold is possible at all.
        cases: the first that holds changes the row.
        lasts: whether a massive activation can stay in the residual stream, so that there is an
            emergence to locate.
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    norm: str = "input_layernorm"
    attention: str = "self_attn"
    readers: tuple[str, ...] = _QKV
    mixers: tuple[Mixer, ...] = ()
    hybrid: bool = False
    norm_kind: str = "RMS"
    null_gain: float = 0.0
    has_gain: bool = True
    transposed: bool = False
    shared_norm: str = ""
    refusal: str = ""
    cases: tuple[Case, ...] = ()
    lasts: bool = True

    @property
    def all_mixers(self) -> tuple[Mixer, ...]:
        """Every attention module a layer may have, in the order of preference."""
        limited = tuple(mixer for mixer in self.mixers if mixer.last)
        others = tuple(mixer for mixer in self.mixers if not mixer.last)
        return (*limited, Mixer(self.attention, self.readers), *others)

    @property
    def norm_refusal(self) -> str:
        """Why the `norm` fold is not possible; empty where it is."""
        return self.shared_norm if self.has_gain else NO_GAIN

    def folds(self) -> tuple[str, ...]:
        """The folds that a model of this row allows."""
        if self.refusal:
            return ()
        return ("qkv", "sink") if self.norm_refusal else ("norm", "qkv", "sink")


NO_GAIN = "the norm before attention has no parameters to fold it into"
_POST_NORM = (
    "attention reads the residual stream directly (the norms come after attention), so there is "
    "no normed attention input to mask"
)
_PARALLEL = "the MLP, which runs in parallel to attention, reads the same norm"
_SHARED_BLOCKS = (
    "its attention blocks are shared between layers, so an edit for one layer would reach others"
)
_UNIT_OFFSET: dict[str, Any] = {"norm_kind": "RMS, 1 + w", "null_gain": -1.0}
_LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_LATENT_DIRECT = Mixer("self_attn", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"))

_LLAMA_LIKE = (
    "llama mistral ministral ministral3 qwen2 qwen2_moe qwen3 qwen3_moe mixtral granite "
    "granitemoe granitemoeshared glm glm4 glm4_moe smollm3 gpt_oss llama4_text olmoe "
    "seed_oss ernie4_5 ernie4_5_moe hunyuan_v1_dense hunyuan_v1_moe minimax_m2 helium "
    "arcee cwm exaone_moe dots1 qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text"
)

FAMILIES: tuple[Family, ...] = (
    Family(tuple(_LLAMA_LIKE.split())),
    Family(("apertus",), norm="attention_layernorm"),
    Family(("gemma", "gemma2", "gemma3_text", "vaultgemma"), **_UNIT_OFFSET),
    Family(
        ("gemma3n_text",),
        mixers=(Mixer("self_attn", ("self_attn.q_proj",), last="num_kv_shared_layers"),),
        shared_norm="the laurel block reads the same norm",
    ),
    Family(
        ("gemma4_text",),
        mixers=(
            Mixer("self_attn", ("self_attn.q_proj",), last="num_kv_shared_layers"),
            Mixer("self_attn", ("self_attn.q_proj", "self_attn.k_proj")),
        ),
    ),
    Family(("phi3",), readers=("self_attn.qkv_proj",)),
    Family(
        ("qwen3_next",),
        mixers=(Mixer("linear_attn", ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")),),
        **_UNIT_OFFSET,
    ),
    Family(
        ("qwen3_5_text", "qwen3_5_moe_text"),
        mixers=(
            Mixer(
                "linear_attn",
                (
                    "linear_attn.in_proj_qkv",
                    "linear_attn.in_proj_z",
                    "linear_attn.in_proj_b",
                    "linear_attn.in_proj_a",
                ),
            ),
        ),
        **_UNIT_OFFSET,
    ),
    Family(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"),
        readers=_LATENT,
        mixers=(_LATENT_DIRECT,),
    ),
    Family(
        ("deepseek_v32", "glm_moe_dsa"),
        readers=(*_LATENT, "self_attn.indexer.wk", "self_attn.indexer.weights_proj"),
        mixers=(Mixer("self_attn", _LATENT),),
    ),
    Family(("olmo", "nanochat"), norm_kind="without parameters", has_gain=False),
    Family(("olmo2", "olmo3", "exaone4", "flex_olmo"), norm_kind="none", refusal=_POST_NORM),
    Family(("cohere", "cohere2"), norm_kind="LayerNorm without bias", shared_norm=_PARALLEL),
    Family(("phi",), norm_kind="LayerNorm", shared_norm=_PARALLEL),
    Family(
        ("gptj",),
        layers="transformer.h",
        norm="ln_1",
        attention="attn",
        readers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        norm_kind="LayerNorm",
        shared_norm=_PARALLEL,
    ),
    Family(
        ("codegen",),
        layers="transformer.h",
        norm="ln_1",
        attention="attn",
        readers=("attn.qkv_proj",),
        norm_kind="LayerNorm",
        shared_norm=_PARALLEL,
    ),
    Family(
        ("stablelm",),
        norm_kind="LayerNorm",
        cases=(Case((("use_parallel_residual", True, False),), {"shared_norm": _PARALLEL}),),
    ),
    Family(
        ("falcon",),
        layers="transformer.h",
        attention="self_attention",
        readers=("self_attention.query_key_value",),
        norm_kind="LayerNorm",
        shared_norm=_PARALLEL,
        cases=(
            Case((("parallel_attn", False, True),), {"shared_norm": ""}),
            Case(
                (("new_decoder_architecture", True, False), ("num_ln_in_parallel_attn", 1, None)),
                {},
            ),
            Case(
                (("new_decoder_architecture", True, False),),
                {"norm": "ln_attn", "shared_norm": ""},
            ),
        ),
    ),
    Family(
        ("gpt_neox",),
        layers="gpt_neox.layers",
        attention="attention",
        readers=("attention.query_key_value",),
        norm_kind="LayerNorm",
    ),
    Family(
        ("gpt2",),
        layers="transformer.h",
        norm="ln_1",
        attention="attn",
        readers=("attn.c_attn",),
        norm_kind="LayerNorm",
        transposed=True,
    ),
    Family(
        ("opt",),
        layers="model.decoder.layers",
        norm="self_attn_layer_norm",
        norm_kind="LayerNorm",
        cases=(Case((("do_layer_norm_before", False, True),), {"refusal": _POST_NORM}),),
    ),
    Family(
        ("bloom",),
        layers="transformer.h",
        attention="self_attention",
        readers=("self_attention.query_key_value",),
        norm_kind="LayerNorm",
        cases=(
            Case(
                (("apply_residual_connection_post_layernorm", True, False),),
                {
                    "refusal": "the norm's output is the residual too, which the attention module "
                    "adds to its result"
                },
            ),
        ),
    ),
    Family(
        ("mpt",),
        layers="transformer.blocks",
        norm="norm_1",
        attention="attn",
        readers=("attn.Wqkv",),
        norm_kind="LayerNorm without bias",
    ),
    Family(("starcoder2",), norm_kind="LayerNorm"),
    Family(("nemotron",), norm_kind="LayerNorm, 1 + w", null_gain=-1.0),
    Family(
        ("minimax",),
        mixers=(Mixer("self_attn", ("self_attn.qkv_proj", "self_attn.output_gate")),),
        shared_norm="the norm's output is the residual too",
        lasts=False,
    ),
    Family(("lfm2", "lfm2_moe"), norm="operator_norm", hybrid=True),
    Family(("jamba", "bamba", "granitemoehybrid"), hybrid=True),
    Family(
        ("nemotron_h",),
        norm="norm",
        attention="mixer",
        readers=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        hybrid=True,
    ),
    Family(
        ("falcon_h1",),
        shared_norm="the Mamba mixer, which runs in parallel to attention, reads the same norm",
    ),
    Family(("zamba", "zamba2"), refusal=_SHARED_BLOCKS),
    Family(
        ("longcat_flash",),
        refusal="each of its layers holds two attention blocks, so it has no one attention input",
    ),
    Family(
        ("hrm_text",),
        refusal="its layers run several times for each token, so no edit reaches one run alone",
    ),
)

_BY_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a configuration, or None when the table does not know it."""
    family = _BY_TYPE.get(str(config.get("model_type", "")))
    if family is None:
        return None
    case = next((case for case in family.cases if case.holds(config)), None)
    return replace(family, **case.change) if case is not None else family


# --------------------------------------------------------------------------------------------
# The table as `surgery families` shows it
# --------------------------------------------------------------------------------------------

# Models of several parts whose text decoder is one of the families, tried as whole checkpoints.
MULTIMODAL: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}


@dataclass(frozen=True)
class Row:
    """One kind of decoder, what is possible in it, and how that was tested.

    Attributes:
        family: its model type.
        when: the case of its configuration, or "".
        layers: module path of the list of decoder layers.
        norm: where the pre-attention norm lies in a layer.
        norm_kind: for people.
        readers: what reads the norm's output, by attention module.
        skipped: whether layers without attention are passed over.
        folds: those that are legal.
        refusal: why the others, or all, are not.
        select: the selections that are possible.
        located: whether a planted massive activation was found at its layer.
        bit_equal: folds whose written checkpoint, loaded by transformers, gave the logits of the
            hook to the bit.
        near: folds that did at the sink token, and came closer to the paper's mask than masking
            every token does.
        inside: multimodal models it was tested in.
    """

    family: str
    when: str
    layers: str
    norm: str
    norm_kind: str
    readers: tuple[tuple[str, ...], ...]
    skipped: bool
    folds: tuple[str, ...]
    refusal: str
    select: tuple[str, ...]
    located: bool
    bit_equal: tuple[str, ...]
    near: tuple[str, ...]
    inside: tuple[str, ...]


def rows() -> tuple[Row, ...]:
    """Every kind of decoder in the table, by name."""
    found = []
    for family in FAMILIES:
        for name in family.model_types:
            found.append(_row(name, "", family))
            found += [
                _row(name, case.condition, replace(family, **case.change)) for case in family.cases
            ]
    return tuple(sorted(found, key=lambda row: (row.family, row.when)))


def _row(name: str, when: str, family: Family) -> Row:
    folds = family.folds()
    selections = ("weight", "activation", "random") if family.has_gain else ("activation", "random")
    return Row(
        family=name,
        when=when,
        layers=family.layers,
        norm="" if family.refusal else family.norm,
        norm_kind=family.norm_kind,
        readers=() if family.refusal else tuple(mixer.readers for mixer in family.all_mixers),
        skipped=family.hybrid,
        folds=folds,
        refusal=family.refusal or family.norm_refusal,
        select=selections if folds else (),
        located=bool(folds) and family.lasts,
        bit_equal=tuple(fold for fold in folds if fold != "sink"),
        near=tuple(fold for fold in folds if fold == "sink"),
        inside=tuple(whole for whole, part in MULTIMODAL.items() if part == name and not when),
    )
