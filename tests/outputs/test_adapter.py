"""The sink fold as a LoRA of rank 1: the folded logits on the untouched base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import BadSettings, Unsupported
from surgery.files.gguf_file import read_gguf, values_of
from surgery.outputs.adapter import CONFIG, WEIGHTS
from surgery.outputs.gguf_updates import regroup
from surgery.patient.patient import Patient

peft = pytest.importorskip("peft")
Tiny = Callable[..., Path]
QUICK = {"layer": 3, "fold": "sink", "check": False, "calibration_tokens": 512}


def model_in(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[0, *range(5, 40)]])
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("family", "scope"),
    [("llama", "all"), ("phi3", "all"), ("gpt2", "all"), ("gpt_neox", "all"), ("phi", "all")],
)
def test_the_adapter_is_the_fold(tiny: Tiny, tmp_path: Path, family: str, scope: str) -> None:
    """Separate, grouped, fused and transposed projections; linears with and without bias."""
    base = tiny(family)
    untouched = {path.name: path.read_bytes() for path in base.iterdir()}
    folded = surgery.convert(str(base), output=tmp_path / "folded", scope=scope, **QUICK).output
    made = surgery.convert(
        str(base), output=tmp_path / "adapter", scope=scope, form="adapter", **QUICK
    ).output
    assert (made / WEIGHTS).stat().st_size < 40_000
    assert all((base / name).read_bytes() == raw for name, raw in untouched.items())
    plain, expected = logits(model_in(base)), logits(model_in(folded))
    adapted = peft.PeftModel.from_pretrained(model_in(base), str(made)).eval()
    change, error = (plain - expected).abs().max(), (logits(adapted) - expected).abs().max()
    assert change > 1e-3
    assert error < 0.01 * change
    merged = adapted.merge_and_unload().state_dict()
    stored, original = model_in(folded).state_dict(), model_in(base).state_dict()
    changed = 0
    for name in stored:
        ours, weight = merged[name].numpy(), stored[name].numpy()
        if np.array_equal(weight, original[name].numpy()):
            assert np.array_equal(ours, weight), name
        else:
            changed += 1
            # Two ways to round the same sum.
            np.testing.assert_allclose(ours, weight, rtol=1e-5, atol=1e-6 * np.abs(weight).max())
    config = json.loads((made / CONFIG).read_text())
    assert config["r"] == 1
    assert changed == len(config["target_modules"])


def test_alpha_is_the_strength(tiny: Tiny, tmp_path: Path) -> None:
    """At load time, too: the tensors are the same whatever the strength was."""
    base = str(tiny("llama"))
    whole = surgery.convert(base, output=tmp_path / "whole", form="adapter", **QUICK).output
    half = surgery.convert(
        base, output=tmp_path / "half", form="adapter", strength=0.5, **QUICK
    ).output
    assert (whole / WEIGHTS).read_bytes() == (half / WEIGHTS).read_bytes()
    folded = surgery.convert(base, output=tmp_path / "folded", strength=0.5, **QUICK).output
    dialled = tmp_path / "dialled"
    shutil.copytree(whole, dialled)
    config = json.loads((dialled / CONFIG).read_text())
    assert config["lora_alpha"] == 1
    config["lora_alpha"] = 0.5
    (dialled / CONFIG).write_text(json.dumps(config))
    for folder in (half, dialled):
        adapted = peft.PeftModel.from_pretrained(model_in(Path(base)), str(folder)).eval()
        torch.testing.assert_close(logits(adapted), logits(model_in(folded)), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [{"rank_pattern": {"(": 1}}, {"layers_pattern": "("}, {"target_modules": "([a-z._]+)+X"}],
)
def test_patterns_of_a_stranger(
    change: dict[str, Any], tiny: Tiny, run: Callable[..., Any], tmp_path: Path
) -> None:
    """Whether or not the manifest has the changed file's hash."""
    out = surgery.convert(str(tiny()), output=tmp_path / "out", form="adapter", **QUICK).output
    config = {**json.loads((out / CONFIG).read_text()), **change}
    (out / CONFIG).write_text(json.dumps(config))
    assert run("verify", out, "-q").code == 5
    manifest = json.loads((out / "surgery.json").read_text())
    for record in manifest["files"]:
        raw = (out / record["name"]).read_bytes()
        record |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (out / "surgery.json").write_text(json.dumps(manifest))
    assert f"another {next(iter(change))}" in run("verify", out, "-q").sentence()


def test_command_verify_and_reproduce(tiny: Tiny, run: Callable[..., Any], tmp_path: Path) -> None:
    """Checked against PEFT when written; damage is found; a second run gives the same bytes."""
    base, out = tiny("qwen3"), tmp_path / "out"
    run(
        *("convert", base, "--fold", "sink", "--as", "adapter", "-o", out, "--force", "--quiet"),
        *("--check-tokens", "256", "--calibration-tokens", "512"),
    ).ok()
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert "--as adapter" in card
    assert "PEFT's logits on the untouched base are the folded weights'" in card
    told = run("verify", out, "--json").ok().json()
    assert len(told["checks"]) == 4
    assert surgery.reproduce(out).same
    assert "nothing to undo" in run("revert", out, "-o", tmp_path / "x").sentence()
    raw = bytearray((out / WEIGHTS).read_bytes())
    raw[-2] ^= 1
    (out / WEIGHTS).write_bytes(bytes(raw))
    assert not run("verify", out, "--json").json()["passed"]


def test_only_the_sink_fold(tiny: Tiny, run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="--fold sink"):
        surgery.convert(str(tiny("llama")), output=tmp_path / "x", form="adapter", layer=3)
    said = run("convert", tiny("llama"), "--as", "gguf-adapter").sentence()
    assert "--fold sink" in said


def test_regroup() -> None:
    """Row i of a head's first half comes before row i of its second half."""
    rows = np.arange(16)
    assert regroup(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


# --------------------------------------------------------------------------------------------
# For llama.cpp. That it acts there is shown in tests/runtimes.
# --------------------------------------------------------------------------------------------


def test_gguf_adapter_from_either_container(small_gguf: Path, tmp_path: Path) -> None:
    """From the GGUF itself and from its safetensors: the same update, rows in llama.cpp's order."""
    from gguf_cut import LAYER

    cut = Path(shutil.copy(small_gguf, tmp_path))
    quick = {**QUICK, "layer": LAYER, "form": "gguf-adapter", "strength": 0.5}
    one = surgery.convert(str(cut), output=tmp_path / "one.gguf", **quick).output
    folder = surgery.resolve(str(cut)).folder
    other = surgery.convert(str(folder), output=tmp_path / "other.gguf", **quick).output
    first, second = read_gguf(one), read_gguf(other)
    names = {f"blk.3.attn_{part}.weight.lora_{side}" for part in "qkv" for side in "ab"}
    assert set(first.tensors) == set(second.tensors) == names
    for name in names:
        ours, theirs = (values_of(file, file.tensors[name]) for file in (first, second))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert ours.shape[name.endswith("lora_b")] == 1 or ours.shape == (576, 1)
    assert first.values["general.type"] == "adapter"
    assert first.values["adapter.type"] == "lora"
    assert first.values["adapter.lora.alpha"] == 0.5
    assert first.values["general.base_model.0.name"] == "cut"
    with pytest.raises(BadSettings, match="exists already"):
        surgery.convert(str(cut), output=one, **quick)


def test_commands_on_a_gguf_adapter(
    small_gguf: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    """Verified against its base, wherever that is; made again; and nothing to undo."""
    from gguf_cut import LAYER

    cut, lora = Path(shutil.copy(small_gguf, tmp_path)), tmp_path / "lora.gguf"
    quick = {**QUICK, "layer": LAYER, "form": "gguf-adapter"}
    surgery.convert(str(cut), output=lora, **quick)
    assert run("verify", lora, "--json").ok().json()["passed"]
    moved = cut.rename(tmp_path / "moved.gguf")
    assert "--base" in run("verify", lora).sentence()
    assert run("verify", lora, "--base", moved, "--json").ok().json()["passed"]
    assert run("reproduce", lora, "--base", moved, "--json").ok().json()["same"]
    assert "nothing to undo" in run("revert", lora, "-o", tmp_path / "x.gguf").sentence()
    place = read_gguf(lora).tensors["blk.3.attn_q.weight.lora_b"].begin
    raw = bytearray(lora.read_bytes())
    raw[place] ^= 1
    lora.write_bytes(bytes(raw))
    told = run("verify", lora, "--base", moved, "--json").json()
    assert not told["passed"]
    assert "blk.3.attn_q.weight.lora_b" in told["checks"][0]["detail"]


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads, traces, locates or dequantises fails."""

    def fail(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("something was loaded before the refusal")

    for name in ("model", "plain", "anatomy", "tokenizer", "config"):
        monkeypatch.setattr(Patient, name, property(fail))
    for place in ("surgery.models.loading.load_model", "surgery.jobs.convert.decide"):
        monkeypatch.setattr(place, fail)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("form", "name", "more", "words"),
    [
        ("adapter", "x", {"strength": 0.0}, "nothing for an adapter"),
        ("gguf-adapter", "x.gguf", {"strength": 0.0}, "nothing for an adapter"),
        ("adapter", "x", {"fold": "norm"}, "needs --fold sink"),
        ("adapter", "x", {"fold": "qkv"}, "needs --fold sink"),
        ("gguf-adapter", "x.gguf", {"fold": "norm"}, "needs --fold sink"),
        ("adapter", "x.gguf", {}, "writes a folder"),
        ("gguf-adapter", "x", {}, r"ending in \.gguf"),
        ("adapter", "x", {"undo_file": True}, "changes no byte"),
        ("gguf-adapter", "x.gguf", {"undo_file": True}, "changes no byte"),
        ("gguf-adapter", "x.gguf", {"family": "gpt_neox"}, r"give the \.gguf file"),
        ("checkpoint", "x.gguf", {"fold": "norm"}, r"is no \.gguf file"),
        ("checkpoint", "x.gguf", {"fold": "sink"}, "--as gguf-adapter"),
        ("checkpoint", "x.gguf", {"fold": "norm", "undo_file": True}, "undone from its own"),
        ("adapter", "there", {}, "exists already"),
        ("gguf-adapter", "there.gguf", {}, "exists already"),
        ("adapter", "there", {"overwrite": True}, "surgery did not write"),
        ("adapter", "there.file", {"overwrite": True}, "is not a directory"),
        ("gguf-adapter", "there.gguf", {"overwrite": True}, "was not written by surgery"),
        ("adapter", "there.file/x", {}, "is not a directory"),
        ("gguf-adapter", "there.file/x.gguf", {}, "is not a directory"),
        ("adapter", "x" * 250, {}, "is too long"),
        ("gguf-adapter", "x" * 250 + ".gguf", {}, "is too long"),
    ],
)
def test_refused_before_anything_is_loaded(
    tiny: Tiny, tmp_path: Path, form: str, name: str, more: dict[str, Any], words: str
) -> None:
    """Each reason why an adapter or a .gguf file can never be written."""
    (tmp_path / "there").mkdir()
    for mine in ("there/mine", "there.gguf", "there.file"):
        (tmp_path / mine).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    options = {**QUICK, **more}
    base = tiny(options.pop("family", "llama"))
    with pytest.raises((BadSettings, Unsupported), match=words):
        surgery.convert(str(base), output=tmp_path / name, form=form, **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("form", ["adapter", "gguf-adapter"])
def test_an_output_over_its_base_is_refused_first(
    tiny_copy: Tiny, tmp_path: Path, form: str
) -> None:
    base = tiny_copy("llama")
    name = "inside" if form == "adapter" else "inside.gguf"
    before = sorted(base.rglob("*"))
    with pytest.raises(BadSettings, match="inside"):
        surgery.convert(str(base), output=base / name, form=form, **QUICK)
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        *(("llama", "llama"), ("mistral", "llama"), ("smollm3", "smollm3"), ("qwen2", "qwen2")),
        *(("qwen3", "qwen3"), ("gemma", "gemma"), ("gemma2", "gemma2"), ("gemma3_text", "gemma3")),
        *(("phi3", "phi3"), ("gpt2", "gpt2")),
    ],
)
def test_gguf_adapter_of_a_folder(
    tiny: Tiny, tmp_path: Path, family: str, architecture: str
) -> None:
    """The same update as PEFT's, under llama.cpp's names; rows in pairs where it has them so."""
    regrouped = family in ("llama", "mistral", "smollm3")
    same_update(tiny(family), 3, tmp_path, architecture, regrouped, family in ("phi3", "gpt2"))


@pytest.mark.parametrize(("name", "regrouped"), [("gemma3", False), ("mistral3", True)])
def test_gguf_adapter_of_a_multimodal_folder(tmp_path: Path, name: str, regrouped: bool) -> None:
    """Its decoder is one part of the model, and llama.cpp's names do not say so."""
    import more_models

    case = more_models.CASES[name]
    if not case.exists:
        pytest.skip("another release of transformers")
    base = more_models.save(case, tmp_path / "base")
    same_update(base, case.layer, tmp_path, name, regrouped, False)


def same_update(
    base: Path, layer: int, tmp_path: Path, architecture: str, regrouped: bool, fused: bool
) -> None:
    config = json.loads((base / "config.json").read_text())
    config = config.get("text_config", config)
    head = config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    quick = {**QUICK, "layer": layer}
    folder = surgery.convert(str(base), output=tmp_path / "peft", form="adapter", **quick).output
    made = surgery.convert(
        str(base), output=tmp_path / "x.gguf", form="gguf-adapter", **quick
    ).output
    file, stored = read_gguf(made), load_file(folder / WEIGHTS)
    assert file.values["general.architecture"] == architecture
    assert len(file.tensors) == len(stored)
    assert {name.split(".")[2] for name in file.tensors} == (
        {"attn_qkv"} if fused else {"attn_q", "attn_k", "attn_v"}
    )
    for name, values in stored.items():
        part = "qkv" if fused else name.split("_proj")[0][-1]
        found = values_of(
            file, file.tensors[f"blk.{layer + 1}.attn_{part}.weight.{name[-13:-7].lower()}"]
        )
        expected = values.numpy()
        if regrouped and part in "qk" and "lora_B" in name:
            # llama.cpp rotates neighbours, transformers the halves of a head.
            halves = expected.reshape(-1, 2, head // 2)
            expected = halves.transpose(0, 2, 1).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected)


def test_gguf_adapter_of_an_unknown_layout(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"give the \.gguf file"):
        surgery.convert(
            str(tiny("gpt_neox")), output=tmp_path / "x.gguf", **QUICK, form="gguf-adapter"
        )
    with pytest.raises(BadSettings, match=r"ending in \.gguf"):
        surgery.convert(str(tiny("llama")), output=tmp_path / "x", **QUICK, form="gguf-adapter")
    assert not list(tmp_path.iterdir())
