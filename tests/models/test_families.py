"""Every family: table against trace, folds in memory against hooks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import rest_in_full
from tiny_models import FAMILIES, ROWS

import surgery
from surgery.errors import Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.folds.base import Leak
from surgery.folds.calibrate import sink_directions
from surgery.folds.editing import edited
from surgery.folds.edits import SinkDirection
from surgery.folds.registry import FOLDS, make_edits
from surgery.method.mask import Mask, largest
from surgery.models import families
from surgery.models.anatomy import Anatomy, describe, effective_gain
from surgery.models.ground import Loaded
from surgery.models.loading import load_model, load_tokenizer
from surgery.models.masking import masked
from surgery.models.observe import pad
from surgery.models.trace import confirm, trace
from surgery.patient import texts
from surgery.patient.patient import examine

Tiny = Callable[..., Path]

SHARED_NORM = ("cohere", "phi")
FOLDABLE = [name for name in FAMILIES if name != "olmo2"]
UNIT_OFFSET = ("gemma", "gemma2", "gemma3_text")

every_family = pytest.mark.parametrize("family", rest_in_full(FOLDABLE, ROWS))


@dataclass
class Patient:
    """A tiny model, its checkpoint and what the table says of it."""

    family: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    model: Any
    mask: Mask
    ids: torch.Tensor
    real: torch.Tensor

    def logits(self) -> torch.Tensor:
        with torch.inference_mode():
            found = self.model(input_ids=self.ids, attention_mask=self.real, use_cache=False)
        return found.logits[self.real.bool()]

    @cached_property
    def sinks(self) -> tuple[dict[int, SinkDirection], dict[int, Leak]]:
        """Calibrated once, which must leave the model as it was."""
        base, tokenizer = self.logits(), load_tokenizer(self.checkpoint.folder)
        calibration = texts.windows(tokenizer, texts.bundled("calibration"), 128, 3000)
        ground = Loaded(self.model, self.anatomy)
        found = sink_directions(ground, self.checkpoint, self.mask, calibration)
        assert torch.equal(self.logits(), base)
        return found


@pytest.fixture(scope="module")
def patients(tiny: Tiny) -> Callable[[str], Patient]:
    """`patients(family)`: massive from layer 2 on, a quarter of layers 3 to 5 masked."""
    known: dict[str, Patient] = {}

    def make(family: str) -> Patient:
        if family not in known:
            folder = tiny(family, layer=2, layers=6)
            checkpoint = surgery.resolve(str(folder))
            anatomy = describe(checkpoint)
            assert anatomy is not None
            mask = Mask(
                64,
                "weight",
                1.0,
                {at: largest(effective_gain(anatomy, checkpoint, at), 16) for at in (3, 4, 5)},
            )
            sequences = texts.windows(load_tokenizer(folder), texts.bundled("heldout"), 100, 400)
            ids, real = pad([*sequences, sequences[0][:40]])
            known[family] = Patient(
                family, checkpoint, anatomy, load_model(folder), mask, ids, real
            )
        return known[family]

    return make


def divergence(known: torch.Tensor, other: torch.Tensor) -> float:
    """KL(known ‖ other) in nats per token."""
    logs, others = known.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((logs.exp() * (logs - others)).sum(-1).mean())


@every_family
def test_table_agrees_with_trace(family: str, patients: Callable[[str], Patient]) -> None:
    patient = patients(family)
    table, traced = patient.anatomy, trace(patient.checkpoint)
    assert table.known_from == "table"
    assert traced.known_from == "trace"
    for found, other in zip(table.inputs, traced.inputs, strict=True):
        assert found is not None
        assert other is not None
        assert set(found.weights) == set(other.weights)
        assert set(found.readers) == set(other.readers)
        assert replace(found, weights=(), readers=()) == replace(other, weights=(), readers=())
    for name in ("model_type", "hidden_size", "layers_path", "null_gain", "input_axis"):
        assert getattr(table, name) == getattr(traced, name), name
    assert bool(table.norm_refusal) == bool(traced.norm_refusal) == (family in SHARED_NORM)
    assert table.null_gain == (-1.0 if family in UNIT_OFFSET else 0.0)
    assert table.input_axis == (0 if family == "gpt2" else 1)
    assert confirm(table, traced).known_from == "table, confirmed by trace"
    assert examine(patient.checkpoint) == replace(table, known_from="table, confirmed by trace")


@every_family
def test_effective_gain(family: str, patients: Callable[[str], Patient]) -> None:
    """What the norm does to a vector of ones of its own scale, tried on the module itself."""
    patient = patients(family)
    found = patient.anatomy.at(4)
    norm = patient.model.get_submodule(found.norm)
    gain = torch.from_numpy(effective_gain(patient.anatomy, patient.checkpoint, 4)).float()
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    h -= h.mean(-1, keepdim=True)  # a LayerNorm is then an RMSNorm
    with torch.inference_mode():
        out = norm(h)
    bias = norm.bias if found.bias else 0.0
    expected = h / h.pow(2).mean(-1, keepdim=True).sqrt() * gain + bias
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fold", ["norm", "qkv"])
@every_family
def test_fold_equals_masking_every_token(
    family: str, fold: str, patients: Callable[[str], Patient]
) -> None:
    patient = patients(family)
    model, anatomy, checkpoint, mask = (
        patient.model,
        patient.anatomy,
        patient.checkpoint,
        patient.mask,
    )
    if fold == "norm" and family in SHARED_NORM:
        with pytest.raises(Unsupported, match=r"--fold norm is not possible.*use --fold qkv"):
            make_edits(anatomy, mask, fold)
        return
    base = patient.logits()
    edits = make_edits(anatomy, mask, fold)
    with masked(model, anatomy, mask, "all"):
        hooked = patient.logits()
    with edited(model, checkpoint, edits):
        folded = patient.logits()
    assert torch.equal(folded, hooked)  # to the bit
    assert divergence(base, folded) > 0.01  # and not for want of an effect
    assert torch.equal(patient.logits(), base)  # and undone


@every_family
def test_sink_fold_is_the_papers_mask(family: str, patients: Callable[[str], Patient]) -> None:
    patient = patients(family)
    model, anatomy, checkpoint, mask = (
        patient.model,
        patient.anatomy,
        patient.checkpoint,
        patient.mask,
    )
    base = patient.logits()
    sinks, leaks = patient.sinks
    with masked(model, anatomy, mask, "first"):
        reference = patient.logits()
    distances = {"base": divergence(reference, base)}
    for fold in ("norm", "qkv", "sink"):
        if fold == "norm" and family in SHARED_NORM:
            continue
        with edited(model, checkpoint, make_edits(anatomy, mask, fold, sinks)):
            distances[fold] = divergence(reference, patient.logits())
    sink = distances.pop("sink")
    assert distances["base"] > 1e-3  # the mask does something
    assert all(sink < distance for distance in distances.values()), (sink, distances)
    assert sink < 0.1 * distances["qkv"]
    assert set(leaks) == {3, 4, 5}
    for leak in leaks.values():
        assert leak.sink_smallest == pytest.approx(1.0, abs=1e-3)
        assert leak.ordinary_rms < 0.3
        assert leak.tokens > 1000


@every_family
def test_sink_directions(family: str, patients: Callable[[str], Patient]) -> None:
    """The first layer's direction is the sink's own attention input, which the text never moves."""
    patient = patients(family)
    sinks, _ = patient.sinks
    seen: list[torch.Tensor] = []
    attention = patient.model.get_submodule(patient.anatomy.at(3).attention)
    handle = attention.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    patient.logits()
    handle.remove()
    first = seen[0][0, 0]
    chosen = list(patient.mask.dimensions[3])
    torch.testing.assert_close(
        torch.from_numpy(sinks[3].center), first[chosen], rtol=1e-4, atol=1e-4
    )
    assert float(torch.from_numpy(sinks[3].detector) @ first) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("family", SHARED_NORM)
def test_norm_is_refused_by_trace_too(family: str, patients: Callable[[str], Patient]) -> None:
    traced = trace(patients(family).checkpoint)
    with pytest.raises(Unsupported) as refused:
        FOLDS["norm"].require(traced)
    assert "mlp reads the same norm" in str(refused.value)
    assert "--fold qkv" in str(refused.value)
    FOLDS["qkv"].require(traced)
    FOLDS["sink"].require(traced)


def test_post_norm_models_are_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(tiny("olmo2"))
    checkpoint = surgery.resolve(folder)
    for fold in ("norm", "qkv", "sink"):
        with pytest.raises(Unsupported, match="reads the residual stream directly"):
            surgery.convert(folder, layer=3, fold=fold, output=tmp_path / "out")
    monkeypatch.delitem(families._BY_TYPE, "olmo2")
    with pytest.raises(Unsupported, match="no normed attention input"):
        examine(checkpoint)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------
# Families that the table does not know, or knows wrongly
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "qwen3_moe"])
def test_unknown_to_the_table(
    family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trace alone gives the same bytes as the table."""
    folder = str(tiny(family, layer=2, layers=6))
    options = {"layer": 2, "fold": "qkv", "check_tokens": 200}
    known = surgery.convert(folder, output=tmp_path / "known", **options)
    monkeypatch.delitem(families._BY_TYPE, family)
    checkpoint = surgery.resolve(folder)
    assert describe(checkpoint) is None
    assert examine(checkpoint).known_from == "trace"
    assert examine(checkpoint, check=False).known_from == "trace"  # nothing else to go by
    unknown = surgery.convert(folder, output=tmp_path / "unknown", **options)
    assert known.manifest is not None
    assert unknown.manifest is not None
    assert known.manifest.anatomy == "table, confirmed by trace"
    assert unknown.manifest.anatomy == "trace"
    for name in checkpoint.weight_files:
        one, other = (tmp_path / way / name for way in ("known", "unknown"))
        assert one.read_bytes() == other.read_bytes()
    assert unknown.verification is not None
    assert unknown.verification.passed


@pytest.mark.parametrize(
    ("family", "wrong", "word"),
    [
        ("llama", {"null_gain": -1.0}, "null_gain"),
        ("gemma", {"null_gain": 0.0}, "null_gain"),
        ("llama", {"readers": ("self_attn.q_proj", "self_attn.k_proj")}, "attention input"),
        ("llama", {"readers": ("self_attn.q_proj",)}, "attention input"),
        (
            "llama",
            {"readers": ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")},
            "attention input",
        ),
        ("llama", {"norm": "post_attention_layernorm"}, "attention input"),
        ("llama", {"shared_norm": "somebody else reads it"}, "legality of norm"),
        ("cohere", {"shared_norm": ""}, "legality of norm"),
        ("phi", {"shared_norm": ""}, "legality of norm"),
        ("qwen3", {"attention": "mlp"}, "attention input"),
    ],
)
def test_a_wrong_row_is_refused(
    family: str,
    wrong: dict[str, Any],
    word: str,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(families._BY_TYPE, family, replace(families._BY_TYPE[family], **wrong))
    folder = str(tiny(family))
    checkpoint = surgery.resolve(folder)
    described = describe(checkpoint)
    with pytest.raises(Unsupported, match=f"disagree about its {word}"):
        confirm(described, trace(checkpoint))
    with pytest.raises(Unsupported, match="disagree"):
        surgery.convert(folder, layer=3, fold="qkv", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_each_type_once() -> None:
    names = [name for family in families.FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    assert set(FAMILIES) <= set(names)


def test_layers_that_do_not_exist(patients: Callable[[str], Patient]) -> None:
    anatomy = patients("llama").anatomy
    for layer in (-1, 6):
        with pytest.raises(Unsupported, match=f"Layer {layer} does not exist"):
            anatomy.at(layer)
    without = replace(anatomy, inputs=(None, *anatomy.inputs[1:]))
    with pytest.raises(Unsupported, match="no attention input"):
        without.at(0)
