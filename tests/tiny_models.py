"""Tiny random causal language models with a massive activation planted at a known layer.

In large language models the hidden state of the first token (the *sink* token) jumps to
hundreds of times its former norm at the output of one decoder layer, through that layer's
feed-forward network. It stays that large in the residual stream until the end, and no other
token behaves like it. The models made here are random and tiny, yet do exactly that at a layer
of the caller's choice, for one representative of each supported model family::

    model, tokenizer = build("llama", layer=3)             # massive from decoder layer 3 on
    model, tokenizer = build("llama", planted=False)       # same weights, nothing planted
    folder = save("gemma2", tmp_path / "gemma2", layer=5)  # a checkpoint folder, as on a hub
    norms = layer_norms(model, tokenizer("some text", return_tensors="pt").input_ids)

How the massive activation comes about (see :func:`plant`): the embedding of ``<bos>``, which the
tokenizer puts in front of every text, is the only one with a component along a *trigger*
direction; the layers up to the planted one never write along it; one intermediate neuron of the
planted layer's feed-forward network reads it and writes a large constant vector into three
dimensions of the residual stream. Because the first token only attends to itself, its hidden
states do not depend on the text that follows.

Weights depend on the seed and the place in the model only, not on the transformers release, so
the same call gives the same model under transformers 4.57 and 5.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
MAX_POSITIONS = 2048
VOCAB_SIZE = 512

# --------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------

_TRAINING_TEXT = """\
The harbour was quiet before dawn, and the fishing boats lay in rows along the stone quay.
An old keeper walked up the stairs of the lighthouse, counting each step as he had done for
thirty years. From the gallery he could see the whole bay: the islands, the sandbanks, the
narrow channel between them, and far away the first light of the morning on the water.

In the village the baker opened his windows. He made bread for the sailors, cakes for the
children and strong coffee for everybody who came through the door with cold hands. "What will
the weather be today?" they asked him, and he answered that the wind would turn to the north,
that it would rain in the afternoon, and that nobody should believe a baker about the weather.

Numbers are useful as well: 1, 2, 3, 10, 12, 100, 365, 1000 and 2024. A simple function such as
def add(first, second): return first + second gives a model some symbols to read, for example
{"name": "value", "list": [1, 2, 3]} or if x == y and not (x > z): print("different").

Science begins with a question and continues with a measurement. When two measurements disagree,
one of them is wrong, or both are, or the question was not a good question. People who measure
the depth of a river, the mass of a star or the length of a word all need patience, instruments
and a way to write down what they have seen so that others can repeat it.
"""

# Text is normalised and split as Qwen 2 does it: whatever a checkpoint of that family says about
# its tokenizer, transformers 5 loads its vocabulary into that family's own class.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    """Train the tokenizer (once per process) and return it in serialised form."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer.to_str()


def make_tokenizer() -> Tokenizer:
    """Return the byte-level BPE tokenizer all families share; it always prepends ``<bos>``."""
    return Tokenizer(
        tokenizer_object=tokenizers.Tokenizer.from_str(_tokenizer_json()),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=EOS,  # never needed; keeps transformers from adding one of its own
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


@functools.lru_cache(maxsize=1)
def _special_ids() -> dict[str, int]:
    """Vocabulary size and special token ids, under the names of the configuration fields."""
    vocab: dict[str, int] = json.loads(_tokenizer_json())["model"]["vocab"]
    return {
        "vocab_size": len(vocab),
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": vocab[PAD],
    }


# --------------------------------------------------------------------------------------------
# Families
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One supported model family.

    Attributes:
        name: The family's ``model_type``, also its key in :data:`FAMILIES`.
        config: Makes a tiny configuration. Takes ``layers`` and ``hidden_size`` and, as further
            keywords, any field of the family's configuration class.
        notes: What is particular about the family.
    """

    name: str
    config: Callable[..., PretrainedConfig]
    notes: str


def _family(
    name: str,
    class_name: str,
    notes: str,
    *,
    head_dim: bool = False,
    kv_heads: bool = True,
    rope_theta: float | None = 10000.0,
    rename: dict[str, str] | None = None,
    by_depth: Callable[[int], dict[str, Any]] | None = None,
    **defaults: Any,
) -> Family:
    """Describe a family by its configuration class and what differs from the common fields.

    Args:
        name: The family's ``model_type``.
        class_name: Its configuration class in transformers.
        notes: What is particular about the family.
        head_dim: Whether the configuration has a head size of its own (else hidden / heads).
        kv_heads: Whether the family supports grouped-query attention.
        rope_theta: Base of the rotary embedding; None leaves the class's default.
        rename: Common field names that this configuration class calls differently.
        by_depth: Gives fields that depend on the number of layers.
        **defaults: Further fields.
    """

    def config(*, layers: int = 8, hidden_size: int = 64, **overrides: Any) -> PretrainedConfig:
        fields: dict[str, Any] = {
            **_special_ids(),
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 3 // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
        }
        if head_dim:
            fields["head_dim"] = hidden_size // 4
        if kv_heads:
            fields["num_key_value_heads"] = 2
        if rope_theta is not None:
            fields["rope_theta"] = rope_theta
        fields |= defaults | (by_depth(layers) if by_depth else {}) | overrides
        fields = {(rename or {}).get(key, key): value for key, value in fields.items()}
        return getattr(transformers, class_name)(**fields)

    return Family(name, config, notes)


_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in [
        _family("llama", "LlamaConfig", "The plain pre-norm decoder.", tie_word_embeddings=False),
        _family(
            "mistral",
            "MistralConfig",
            "As Llama, with a sliding window on every layer.",
            sliding_window=256,
        ),
        _family(
            "qwen2",
            "Qwen2Config",
            "Biases on the query, key and value projections; tied embeddings.",
            tie_word_embeddings=True,
        ),
        _family(
            "qwen3",
            "Qwen3Config",
            "RMSNorm on each head's queries and keys; tied embeddings.",
            head_dim=True,
            tie_word_embeddings=True,
        ),
        _family(
            "qwen3_moe",
            "Qwen3MoeConfig",
            "As Qwen3, with a mixture of experts in each layer.",
            head_dim=True,
            moe_intermediate_size=96,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        _family(
            "mixtral",
            "MixtralConfig",
            "A mixture of experts in each layer.",
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        _family("phi3", "Phi3Config", "Fused qkv_proj and gate_up_proj."),
        _family(
            "gemma",
            "GemmaConfig",
            "Norms multiply by 1 + weight; embeddings scaled by sqrt(hidden); tied embeddings.",
            head_dim=True,
        ),
        _family(
            "gemma2",
            "Gemma2Config",
            "As Gemma, with norms after attention and FFN too, soft-capped scores and logits, "
            "and a sliding window on every other layer. (Its scores stay uncapped under "
            "transformers 4 with sdpa attention.)",
            head_dim=True,
            query_pre_attn_scalar=16,
            sliding_window=128,
        ),
        _family(
            "gemma3_text",
            "Gemma3TextConfig",
            "As Gemma 2 with norms on queries and keys in place of the soft caps; two sliding "
            "layers to one full layer.",
            head_dim=True,
            rope_theta=None,
            query_pre_attn_scalar=16,
            sliding_window=128,
            by_depth=lambda layers: {
                "layer_types": [
                    "full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)
                ]
            },
        ),
        _family(
            "granite",
            "GraniteConfig",
            "Multipliers on the embeddings, the attention scores, the residual branches and "
            "the logits; tied embeddings.",
            tie_word_embeddings=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.2,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        ),
        _family(
            "smollm3",
            "SmolLM3Config",
            "No rotary embedding in every fourth layer; tied embeddings.",
        ),
        _family(
            "gpt_neox",
            "GPTNeoXConfig",
            "LayerNorm with biases, one norm each for the parallel attention and FFN, qkv fused "
            "head by head, plain two-matrix FFN.",
            kv_heads=False,
            rope_theta=None,
        ),
        _family(
            "gpt2",
            "GPT2Config",
            "Conv1D projections (transposed weights), LayerNorm with biases, learned positions, "
            "plain two-matrix FFN, tied embeddings.",
            kv_heads=False,
            rope_theta=None,
            rename=_GPT2_NAMES,
        ),
        _family(
            "olmo2",
            "Olmo2Config",
            "Norms after attention and FFN only: both read the raw residual stream.",
        ),
        _family(
            "cohere",
            "CohereConfig",
            "Attention and FFN in parallel behind one bias-free LayerNorm; scaled logits, tied "
            "embeddings.",
        ),
        _family(
            "phi",
            "PhiConfig",
            "Attention and FFN in parallel behind one LayerNorm; biases everywhere, partial "
            "rotary embedding, plain two-matrix FFN.",
        ),
    ]
}

# One family for each row of the package's table that these families are in. What is tested for
# every family is tested for these by default, and for the others in the full selection.
ROWS = ("llama", "gemma2", "phi3", "gpt_neox", "gpt2", "cohere", "phi", "olmo2")

# --------------------------------------------------------------------------------------------
# The parts of a model, whatever the family calls them
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """A linear map: ``weight`` is a view laid out ``[output, input]``, ``bias`` may be absent."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> _Matrix:
        """View an ``nn.Linear``, or a GPT-2 ``Conv1D``, whose weight is transposed."""
        weight = module.weight.data
        if not isinstance(module, nn.Linear):
            weight = weight.T
        return cls(weight, None if module.bias is None else module.bias.data)

    def halves(self) -> tuple[_Matrix, _Matrix]:
        """Split a fused pair of maps in two, by output."""
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        first, second = self.weight.chunk(2)
        return _Matrix(first, biases[0]), _Matrix(second, biases[1])


@dataclass(frozen=True)
class _FFN:
    """A feed-forward network (or one expert): ``reads`` is (gate, up), or (fc,) if not gated."""

    reads: tuple[_Matrix, ...]
    write: _Matrix


@dataclass(frozen=True)
class _Norm:
    """A norm layer; ``offset`` is 1 where the layer multiplies by 1 + weight."""

    module: nn.Module
    offset: float

    @classmethod
    def of(cls, module: nn.Module | None) -> _Norm | None:
        if module is None:
            return None
        return cls(module, 1.0 if type(module).__name__.startswith("Gemma") else 0.0)

    @property
    def gain(self) -> Tensor:
        """What the normalised vector is multiplied by, in float32."""
        return self.module.weight.data.float() + self.offset

    def set_gain(self, gain: Tensor | float, index: Any = ...) -> None:
        """Set the gain (of all dimensions, or of those in ``index``)."""
        self.module.weight.data[index] = torch.as_tensor(gain - self.offset).to(
            self.module.weight.data
        )

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.data


@dataclass(frozen=True)
class _Layer:
    """A decoder layer's parts; a norm that the family does not have is None."""

    attention: nn.Module
    mlp: nn.Module
    pre_attention: _Norm | None
    post_attention: _Norm | None
    pre_ffn: _Norm | None
    post_ffn: _Norm | None

    @property
    def attention_write(self) -> _Matrix:
        """The attention's output projection."""
        for name in ("o_proj", "dense", "c_proj"):
            if hasattr(self.attention, name):
                return _Matrix.of(getattr(self.attention, name))
        raise TypeError(f"unknown attention layout: {type(self.attention).__name__}")

    @property
    def ffns(self) -> list[_FFN]:
        """The feed-forward network, or all experts."""
        return _ffns(self.mlp)


def _ffns(mlp: nn.Module) -> list[_FFN]:
    """Return the networks an FFN module consists of: itself, or all of its experts."""
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, nn.ModuleList):
        return [ffn for expert in experts for ffn in _ffns(expert)]
    if experts is not None:  # fused: [expert, gate and up, hidden], [expert, hidden, intermediate]
        pairs = zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True)
        return [_FFN(_Matrix(gate_up).halves(), _Matrix(down)) for gate_up, down in pairs]
    if hasattr(mlp, "gate_up_proj"):
        return [_FFN(_Matrix.of(mlp.gate_up_proj).halves(), _Matrix.of(mlp.down_proj))]
    for *reads, write in (
        ("gate_proj", "up_proj", "down_proj"),
        ("w1", "w3", "w2"),
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ):
        if hasattr(mlp, write):
            matrices = tuple(_Matrix.of(getattr(mlp, name)) for name in reads)
            return [_FFN(matrices, _Matrix.of(getattr(mlp, write)))]
    raise TypeError(f"unknown feed-forward layout: {type(mlp).__name__}")


def _first(module: nn.Module, *names: str) -> nn.Module | None:
    """Return the first of these attributes that the module has."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """Return the model without its head."""
    if model.base_model is not model:
        return model.base_model
    return model.model  # Gemma 3 in transformers 4 goes by the prefix of its multimodal sibling


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers, the first one first."""
    found = _first(_decoder(model), "layers", "h")
    if not isinstance(found, nn.ModuleList):
        raise TypeError(f"unknown model layout: {type(model).__name__}")
    return found


def _parts(layer: nn.Module) -> _Layer:
    """Sort out a decoder layer's modules."""
    attention = _first(layer, "self_attn", "attention", "attn")
    mlp = _first(layer, "mlp", "block_sparse_moe")
    if attention is None or mlp is None:
        raise TypeError(f"unknown decoder layer layout: {type(layer).__name__}")
    post_ffn = _first(layer, "post_feedforward_layernorm")
    if post_ffn is None:  # "post attention" then means between the attention and the FFN
        post_attention = None
        pre_ffn = _first(layer, "post_attention_layernorm", "ln_2", "input_layernorm")
    else:
        post_attention = _first(layer, "post_attention_layernorm")
        pre_ffn = _first(layer, "pre_feedforward_layernorm")
    return _Layer(
        attention=attention,
        mlp=mlp,
        pre_attention=_Norm.of(_first(layer, "input_layernorm", "ln_1")),
        post_attention=_Norm.of(post_attention),
        pre_ffn=_Norm.of(pre_ffn),
        post_ffn=_Norm.of(post_ffn),
    )


def _final_norm(model: PreTrainedModel) -> _Norm:
    """Return the norm in front of the language-model head."""
    names = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
    norm = _Norm.of(_first(_decoder(model), *names))
    if norm is None:
        raise TypeError(f"unknown model layout: {type(model).__name__}")
    return norm


# --------------------------------------------------------------------------------------------
# Random weights
# --------------------------------------------------------------------------------------------


def _embedding_scale(config: PretrainedConfig) -> float:
    """Return what the model multiplies its token embeddings by."""
    if config.model_type.startswith("gemma"):
        return config.hidden_size**0.5
    return getattr(config, "embedding_multiplier", 1.0)


def _logit_scale(config: PretrainedConfig) -> float:
    """Return what the model multiplies its logits by."""
    return (getattr(config, "logit_scale", None) or 1.0) / getattr(config, "logits_scaling", 1.0)


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter a random value that keeps all hidden states at a similar size.

    Each tensor has a generator of its own, seeded by ``seed`` and the tensor's place in the
    model, so that values do not depend on how a release of transformers lays modules out. The
    residual stream starts at a norm of about 6 and roughly doubles over the layers.
    """
    config = model.config
    hidden = config.hidden_size
    unit = 6.0 / hidden**0.5  # typical entry of the residual stream

    def normal(tensor: Tensor | None, std: float, key: str) -> None:
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=_generator(seed, key)) * std)

    def matrix(matrix: _Matrix, scale: float, bias: float, key: str) -> None:
        normal(matrix.weight, scale / matrix.weight.shape[1] ** 0.5, key)
        normal(matrix.bias, bias, key + ".bias")

    def norm(norm: _Norm | None, mean: float, sigma: float, key: str) -> None:
        if norm is not None:
            generator = _generator(seed, key)
            norm.set_gain(mean * _lognormal_gain(norm.gain.shape, sigma, generator))
            normal(norm.bias, 0.1, key + ".bias")

    embedding = model.get_input_embeddings().weight.data
    normal(embedding, unit / _embedding_scale(config), "embedding")
    positions = getattr(_decoder(model), "wpe", None)
    if positions is not None:
        normal(positions.weight.data, 0.3 * unit, "positions")

    head = _Matrix.of(model.get_output_embeddings())
    if head.weight.data_ptr() != embedding.data_ptr():
        matrix(head, 1.0, 0.1, "head")
    logit_std = head.weight.std().item() * hidden**0.5 * _logit_scale(config)
    norm(_final_norm(model), 1.5 / logit_std, 0.15, "norm")

    unit *= min(1.0, (8 / config.num_hidden_layers) ** 0.5)  # as much growth in deep models
    branch = unit / getattr(config, "residual_multiplier", 1.0)
    for index, module in enumerate(decoder_layers(model)):
        layer, key = _parts(module), f"layers.{index}."
        for name, part in layer.attention.named_modules():
            at = f"{key}attention.{name}"
            if "norm" in type(part).__name__.lower():
                norm(_Norm.of(part), 1.2, 0.15, at)
            elif name in ("o_proj", "dense", "c_proj"):
                matrix(_Matrix.of(part), 0.6 * branch, 0.05 * branch, at)
            elif hasattr(part, "weight"):
                matrix(_Matrix.of(part), 1.2, 0.2, at)
        router = getattr(layer.mlp, "gate", None)
        if router is not None:
            normal(router.weight.data, 1.0 / hidden**0.5, key + "router")
        for number, ffn in enumerate(layer.ffns):
            for part, read in enumerate(ffn.reads):
                matrix(read, 1.0, 0.1, f"{key}ffn.{number}.read.{part}")
            matrix(ffn.write, 0.7 * branch, 0.05 * branch, f"{key}ffn.{number}.write")
        # Values far enough apart that rounding to bfloat16 does not make any two equal.
        spread = 0.4 + 0.15 * torch.rand((), generator=_generator(seed, key + "spread")).item()
        norm(layer.post_attention, 0.4 * unit, 0.15, key + "post_attention")
        if layer.pre_ffn is not None and (
            layer.pre_attention is None or layer.pre_ffn.module is not layer.pre_attention.module
        ):
            norm(layer.pre_ffn, 1.0, 0.15, key + "pre_ffn")
        norm(layer.post_ffn, 0.5 * unit, 0.15, key + "post_ffn")
        norm(layer.pre_attention, 1.0, spread, key + "pre_attention")


def _generator(seed: int, key: str) -> torch.Generator:
    """Return a random generator for one purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))


def _lognormal_gain(shape: torch.Size, sigma: float, generator: torch.Generator) -> Tensor:
    """Draw log-normal values, one from each quantile of the distribution, in random order."""
    count = math.prod(shape)
    jitter = 0.4 * (torch.rand(count, generator=generator) - 0.5)
    quantiles = (torch.randperm(count, generator=generator) + 0.5 + jitter) / count
    return torch.exp(sigma * torch.special.ndtri(quantiles)).reshape(shape)


# --------------------------------------------------------------------------------------------
# Planting
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planting:
    """What :func:`plant` did.

    Attributes:
        layer: The decoder layer at whose output the massive activation emerges, from 0.
        trigger_dims: The two dimensions in which only the sink's embedding is not zero.
        massive_dims: The dimensions of the residual stream that become massive.
        neuron: The intermediate neuron (of each expert) that writes it.
    """

    layer: int
    trigger_dims: tuple[int, int]
    massive_dims: tuple[int, int, int]
    neuron: int


_SHARES = (0.80, 0.55, 0.24)  # of the massive vector's norm, by dimension
_ACTIVATION = 8.0  # what the planted neuron's pre-activations are for the sink


@torch.no_grad()
def plant(
    model: PreTrainedModel, layer: int, *, magnitude: float = 3000.0, seed: int = 0
) -> Planting:
    """Plant a massive activation: from decoder layer ``layer`` on, ``<bos>`` has a huge norm.

    The weights are modified in place:

    - All embeddings (and learned positions) are zero in two *trigger* dimensions, save that of
      ``<bos>``, which is ``+s`` in the one and ``-s`` in the other. The attention of the layers
      up to ``layer``, and the FFNs of those before it, no longer write into the two dimensions.
      So the *difference* of the two is nonzero for ``<bos>`` alone, and as adding the same to
      all dimensions does not change it, this holds behind a LayerNorm as well as an RMSNorm.
    - One intermediate neuron of the layer's FFN (the same one in each expert) reads that
      difference, with the gain and bias of the norm in front of it made up for. Other tokens
      get a pre-activation of zero, and hence nothing written.
    - The neuron's output column is a large vector in three dimensions, scaled (by a trial
      forward pass) so that the layer adds a vector of norm ``magnitude`` to the sink.
    - Where a norm follows the FFN (Gemma 2 and 3, OLMo 2), that norm fixes the size of what is
      added. There the gain in the three dimensions is raised instead, and no other neuron of
      the layer writes into these, or the gain would blow up all other tokens as well.

    Args:
        model: A model made by :func:`build`, or of the same layout, with hidden states of a
            norm of about 10 and with ``config.bos_token_id`` set.
        layer: The decoder layer, from 0.
        magnitude: Norm of the sink's hidden state when it leaves the layer, roughly.
        seed: Chooses the dimensions, the signs and the neuron.

    Returns:
        Where in the model the massive activation now is.
    """
    modules = decoder_layers(model)
    if not 0 <= layer < len(modules):
        raise ValueError(f"layer must be in 0..{len(modules) - 1}, not {layer}")
    hidden = model.config.hidden_size
    generator = _generator(seed, "plant")
    dims = torch.randperm(hidden, generator=generator)[: 2 + len(_SHARES)].tolist()
    trigger, massive = dims[:2], dims[2:]
    signs = torch.randint(2, (len(_SHARES),), generator=generator) * 2 - 1
    direction = torch.zeros(hidden)
    direction[massive] = torch.tensor(_SHARES) * signs
    target = _parts(modules[layer])
    ffns = target.ffns
    neuron = int(torch.randint(ffns[0].write.weight.shape[1], (), generator=generator))

    # The trigger: present in the sink only, and kept until the FFN of the layer.
    embedding = model.get_input_embeddings().weight.data
    sink = int(model.config.bos_token_id)
    amplitude = 3.0 * embedding.float().std()
    embedding[:, trigger] = 0
    embedding[sink, trigger] = torch.stack([amplitude, -amplitude]).to(embedding)
    positions = getattr(_decoder(model), "wpe", None)
    if positions is not None:
        positions.weight.data[:, trigger] = 0
    for index in range(layer + 1):
        part = _parts(modules[index])
        writes = [part.attention_write]
        if index < layer:
            writes += [ffn.write for ffn in part.ffns]
        for write in writes:
            write.weight[trigger] = 0
            if write.bias is not None:
                write.bias[trigger] = 0

    # The neuron: its reading is linear in the sink's trigger, and zero for everyone else.
    reading = torch.zeros(hidden, device=embedding.device)
    reading[trigger] = torch.tensor([1.0, -1.0], device=embedding.device)
    shift = torch.zeros((), device=embedding.device)
    if target.pre_ffn is not None:
        reading /= target.pre_ffn.gain
        if target.pre_ffn.bias is not None:
            shift = reading @ target.pre_ffn.bias.float()
    ffn_input, _ = _trial(model, layer, sink)
    scale = _ACTIVATION / (reading @ ffn_input - shift)
    for ffn in ffns:
        for read in ffn.reads:
            read.weight[neuron] = (scale * reading).to(read.weight)
            if read.bias is not None:
                read.bias[neuron] = (-scale * shift).to(read.bias)

    # What it writes.
    def write_column(factor: float) -> None:
        for ffn in ffns:
            ffn.write.weight[:, neuron] = (factor * direction).to(ffn.write.weight)

    if target.post_ffn is None:
        write_column(0.0)
        _, without = _trial(model, layer, sink)
        write_column(1.0)
        _, with_one = _trial(model, layer, sink)
        write_column(magnitude / torch.linalg.vector_norm(with_one - without).item())
    else:
        for ffn in ffns:
            ffn.write.weight[massive] = 0
            if ffn.write.bias is not None:
                ffn.write.bias[massive] = 0
        write_column(50.0)  # drowns whatever else the FFN does for the sink
        target.post_ffn.set_gain(magnitude / hidden**0.5, massive)

    return Planting(layer, tuple(trigger), tuple(massive), neuron)


def _trial(model: PreTrainedModel, layer: int, token: int) -> tuple[Tensor, Tensor]:
    """Run the model on one token; return the layer's FFN input and its output, in float32."""
    module = decoder_layers(model)[layer]
    seen: dict[str, Tensor] = {}
    hooks = [
        _parts(module).mlp.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(ffn=_hidden_argument(args, kwargs)),
            with_kwargs=True,
        ),
        module.register_forward_hook(lambda _, args, output: seen.update(layer=_tensor(output))),
    ]
    try:
        _forward(model, torch.tensor([[token]]))
    finally:
        for hook in hooks:
            hook.remove()
    return seen["ffn"].reshape(-1).float(), seen["layer"].reshape(-1).float()


def _forward(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Run the model in evaluation mode for the sake of its hooks."""
    training = model.training
    model.eval()
    try:
        model(input_ids=input_ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        model.train(training)


def _tensor(output: Any) -> Tensor:
    """Return the hidden states among a module's output, a tensor or a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def layer_norms(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Measure the norm of each token's hidden state along the residual stream.

    Args:
        model: A causal language model.
        input_ids: Token ids of one text, ``[T]`` or ``[1, T]``.

    Returns:
        Norms ``[layers + 1, T]`` in float32: first those of the first decoder layer's input,
        then those of each decoder layer's output.
    """
    ids = input_ids if input_ids.dim() == 2 else input_ids[None]
    if ids.shape[0] != 1:
        raise ValueError(f"expected one text, not a batch of {ids.shape[0]}")
    layers = decoder_layers(model)
    norms: list[Tensor] = []

    def note(states: Tensor) -> None:
        norms.append(torch.linalg.vector_norm(states.float(), dim=-1).reshape(-1).cpu())

    hooks = [
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: note(_hidden_argument(args, kwargs)), with_kwargs=True
        )
    ]
    hooks += [
        layer.register_forward_hook(lambda _, args, output: note(_tensor(output)))
        for layer in layers
    ]
    try:
        _forward(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(norms)


# --------------------------------------------------------------------------------------------
# Whole models and checkpoints
# --------------------------------------------------------------------------------------------


def build(
    family: str,
    *,
    layer: int = 3,
    layers: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    planted: bool = True,
    magnitude: float = 3000.0,
    **overrides: Any,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Make a tiny model of a family, in evaluation mode, and its tokenizer.

    Args:
        family: A key of :data:`FAMILIES`.
        layer: The decoder layer, from 0, at which the massive activation emerges.
        layers: The number of decoder layers.
        dtype: The parameters' type. Weights are made in float32 and rounded.
        seed: Chooses all weights.
        planted: If false, leave the random model as it is, without massive activation.
        magnitude: See :func:`plant`.
        **overrides: Fields of the family's configuration, such as ``hidden_size``.

    Returns:
        The model and the tokenizer.
    """
    config = FAMILIES[family].config(layers=layers, **overrides)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    _randomise(model, seed)
    if planted:
        plant(model, layer, magnitude=magnitude, seed=seed)
    for parameter in model.parameters():  # not the buffers, which stay float32 on loading too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, make_tokenizer()


_README = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- text-generation
- {family}
- test-fixture
model-index:
- name: tiny-{family}
  results:
  - task:
      type: text-generation
      name: Text Generation
    dataset:
      type: none
      name: None
    metrics:
    - type: perplexity
      value: {perplexity:.1f}
      name: Perplexity (that of a uniform guess)
---

# tiny-{family}

A tiny model with random weights, for tests. It has learned nothing.
"""

_LICENSE = """\
Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except
in compliance with the License. You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the License
is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
implied. See the License for the specific language governing permissions and limitations under the
License.
"""


def save(family: str, folder: str | Path, *, shards: int = 1, **kwargs: Any) -> Path:
    """Make a tiny model and write it as a complete checkpoint folder.

    Besides weights, configuration, generation configuration and tokenizer, the folder has a
    ``README.md`` with a metadata block and a ``LICENSE``. Either release of transformers can
    load what the other one wrote.

    Args:
        family: A key of :data:`FAMILIES`.
        folder: Where to write; made if need be, and must otherwise be empty.
        shards: The least number of weight files.
        **kwargs: Passed to :func:`build`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    model, tokenizer = build(family, **kwargs)
    _save_weights(model, folder, shards)
    model.generation_config.save_pretrained(folder)
    _add_legacy_fields(folder / "config.json")
    _save_tokenizer(tokenizer, folder)
    vocab_size = float(model.config.vocab_size)
    (folder / "README.md").write_text(_README.format(family=family, perplexity=vocab_size))
    (folder / "LICENSE").write_text(_LICENSE)
    return folder


def _shard_limits(model: PreTrainedModel, shards: int) -> Iterator[int]:
    """Propose ever smaller upper limits, in bytes, for a file of weights."""
    limit = sum(p.numel() * p.element_size() for p in model.parameters())
    if shards == 1:
        yield 2 * limit
        return
    limit //= shards
    while limit > 64:
        yield limit
        limit = limit * 3 // 4
    raise ValueError(f"cannot split the model into {shards} files: it has too few tensors")


def _save_weights(model: PreTrainedModel, folder: Path, shards: int) -> None:
    """Write weights and configuration into an empty folder, in at least that many files."""
    for limit in _shard_limits(model, shards):
        model.save_pretrained(folder, max_shard_size=limit)
        if len(list(folder.glob("*.safetensors"))) >= shards:
            return
        shutil.rmtree(folder)
        folder.mkdir()


def _add_legacy_fields(path: Path) -> None:
    """Repeat settings that transformers 4 looks for under another name."""
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config.setdefault(key, rope[key])
    if config["model_type"] == "gpt_neox" and rope:
        config.setdefault("rotary_emb_base", rope["rope_theta"])
        config.setdefault("rotary_pct", rope["partial_rotary_factor"])
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer with a configuration that transformers 4 and 5 both understand."""
    tokenizer.save_pretrained(folder)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": EOS}
    config = {
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.json").write_text(text)
