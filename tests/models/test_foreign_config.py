"""A stranger's config.json: whatever is in it, one sentence or a result, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint
from surgery.files.foreign import block, whole, words
from surgery.models.anatomy import depth_of, describe, width_of
from surgery.models.families import FAMILIES, family_of
from surgery.models.loading import longest_context
from surgery.patient import texts
from surgery.patient.quantised import _settings, method_of, require_editable

# What other programs and hands leave in a field.
_SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.sampled_from([2**63, -(2**40), 0.5, 8.0, float("nan"), float("inf")]),
    st.sampled_from(["", "8", "eight", "gptq", "fp8", "pack-quantized", "null"]),
)
JUNK = st.recursive(
    _SIMPLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "weights", "num_bits", "bits"]), inner, max_size=3),
    ),
    max_leaves=6,
)
OFTEN = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def fields(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a configuration, those of its blocks too."""
    for name, value in config.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from fields(value, (*prefix, name))


def with_value(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(config))
    part = changed
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return changed


def refused_or_done(action: Any) -> None:
    """A result, or a refusal in one sentence."""
    said = "a sentence"
    try:
        action()
    except SurgeryError as error:
        said = str(error)
    assert said
    assert "\n" not in said


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Headers and configurations, of plain and of hybrid families."""
    folder = tmp_path_factory.mktemp("foreign")
    found = {}
    for name in ("llama", "gpt2", "gemma3"):
        if name in tiny_models.FAMILIES:
            tiny_models.save(name, folder / name, layer=3)
            origin = Origin("directory", name, name)
            found[name] = open_checkpoint(folder / name, origin)
    return found


@OFTEN
@given(data=st.data())
def test_anatomy_and_families(checkpoints: dict[str, Checkpoint], data: st.DataObject) -> None:
    checkpoint = checkpoints[data.draw(st.sampled_from(sorted(checkpoints)))]
    names = sorted({*fields(dict(checkpoint.config)), ("quantization_config",), ("text_config",)})
    config = dict(checkpoint.config)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(names))
        try:
            config = with_value(config, path, data.draw(JUNK))
        except (KeyError, TypeError):  # a field of a block that is none any more
            continue
    other = replace(checkpoint, config=config)
    refused_or_done(lambda: family_of(config))
    refused_or_done(lambda: depth_of(config))
    refused_or_done(lambda: width_of(config))
    refused_or_done(lambda: describe(other))
    refused_or_done(lambda: method_of(config))
    refused_or_done(lambda: require_editable(other, linear=True, low_rank=False, strength=0.5))


LIMITED = sorted({mixer.last for family in FAMILIES for mixer in family.mixers if mixer.last})


@OFTEN
@given(family=st.sampled_from(FAMILIES), value=JUNK, data=st.data())
def test_every_row_of_the_table(
    checkpoints: dict[str, Checkpoint], family: Any, value: Any, data: st.DataObject
) -> None:
    """The fields that rows of the table ask for, on any checkpoint."""
    asked = {name for case in family.cases for name, _, _ in case.when} | set(LIMITED)
    config = {
        "model_type": family.model_types[0],
        "num_hidden_layers": 4,
        "hidden_size": 64,
        data.draw(st.sampled_from(sorted(asked))): value,
    }
    refused_or_done(lambda: describe(replace(checkpoints["llama"], config=config)))


SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "version": "gemm", "w_bit": 4, "group_size": 32},
    "fp8": {"weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "compressed-tensors": {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
        "sparsity_config": None,
    },
    "bitsandbytes": {"load_in_4bit": True},
}


@OFTEN
@given(data=st.data())
def test_quantisation_settings(checkpoints: dict[str, Checkpoint], data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(SETTINGS)))
    config = {
        **checkpoints["llama"].config,
        "quantization_config": {"quant_method": method, **SETTINGS[method]},
    }
    names = [path for path in fields(config) if path[0] == "quantization_config"]
    config = with_value(config, data.draw(st.sampled_from(names)), data.draw(JUNK))
    other = replace(checkpoints["llama"], config=config)

    def read() -> None:
        if method_of(other.config):
            _settings(other)

    refused_or_done(read)


@pytest.mark.parametrize(
    ("settings_of", "named"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": ["x"]}, "config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": "int4"}}},
            "weights",
        ),
        ({"quant_method": "gptq", "bits": "four", "group_size": 32}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": [32]}, "group_size"),
        ({"quant_method": ["gptq"]}, "quant_method"),
        ({"quant_method": "awq", "bits": -4}, "bits"),
    ],
)
def test_the_field_is_named(
    checkpoints: dict[str, Checkpoint], settings_of: dict[str, Any], named: str
) -> None:
    config = {**checkpoints["llama"].config, "quantization_config": settings_of}
    with pytest.raises(BadCheckpoint, match=rf"config\.json says {named} = "):
        _settings(replace(checkpoints["llama"], config=config))


def test_the_other_name_of_a_setting_is_read() -> None:
    """AWQ's w_bit, where bits is null."""
    assert whole({"bits": None, "w_bit": 4}, "bits", "w_bit") == 4


def test_the_reader() -> None:
    assert whole({"n": 8.0}, "n") == 8
    assert whole({}, "n", default=3) == 3
    assert words({"n": None}, "n", "x") == "x"
    assert block({}, "n") == {}
    for value in ("8", True, [8], {}, -1, 0.5, float("inf")):
        with pytest.raises(BadCheckpoint, match=r"config\.json says n ="):
            whole({"n": value}, "n")
    with pytest.raises(BadCheckpoint, match="no usable n"):
        whole({}, "n")
    with pytest.raises(BadCheckpoint, match=r"…, which is not text"):
        words({"n": list(range(100))}, "n")
    with pytest.raises(BadCheckpoint, match="not an object"):
        block({"n": []}, "n")


@cache
def tokenizer() -> Any:
    return tiny_models.make_tokenizer()


@OFTEN
@given(value=JUNK, name=st.sampled_from(["max_position_embeddings", "n_positions"]))
def test_contexts(value: Any, name: str) -> None:
    """A context of 1, which holds the first token and nothing else, is one sentence too."""
    config = type("Config", (), {name: value})()

    def cut() -> None:
        length = longest_context(config, 64)
        texts.windows(tokenizer(), [texts.Text("text", "Numbers are useful. " * 9)], length, 200)

    refused_or_done(cut)


@pytest.mark.parametrize("context", [1, 2])
def test_a_context_of_almost_nothing(tiny_copy: Any, run: Any, context: int) -> None:
    folder = tiny_copy()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": context}))
    assert (
        "too short"
        in run("convert", folder, "--layer", 3, "-o", folder.parent / "o", "-q").sentence()
    )
    assert "too short" in run("analyze", folder, "-q").sentence()


# The fields that transformers reads are for transformers to refuse, which happens in one sentence.
_COMMAND = (
    ("hidden_size", "wide"), ("hidden_size", None), ("num_hidden_layers", [8]),
    ("num_hidden_layers", -1), ("vocab_size", "512"), ("vocab_size", None),
    ("max_position_embeddings", "long"), ("max_position_embeddings", None),
    ("text_config", {"model_type": ["llama"]}), ("text_config", "llama"), ("architectures", 7),
    ("quantization_config", "gptq"), ("quantization_config", {"quant_method": None}),
    ("rope_scaling", "x"), ("rms_norm_eps", "x"), ("model_type", ["llama"]), ("model_type", None),
    ("torch_dtype", 7), ("dtype", ["x"]), ("auto_map", "x"), ("tie_word_embeddings", "no"),
    ("hidden_act", None), ("num_attention_heads", 0), ("eos_token_id", "x"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), _COMMAND)
@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_commands(
    tiny_copy: Any, run: Any, name: str, value: Any, options: tuple[str, ...]
) -> None:
    """From the command line, loaded and streamed: a result, or a sentence."""
    folder = tiny_copy()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    outcome = run("analyze", folder, "-q", *options)
    if outcome.code:
        outcome.sentence()
