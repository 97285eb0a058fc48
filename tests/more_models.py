"""Tiny random checkpoints of every decoder family, a massive activation planted in each.

`tiny_models` knows seventeen families part by part. This module knows none of their parts: it
finds them by shape and name, so that one family more is one line in `CASES`::

    case = CASES["falcon-new"]
    folder = save(case, tmp_path / "falcon")   # massive from decoder layer case.layer on

The massive activation comes about as in `tiny_models.plant`: only `<bos>` has a component along a
*trigger* (two dimensions of opposite sign); nothing up to the planted layer writes there; one
intermediate neuron of that layer's feed-forward network reads it and writes a large vector.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import _save_tokenizer, _special_ids, make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, DEPTH, INNER = 64, 6, 96
MAGNITUDE = 3000.0
_SHARES = (0.80, 0.55, 0.24)  # of the massive vector's norm, by dimension


@dataclass(frozen=True)
class Case:
    """One model to test with.

    name: unique. model_type: of the text decoder. fields: of its configuration. layer: where the
    massive activation emerges. whole: the model type that the decoder is a part of, for
    multimodal models, and parts the configurations of its other parts. folds: those that must be
    legal. refused: what the refusal of `norm` (or of everything, when folds is empty) must name.
    lasts: whether a massive activation stays in the residual stream at all. from_five: whether
    transformers 4 laid it out otherwise, which must be noticed and refused.
    """

    name: str
    model_type: str
    fields: Mapping[str, Any]
    layer: int
    folds: tuple[str, ...] = ("norm", "qkv", "sink")
    refused: str = ""
    whole: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)
    lasts: bool = True
    from_five: bool = False

    @property
    def exists(self) -> bool:
        """Whether this release of transformers has the family."""
        return (self.whole or self.model_type) in CONFIG_MAPPING


NO_NORM = ("qkv", "sink")
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "num_key_value_heads": None,
    "head_dim": None,
}
_HEADS = {"num_key_value_heads": 4, "head_dim": None}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": INNER,
    "first_k_dense_replace": 1,
}
_LATENT = {
    **_HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "head_dim": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_GEMMA3N = {
    "vocab_size_per_layer_input": None,  # the vocabulary's own size
    "hidden_size_per_layer_input": 12,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "sliding_window": 64,
    "activation_sparsity_pattern": [0.0] * DEPTH,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_GEMMA4 = {
    "vocab_size_per_layer_input": None,
    "hidden_size_per_layer_input": 12,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "mlp_ratio": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 4,
}
FIVE = int(transformers.__version__.split(".")[0]) >= 5
_SECTIONS = {
    "rope_parameters" if FIVE else "rope_scaling": {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
    }
}


def _layer_types(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds)}


def _cases() -> Iterator[Case]:
    def case(name: str, model_type: str = "", fields: Any = None, layer: int = 0, **more: Any):
        # Where it does not matter, one of layers 1 to 3, by name.
        chosen = layer or 1 + zlib.crc32(name.encode()) % 3
        return Case(name, model_type or name, fields or {}, chosen, **more)

    def whole(name: str, model_type: str, fields: Any = None, vision: Any = None, **more: Any):
        return case(
            name, model_type, fields, whole=name, parts={"vision_config": vision or _VISION}, **more
        )

    # Dense, one norm before attention.
    for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "glm", "glm4", "arcee", "cwm"):
        yield case(name)
    for name in ("helium", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "ministral", "ministral3"):
        yield case(name)
    yield case("granite", fields={"attention_multiplier": 0.25, "residual_multiplier": 0.5})
    yield case("apertus")
    yield case("phi3")
    for name in ("gemma", "gemma2", "vaultgemma"):
        yield case(name, fields={"query_pre_attn_scalar": 16})
    yield case(
        "gemma3_text",
        fields={
            "query_pre_attn_scalar": 16,
            **_layer_types(*["sliding_attention", "full_attention"] * 3),
        },
    )
    # Mixtures of experts.
    yield case("qwen2_moe", fields={**_MOE, "shared_expert_intermediate_size": INNER})
    yield case("qwen3_moe", fields=_MOE)
    yield case("mixtral", fields=_LOCAL)
    yield case("granitemoe", fields=_LOCAL)
    yield case("granitemoeshared", fields={**_LOCAL, "shared_intermediate_size": INNER})
    yield case("glm4_moe", fields=_ROUTED)
    yield case("dots1", fields=_ROUTED)
    yield case("gpt_oss", fields=_LOCAL)
    yield case("llama4_text", fields={**_LOCAL, "intermediate_size_mlp": INNER})
    yield case("olmoe", fields=_MOE)
    yield case(
        "ernie4_5_moe",
        fields={
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": INNER,
        },
    )
    yield case("hunyuan_v1_moe", fields={"num_experts": 4, "moe_topk": 2})
    yield case("minimax_m2", fields=_LOCAL)
    yield case("exaone_moe", fields={**_MOE, "num_shared_experts": 1})
    # Latent attention.
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"):
        yield case(name, fields={**_LATENT, **_ROUTED})
    yield case("deepseek_v2-direct", "deepseek_v2", {**_LATENT, **_ROUTED, "q_lora_rank": None})
    yield case("deepseek_v3-direct", "deepseek_v3", {**_LATENT, **_ROUTED, "q_lora_rank": None})
    for name in ("deepseek_v32", "glm_moe_dsa"):
        yield case(name, fields={**_LATENT, **_ROUTED, **_INDEXER})
    # Shared keys and values, several residual streams.
    yield case("gemma3n_text", fields=_GEMMA3N, folds=NO_NORM, refused="laurel", from_five=True)
    yield case("gemma4_text", fields=_GEMMA4)
    yield case(
        "gemma4_text-k-is-v",
        "gemma4_text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 2},
    )
    # Hybrids.
    mixed = _layer_types(*["linear_attention", "full_attention"] * 3)
    yield case(
        "qwen3_next",
        fields={**_MOE, **_LINEAR, **mixed, "shared_expert_intermediate_size": INNER},
    )
    yield case("qwen3_5_text", fields={**_LINEAR, **mixed})
    yield case(
        "qwen3_5_moe_text",
        fields={**_MOE, **_LINEAR, **mixed, "shared_expert_intermediate_size": INNER},
    )
    yield case(
        "minimax",
        fields={**_LOCAL, **mixed},
        folds=NO_NORM,
        refused="residual",
        lasts=False,
    )
    sparse = _layer_types("full_attention", "conv", "conv", "conv", "full_attention", "conv")
    yield case("lfm2", fields={**sparse, "block_auto_adjust_ff_dim": False}, layer=1)
    yield case("lfm2_moe", fields={**sparse, **_MOE, "num_dense_layers": 1}, layer=2)
    yield case(
        "jamba",
        fields={
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        layer=2,
    )
    yield case("bamba", fields={**_MAMBA, "attn_layer_indices": [0, 4]}, layer=2)
    yield case(
        "granitemoehybrid",
        fields={
            **_MAMBA,
            **_LOCAL,
            "shared_intermediate_size": INNER,
            "attention_multiplier": 0.25,
            **_layer_types("mamba", "attention", "mamba", "mamba", "attention", "mamba"),
        },
        layer=2,
    )
    yield case(
        "nemotron_h",
        fields={
            "layers_block_type": ["mamba", "attention", "moe", "mamba", "attention", "mamba"],
            "num_hidden_layers": None,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "use_mamba_kernels": False,
            **_ROUTED,
            "moe_shared_expert_intermediate_size": INNER,
        },
        layer=2,
    )
    yield case(
        "falcon_h1",
        fields={**_MAMBA, "mamba_d_ssm": 128},
        folds=NO_NORM,
        refused="Mamba",
    )
    # Norms without parameters.
    for name in ("olmo", "nanochat"):
        yield case(name, folds=NO_NORM, refused="no parameters")
    # LayerNorms, parallel blocks, other names.
    for name in ("cohere", "cohere2"):
        yield case(name, fields={"logit_scale": 1.0}, folds=NO_NORM, refused="MLP")
    yield case("phi", folds=NO_NORM, refused="MLP")
    for name in ("gptj", "codegen"):
        yield case(
            name,
            fields={**_rename(_GPT2_NAMES), "rotary_dim": 8},
            folds=NO_NORM,
            refused="MLP",
        )
    yield case("gpt2", fields=_rename(_GPT2_NAMES))
    yield case("gpt_neox", fields=_HEADS)
    yield case("stablelm")
    yield case(
        "stablelm-parallel",
        "stablelm",
        {"use_parallel_residual": True},
        folds=NO_NORM,
        refused="MLP",
    )
    falcon = {"num_kv_heads": 2, "ffn_hidden_size": INNER, "head_dim": None, "bias": True}
    yield case("falcon", fields=falcon, folds=NO_NORM, refused="MLP")
    yield case("falcon-serial", "falcon", {**falcon, "parallel_attn": False, "alibi": True})
    yield case("falcon-new", "falcon", {**falcon, "new_decoder_architecture": True})
    yield case(
        "falcon-new-one-norm",
        "falcon",
        {**falcon, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        folds=NO_NORM,
        refused="MLP",
    )
    yield case("opt", fields={**_HEADS, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN})
    bloom = {"n_layer": DEPTH, "n_head": 4, **_HEADS, "num_hidden_layers": None}
    yield case("bloom", fields=bloom)
    yield case(
        "bloom-residual-after-norm",
        "bloom",
        {**bloom, "apply_residual_connection_post_layernorm": True},
        folds=(),
        refused="the residual too",
    )
    yield case(
        "mpt",
        fields={
            "d_model": HIDDEN,
            "n_layers": DEPTH,
            "n_heads": 4,
            "max_seq_len": 512,
            "expansion_ratio": 2,
            **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads")),
        },
    )
    yield case("starcoder2")
    yield case("nemotron")
    # Refused altogether.
    for name in ("olmo2", "olmo3", "exaone4"):
        yield case(name, folds=(), refused="residual stream")
    yield case("flex_olmo", fields=_MOE, folds=(), refused="residual stream")
    yield case(
        "opt-after",
        "opt",
        {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "do_layer_norm_before": False},
        folds=(),
        refused="residual stream",
    )
    yield case(
        "zamba",
        fields={
            "n_mamba_heads": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        folds=(),
        refused="shared between layers",
    )
    yield case(
        "zamba2",
        fields={
            "layers_block_type": ["mamba", "hybrid"] * 3,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "use_mamba_kernels": False,
            "chunk_size": 16,
            "mamba_d_state": 8,
            **_HEADS,
        },
        folds=(),
        refused="shared between layers",
    )
    yield case(
        "longcat_flash",
        fields={
            **_LATENT,
            "num_layers": DEPTH,
            "num_hidden_layers": None,
            "ffn_hidden_size": INNER,
            "expert_ffn_hidden_size": INNER,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
        folds=(),
        refused="two attention blocks",
    )
    yield case("hrm_text", folds=(), refused="several times")
    # Multimodal models, of which the text decoder is a part.
    yield whole("qwen2_vl", "qwen2_vl_text", _SECTIONS, {**_QWEN_VISION, "hidden_size": HIDDEN})
    yield whole("qwen2_5_vl", "qwen2_5_vl_text", _SECTIONS, _QWEN_VISION)
    yield whole("qwen3_vl", "qwen3_vl_text", _SECTIONS, _QWEN_VISION)
    yield whole("qwen3_vl_moe", "qwen3_vl_moe_text", {**_SECTIONS, **_MOE}, _QWEN_VISION)
    yield whole("qwen3_5", "qwen3_5_text", {**_LINEAR, **mixed}, _QWEN_VISION)
    yield whole("gemma3", "gemma3_text", {"query_pre_attn_scalar": 16}, _VISION)
    yield whole("mistral3", "mistral", {}, _VISION)
    yield whole("llava", "llama", {}, {**_VISION, "model_type": "clip_vision_model"})
    yield whole("gemma4", "gemma4_text", _GEMMA4, {**_VISION, "position_embedding_size": 16})
    yield whole(
        "llama4",
        "llama4_text",
        {**_LOCAL, "intermediate_size_mlp": INNER},
        {
            **_VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    )


def _rename(names: Mapping[str, str | None]) -> dict[str, Any]:
    values = _common()
    renamed = {new: values[old] for old, new in names.items() if new}
    return {**dict.fromkeys(names), **renamed}


def _common() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }


CASES: dict[str, Case] = {case.name: case for case in _cases()}


def make_config(case: Case) -> Any:
    """The configuration of a case."""
    fields = {**_special_ids(), **_common(), **case.fields}
    if "vocab_size_per_layer_input" in fields:
        fields["vocab_size_per_layer_input"] = fields["vocab_size"]
    fields = {name: value for name, value in fields.items() if value is not None}
    if "q_lora_rank" in case.fields:
        fields["q_lora_rank"] = case.fields["q_lora_rank"]
    text = CONFIG_MAPPING[case.model_type](**fields)
    if not case.whole:
        return text
    parts = {name: dict(part) for name, part in case.parts.items()}
    return CONFIG_MAPPING[case.whole](text_config=text.to_dict(), **parts)


@torch.no_grad()
def build(case: Case) -> Any:
    """The model of a case, massive activation and all, in evaluation mode."""
    config = make_config(case)
    auto = AutoModelForImageTextToText if case.whole else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(case.name.encode()))
        model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        _randomise(model)
        if case.folds:
            plant(model, case.layer)
    return model


def save(case: Case, folder: Path) -> Path:
    """Write a case as a checkpoint folder, with a tokenizer."""
    model = build(case)
    # transformers 4 cannot save shared blocks as safetensors.
    options = {} if FIVE or case.name != "zamba2" else {"safe_serialization": False}
    model.save_pretrained(folder, **options)
    _save_tokenizer(make_tokenizer(), folder)
    return folder


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@cache
def _offset(kind: type) -> float:
    """1 for norms that multiply by 1 + weight: those whose weights begin at 0."""
    return 1.0 if kind.__name__ in _UNIT_OFFSET else 0.0


_UNIT_OFFSET = {
    "GemmaRMSNorm",
    "Gemma2RMSNorm",
    "Gemma3RMSNorm",
    "VaultGemmaRMSNorm",
    "Qwen3NextRMSNorm",
    "Qwen3_5RMSNorm",
    "Qwen3_5MoeRMSNorm",
    "NemotronLayerNorm1P",
}


def _randomise(model: nn.Module) -> None:
    """Random linears, embeddings and norms; what is neither stays as transformers makes it."""
    names = {module: name for name, module in model.named_modules()}
    parents = {child: module for module in model.modules() for child in module.children()}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            module.weight.normal_()
        elif _is_norm(module) and isinstance(weight, nn.Parameter):
            weight.copy_(torch.exp(0.3 * torch.randn(weight.shape)) - _offset(type(module)))
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
            # Low scores let every token attend to the sink a little.
            inside = "attention" in type(parents.get(module)).__name__.lower()
            small = 0.02 if "coefs" in names[module] else 0.7  # how Gemma 3n mixes its streams
            reads = inside and inputs == HIDDEN and not _writes(module, parents[module])
            module.weight.normal_(std=(0.3 if reads else small) / inputs**0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.1)
        elif isinstance(weight, nn.Parameter) and weight.dim() == 2:  # routers
            weight.normal_(std=1.0 / HIDDEN**0.5)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "conv" not in type(module).__name__.lower():
                parameter.normal_(std=0.7 / HIDDEN**0.5)  # fused experts
            elif name in ("gate_up_proj_bias", "down_proj_bias"):
                parameter.normal_(std=0.1)


def _writes(module: nn.Module, attention: nn.Module) -> bool:
    """Whether a linear is the one through which attention writes."""
    names = ("o_proj", "out_proj", "dense", "c_proj", "self_attention_dense")
    return any(getattr(attention, name, None) is module for name in names)


def _decoder_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The text decoder and its layers: the first list of the right length."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == DEPTH:
                return module, child
    raise TypeError(f"{type(model).__name__} has no list of {DEPTH} layers")


@dataclass
class _Network:
    """A feed-forward network, or one expert: views [neurons, hidden] and [hidden, neurons]."""

    reads: list[torch.Tensor]
    write: torch.Tensor
    read_biases: list[torch.Tensor]
    expert: bool


_LINEARS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)


def _matrix(module: nn.Module) -> torch.Tensor:
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


def _networks(layer: nn.Module) -> list[_Network]:
    """Every feed-forward network in a layer, experts included."""
    found = []
    for path, module in layer.named_modules():
        expert = "experts" in path.split(".")
        names = next(
            (names for names in _LINEARS if all(hasattr(module, name) for name in names)), None
        )
        if names is None:
            continue
        *reads, write = (getattr(module, name) for name in names)
        if isinstance(write, nn.Parameter):
            found += _fused(reads[0].data, write.data, module)
        elif write.weight.dim() == 3:
            found += _fused(reads[0].weight.data, write.weight.data, module)
        else:
            matrices = [_matrix(read) for read in reads]
            if matrices[0].shape[0] == 2 * _matrix(write).shape[1]:
                matrices = list(matrices[0].chunk(2))
            biases = [read.bias.data for read in reads if read.bias is not None]
            found.append(_Network(matrices, _matrix(write), biases, expert))
    return found


def _fused(reads: torch.Tensor, writes: torch.Tensor, module: nn.Module) -> list[_Network]:
    """Experts in one tensor each for reading and writing, in either orientation."""
    found = []
    biases = getattr(module, "gate_up_proj_bias", None)
    for number, (read, write) in enumerate(zip(reads, writes, strict=True)):
        read = read if read.shape[1] == HIDDEN else read.T
        write = write if write.shape[0] == HIDDEN else write.T
        halves = [read]
        if read.shape[0] == 2 * write.shape[1]:
            interleaved = "GptOss" in type(module).__name__
            halves = [read[::2], read[1::2]] if interleaved else list(read.chunk(2))
        own = [] if biases is None else [biases.data[number]]
        found.append(_Network(halves, write, own, True))
    return found


def plant(model: nn.Module, layer: int) -> None:
    """Let `<bos>` become massive at the output of a decoder layer."""
    base, layers = _decoder_layers(model)
    dims = torch.randperm(HIDDEN)[:5].tolist()
    trigger, massive = dims[:2], dims[2:]
    direction = torch.zeros(HIDDEN)
    direction[massive] = torch.tensor(_SHARES)
    reading = torch.zeros(HIDDEN)
    reading[trigger] = torch.tensor([1.0, -1.0])

    # What the mask takes away must matter: of the massive dimensions, one has a large gain.
    for module in layers[layer + 1 :].modules():
        weight = getattr(module, "weight", None)
        if _is_norm(module) and isinstance(weight, nn.Parameter) and weight.shape == (HIDDEN,):
            weight[massive[0]] = 3.0 - _offset(type(module))
    for child in base.children():
        if child is not layers:
            _keep_off(child, trigger)
    _keep_off(layers[: layer + 1], trigger)
    embedding = model.get_input_embeddings().weight
    sink = int(make_tokenizer().bos_token_id)
    embedding[:, trigger] = 0
    embedding[sink, trigger] = torch.tensor([4.0, -4.0])

    networks = _networks(layers[layer])
    networks = [one for one in networks if not one.expert] or networks
    for network in networks:
        for read in network.reads:
            read[0] = 2.0 * reading
        for bias in network.read_biases:
            bias[:2] = 0  # of both halves, where they are interleaved
            bias[len(bias) // 2] = 0
    ids = torch.tensor([[sink]])

    def write(factor: float) -> torch.Tensor:
        for network in networks:
            network.write[:, 0] = factor * direction
        return _output(model, layers[layer], ids)

    after = [
        module
        for name, module in layers[layer].named_children()
        if name in ("post_feedforward_layernorm", "post_mlp_layernorm")
    ]
    if after:  # which fixes the size of what is added, so that its gain must do it
        for network in networks:
            network.write[massive] = 0
        after[-1].weight.data[massive] = MAGNITUDE / HIDDEN**0.5
        write(50.0)
        return
    without = write(0.0)
    write(MAGNITUDE / (write(1.0) - without).norm().item())


def _keep_off(part: nn.Module, trigger: list[int]) -> None:
    """Let nothing in a part of the model write into two dimensions, or tell them apart."""
    for name, module in part.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter):
            weight = None
        if weight is None:
            pass
        elif isinstance(module, nn.Embedding):
            if weight.shape[1] == HIDDEN:
                weight[:, trigger] = 0
        elif _is_norm(module):
            if weight.shape == (HIDDEN,):
                weight[trigger] = 1.0 - _offset(type(module))
        elif type(module).__name__ == "Conv1D":
            if weight.shape[1] == HIDDEN:
                weight[:, trigger] = 0
        elif weight.dim() == 2 and weight.shape[0] == HIDDEN:
            weight[trigger] = 0
        elif weight.dim() == 3 and weight.shape[1] == HIDDEN and "output" in name:
            weight[:, trigger] = 0
        if isinstance(bias, nn.Parameter) and bias.shape == (HIDDEN,):
            bias[trigger] = 0
        for key, parameter in module.named_parameters(recurse=False):
            if key == "down_proj" and parameter.dim() == 3:
                axis = 1 if parameter.shape[1] == HIDDEN else 2
                parameter.index_fill_(axis, torch.tensor(trigger), 0)
            elif key == "down_proj_bias":
                parameter[:, trigger] = 0


def _output(model: nn.Module, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What a decoder layer gives for one token, [hidden]."""
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = layer.register_forward_hook(note)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0].reshape(-1, HIDDEN)[0]


def add_ignored_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors into a checkpoint that no modelling code reads, as DeepSeek-V3 has them."""
    from safetensors.torch import load_file, save_file

    path = next(iter(sorted(folder.glob("*.safetensors"))))
    held = load_file(path)
    save_file({**held, **tensors}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(listed))
