"""Each check of a written checkpoint: what it accepts, and the sentence with which it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.errors import BadCheckpoint, VerificationFailed
from surgery.files.checkpoint import Checkpoint
from surgery.files.digests import file_sha256
from surgery.folds.edits import Columns, Gain
from surgery.measure.logits import divergence
from surgery.models.loading import load_model
from surgery.outputs import checks as verification
from surgery.outputs.behaviour import Batch, as_folded, equal, near_reference, stock_load
from surgery.outputs.checks import (
    Check,
    Verification,
    checked,
    verify_edits,
    verify_files,
    verify_masked,
    verify_originals,
    verify_structure,
    verify_untouched,
)
from surgery.outputs.records import FileRecord
from surgery.patient.patient import Loading

Tiny = Callable[..., Path]
GAIN = "model.layers.4.input_layernorm.weight"
EDITS = (
    Gain(GAIN, 4, (3, 60), 1.0),
    Columns("model.layers.4.self_attn.q_proj.weight", 4, (3,), 1.0),
)
CHANGED = [edit.tensor for edit in EDITS]


@pytest.fixture
def base(tiny: Tiny) -> Checkpoint:
    return surgery.resolve(str(tiny("llama", shards=3)))


@pytest.fixture
def folder(base: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the base with EDITS applied, made without surgery's own writer."""
    output = tmp_path / "out"
    shutil.copytree(base.folder, output)
    for edit in EDITS:
        change(output, base, edit.tensor, lambda values: None, edit.dimensions)
    return output


def change(
    folder: Path,
    base: Checkpoint,
    name: str,
    act: Callable[[torch.Tensor], Any],
    zero: tuple[int, ...] = (),
) -> None:
    """Change a tensor's values where they lie, and nothing else of the file."""
    entry = base.tensors[name]
    tensor = load_file(folder / entry.file)[name]
    tensor[..., list(zero)] = 0.0
    act(tensor)
    with open(folder / entry.file, "rb+") as file:
        file.seek(entry.begin)
        file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def failed(check: Check) -> str:
    assert not check.passed
    return check.detail


# --------------------------------------------------------------------------------------------
# Checks as such
# --------------------------------------------------------------------------------------------


def test_a_check_runs_a_test() -> None:
    assert checked("name", lambda: "seen") == Check("name", True, "seen")

    def fails() -> str:
        raise BadCheckpoint("It is wrong.")

    assert checked("name", fails) == Check("name", False, "It is wrong")
    with pytest.raises(ZeroDivisionError):
        checked("name", lambda: str(1 / 0))


def test_the_first_check_that_failed_is_named() -> None:
    good = Verification((Check("one", True), Check("two", True, "seen")))
    assert good.passed
    good.require()
    assert good.as_dict() == {
        "passed": True,
        "checks": [
            {"name": "one", "passed": True, "detail": ""},
            {"name": "two", "passed": True, "detail": "seen"},
        ],
    }
    bad = Verification((Check("one", True), Check("two", False, "why"), Check("three", False, "")))
    assert not bad.passed
    with pytest.raises(VerificationFailed, match=r"^verification failed: two: why\.$"):
        bad.require()


# --------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------


def test_a_good_checkpoint_passes(base: Checkpoint, folder: Path) -> None:
    assert verify_structure(base, folder) == Check(
        "names, shapes, dtypes and index are the base's",
        True,
        f"{len(base.tensors)} tensors in {len(base.weight_files)} file(s)",
    )
    assert verify_edits(base, folder, EDITS) == Check(
        "every edited tensor equals the edit recomputed from the base", True, "2 tensors recomputed"
    )
    edited = sum(base.tensors[edit.tensor].size for edit in EDITS)
    total = sum(path.stat().st_size for path in folder.iterdir()) - edited
    assert verify_untouched(base, folder, CHANGED) == Check(
        "every other tensor and side file is byte-identical to the base",
        True,
        f"{total / 1e6:.1f} MB compared",
    )


def resaved(folder: Path, base: Checkpoint, act: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write the file that holds GAIN again, with its tensors changed."""
    path = folder / base.tensors[GAIN].file
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("lost", [True, False])
def test_tensors_lost_or_added(lost: bool, base: Checkpoint, folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if lost:
        resaved(folder, base, lambda tensors: tensors.pop(GAIN))
        del index["weight_map"][GAIN]
    else:
        resaved(folder, base, lambda tensors: tensors.update(more=torch.ones(2)))
        index["weight_map"]["more"] = base.tensors[GAIN].file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    name = GAIN if lost else "more"
    assert failed(verify_structure(base, folder)) == (
        f"the tensor {name} is in one of base and output only"
    )


@pytest.mark.parametrize(
    "act",
    [
        lambda tensors: tensors.update({GAIN: tensors[GAIN].double()}),
        lambda tensors: tensors.update({GAIN: tensors[GAIN][:32]}),
        lambda tensors: tensors.update({GAIN: tensors[GAIN].reshape(8, 8)}),
    ],
)
def test_tensors_of_another_kind(act: Callable[..., Any], base: Checkpoint, folder: Path) -> None:
    resaved(folder, base, act)
    assert "has another dtype, shape or place than in the base" in failed(
        verify_structure(base, folder)
    )


@pytest.mark.parametrize("element", [0, 3, 63])
def test_an_edited_tensor_that_is_wrong(element: int, base: Checkpoint, folder: Path) -> None:
    change(folder, base, GAIN, lambda values: values[element].add_(1.0))
    assert failed(verify_edits(base, folder, EDITS)) == f"{GAIN} is not what the edit gives"
    assert verify_edits(base, folder, EDITS[1:]).passed
    assert verify_untouched(base, folder, CHANGED).passed


@pytest.mark.parametrize("step", [1, 7, 10, 4096])
def test_every_other_byte_counts(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files compared in steps of any size, around and between ranges that may differ."""
    monkeypatch.setattr(verification, "_STEP", step)
    one, other = tmp_path / "one", tmp_path / "other"
    raw, skip = bytes(range(100)), [(20, 30), (30, 35), (50, 60)]
    one.write_bytes(raw)
    for position in range(100):
        other.write_bytes(raw[:position] + b"\xff" + raw[position + 1 :])
        if any(begin <= position < end for begin, end in skip):
            assert verification._compare_files(one, other, skip) == 75
            continue
        with pytest.raises(BadCheckpoint, match=r"^other differs from the base near byte") as error:
            verification._compare_files(one, other, skip)
        near = int(str(error.value).rsplit(" ", 1)[1])
        assert near <= position < near + step


def test_an_edit_at_the_very_end(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"abcd")
    other.write_bytes(b"abXY")
    assert verification._compare_files(one, other, [(2, 4)]) == 2
    with pytest.raises(BadCheckpoint, match="near byte 0"):
        verification._compare_files(one, other, [])


def test_side_files_are_compared(base: Checkpoint, folder: Path) -> None:
    path = folder / "config.json"
    raw = path.read_bytes()
    path.write_bytes(raw + b" ")
    assert failed(verify_untouched(base, folder, CHANGED)) == (
        "config.json has another length than in the base"
    )
    path.write_bytes(raw[:-1] + b" ")
    assert "config.json differs from the base near byte 0" in failed(
        verify_untouched(base, folder, CHANGED)
    )
    path.unlink()
    assert failed(verify_untouched(base, folder, CHANGED)) == (
        f"{path} cannot be read: No such file or directory"
    )


def test_files_that_do_not_belong(base: Checkpoint, folder: Path) -> None:
    """Generated files and what huggingface_hub leaves are no strangers."""
    (folder / "surgery.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_text("")
    assert verify_untouched(base, folder, CHANGED).passed
    (folder / "deep").mkdir()
    (folder / "deep" / "b.py").write_text("")
    (folder / "deep" / "a.py").write_text("")
    assert failed(verify_untouched(base, folder, CHANGED)) == (
        "the output has a file the base has not: deep/a.py"
    )


def test_a_card_of_the_base_may_be_replaced(tiny_copy: Tiny, tmp_path: Path) -> None:
    source = tiny_copy("llama")
    (source / "README.md").write_text("theirs")
    (source / "vocab.txt").write_text("a")
    base = surgery.resolve(str(source))
    folder = tmp_path / "out"
    shutil.copytree(source, folder)
    (folder / "README.md").write_text("ours")
    assert verify_untouched(base, folder, ()).passed
    (folder / "vocab.txt").write_text("b")
    assert "vocab.txt differs" in failed(verify_untouched(base, folder, ()))


def test_files_against_the_manifest(folder: Path) -> None:
    records = [
        FileRecord(name, 0, file_sha256(folder / name)) for name in sorted(os.listdir(folder))
    ]
    name = "every file has the manifest's sha256"
    assert verify_files(folder, records) == Check(name, True, f"{len(records)} files")
    (folder / "config.json").write_text("{}")
    assert verify_files(folder, records) == Check(
        name, False, "config.json has another sha256 than the manifest says"
    )
    (folder / "config.json").unlink()
    assert verify_files(folder, records) == Check(name, False, "config.json is missing")


def test_original_values(base: Checkpoint) -> None:
    name = "original values kept for undoing are the base's"
    raw = base.read(GAIN).tobytes()
    assert verify_originals(base, {GAIN: raw}) == Check(name, True, "1 tensors")
    assert verify_originals(base, {GAIN: raw[:-1] + b"\x07"}) == Check(
        name, False, f"the original values of {GAIN} are not the base's"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(
    ("family", "fold"), [("gpt2", "norm"), ("gemma", "norm"), ("llama", "qkv")]
)
def test_masked_inputs(
    family: str, fold: str, strength: float, dtype: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Exactly zero, or exactly the rounded multiple: gains, biases and columns, entry by entry."""
    base = surgery.resolve(str(tiny(family, dtype=getattr(torch, dtype))))
    made = surgery.convert(
        str(base.folder),
        layer=3,
        fold=fold,
        strength=strength,
        check=False,
        output=tmp_path / "out",
    )
    edits = made.plan.edits
    kinds = {"gpt2": "gains, {0} values of biases", "gemma": "gains", "llama": "input columns"}
    check = verify_masked(base, made.output, edits)
    assert check.passed, check.detail
    assert (
        check.name
        == {
            1.0: "masked inputs are exactly zero in the saved file",
            0.5: "masked inputs are 0.5 times the base's, rounded once, in the saved file",
            0.3: "masked inputs are 0.7 times the base's, rounded once, in the saved file",
        }[strength]
    )
    masked = len(edits[0].dimensions)
    assert re.sub(r"\d+", "0", check.detail) == "0 values of " + kinds[family].format(0)
    if fold == "norm":
        assert check.detail.startswith(f"{masked} values of gains")
    for edit in edits:  # the smallest difference in any of them is seen
        copy = tmp_path / edit.tensor
        shutil.copytree(made.output, copy)
        entry = base.tensors[edit.tensor]
        start, size = entry.begin, entry.size // int(np.prod(entry.shape))
        with open(copy / entry.file, "r+b") as file:
            file.seek(start + edit.dimensions[-1] * size)
            raw = bytearray(file.read(size))
            raw[0] ^= 1
            file.seek(start + edit.dimensions[-1] * size)
            file.write(raw)
        what = "zero" if strength == 1.0 else "that multiple of the base's"
        assert failed(verify_masked(base, copy, edits)) == f"{edit.tensor} is not {what}"
    if strength == 0.5:
        assert not verify_masked(base, base.folder, edits).passed  # nothing was folded


# --------------------------------------------------------------------------------------------
# Behaviour
# --------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """KL of two distributions over three words, averaged over two tokens."""
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    q = np.array([[0.25, 0.25, 0.5], [0.3, 0.3, 0.4]])
    expected = (p * np.log(p / q)).sum(1).mean()
    shift = np.array([[3.0], [-2.0]])  # logits are known up to a constant for each token
    found = divergence(torch.tensor(np.log(p) + shift), torch.tensor(np.log(q)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert divergence(torch.tensor(p), torch.tensor(p)) == 0.0


@pytest.fixture(scope="module")
def logits(tiny: Tiny) -> tuple[Any, Any, Any]:
    """Two sequences, the second padded by two, and the tiny model's logits of the real tokens."""
    ids = torch.tensor([[1, 5, 9, 13], [1, 7, 0, 0]])
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype="float32").eval()
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[real]
    return ids, real, found


def behaviour(
    folder: Path,
    logits: tuple[Any, Any, Any],
    reference: Any,
    *,
    exact: bool = True,
    rounded: bool = False,
    quality: dict[str, Any] | None = None,
    **options: Any,
) -> list[Check]:
    ids, real, base = logits
    batch, loading = Batch(ids, real, torch.device("cpu")), Loading(**options)
    found, checks = stock_load(folder, batch, loading)
    if exact:
        return [*checks, equal(found, reference, loading.dtype, rounded=rounded)]
    return [*checks, near_reference(found, reference, base, quality, 1e-5)]


def test_logits_equal(tiny: Tiny, logits: tuple[Any, Any, Any]) -> None:
    assert behaviour(tiny("llama"), logits, logits[2].clone()) == [
        Check("stock transformers loads it, no weight missing", True, "LlamaForCausalLM"),
        Check("logits are finite", True, "6 tokens"),
        Check(
            "logits equal the base under a hook that masks every token",
            True,
            "bit-equal in float32",
        ),
    ]


def test_how_the_written_checkpoint_is_run(
    tiny: Tiny, logits: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the base was: in the given dtype, padding masked, no cache; its code only if asked."""
    ids, real, _ = logits
    known: dict[str, Any] = {}

    def load(folder: Path, **loading: Any) -> Any:
        model = load_model(folder, **loading)

        def run(**inputs: Any) -> Any:
            known.update(folder=folder, loading=loading, inputs=inputs)
            return model(**inputs)

        return run

    monkeypatch.setattr("surgery.models.loading.load_model", load)
    cpu = torch.device("cpu")
    for asked in ({}, {"trust_remote_code": True}):
        checks = behaviour(tiny("llama"), logits, logits[2].double(), dtype="float64", **asked)
        assert known["folder"] == tiny("llama")
        trust = {"trust_remote_code": False, **asked}
        assert known["loading"] == {"dtype": "float64", "device": cpu, **trust}
        inputs = known["inputs"]
        assert inputs.keys() == {"input_ids", "attention_mask", "use_cache"}
        assert torch.equal(inputs["input_ids"], ids)
        assert torch.equal(inputs["attention_mask"], real.long())
        assert inputs["use_cache"] is False
    # Float64 is not what the float32 reference was computed in.
    assert "largest difference" in checks[-1].detail


@pytest.mark.parametrize(
    ("share", "exact", "passes"),
    [
        (0.019, False, True),
        (0.021, False, False),
        (1e-6, True, False),
        (-0.019, False, True),
        (-0.021, False, False),
    ],
)
def test_logits_near(
    share: float, exact: bool, passes: bool, tiny: Tiny, logits: tuple[Any, Any, Any]
) -> None:
    """A fiftieth of the largest logit is allowed where rounding is expected; else nothing."""
    reference = logits[2].clone()
    largest = float(reference.abs().max())
    reference[0, int(reference[0].abs().argmin())] += share * largest
    assert float(reference.abs().max()) == largest
    difference = float((reference - logits[2]).abs().max())
    words = (
        ", expected bit-equality" if exact else "; scaled weights are rounded to the stored format"
    )
    assert behaviour(tiny("llama"), logits, reference, rounded=not exact)[-1] == Check(
        "logits equal the base under a hook that masks every token",
        passes,
        f"largest difference {difference:.2e} (largest logit {largest:.3g}){words}",
    )


def measured(distance: float | None) -> dict[str, Any]:
    """What a manifest has of a gate that found the fold at a distance of its reference."""
    return {
        "variants": [
            {"name": "base", "kl_from_reference": None},
            {"name": "reference", "kl_from_reference": 0.0},
            {"name": "folded", "kl_from_reference": distance},
        ]
    }


def test_the_sink_fold_is_as_near_its_reference_as_the_gate_found(
    tiny_copy: Tiny, logits: tuple[Any, Any, Any]
) -> None:
    """Ten times the gate's distance, or half of the base's where no gate ran, and rounding."""
    folder = tiny_copy("llama")
    change(folder, surgery.resolve(str(folder)), GAIN, lambda values: None, (3, 60))
    ids, real, of_base = logits
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.inference_mode():
        written = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[real]

    def by_hand(known: torch.Tensor, other: torch.Tensor) -> float:
        p, q = known.double().softmax(-1), other.double().softmax(-1)
        return float((p * (p / q).log()).sum(-1).mean())

    name = "logits against the paper's mask (hook on the first token)"
    unrelated = torch.roll(of_base, 1, dims=-1)
    for reference in (written, 0.9 * written + 0.1 * of_base, of_base, unrelated):
        distance, whole = by_hand(reference, written), by_hand(reference, of_base)
        for gate in (None, measured(None), measured(0.0), measured(1e-4), measured(distance / 9)):
            check = behaviour(folder, logits, reference, exact=False, quality=gate)[-1]
            found = re.fullmatch(
                r"KL\(reference ‖ this\) (\S+) nats per token, allowed (\S+) \((.+)\); "
                r"KL\(reference ‖ base\) (\S+)",
                check.detail,
            )
            assert found is not None, check.detail
            kl = gate["variants"][-1]["kl_from_reference"] if gate else None
            limit = (10 * kl if kl is not None else 0.5 * whole) + 1e-5
            assert check.name == name
            assert float(found[1]) == pytest.approx(distance, rel=0.01, abs=1e-8)
            assert float(found[2]) == pytest.approx(limit, rel=0.01)
            assert ("no gate ran" in found[3]) == (kl is None)
            assert float(found[4]) == pytest.approx(whole, rel=0.01, abs=1e-8)
            assert check.passed == (distance <= limit)
    for gate in (None, measured(1e-4)):
        assert behaviour(folder, logits, written, exact=False, quality=gate)[-1].passed
        for wrong in (unrelated, written * float("nan")):
            assert not behaviour(folder, logits, wrong, exact=False, quality=gate)[-1].passed


def test_the_sink_fold_is_what_was_folded_in_memory(logits: tuple[Any, Any, Any]) -> None:
    """Up to the rounding that is allowed; another's logits, or none, are not."""
    known = logits[2]
    assert as_folded("x", known.clone(), known, 1e-5).passed
    noise = 1e-4 * torch.sin(torch.arange(known.shape[-1]))
    assert as_folded("x", known + noise, known, 1e-5).passed
    for other in (torch.roll(known, 1, dims=-1), 1.1 * known, known * float("nan")):
        check = as_folded("x", other, known, 1e-5)
        assert not check.passed
        assert check.detail.endswith("nats per token, allowed 1.0e-05")


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("wrong", ["reference", "folded"])
def test_a_sink_fold_that_is_another_is_refused(
    form: str, checked: bool, wrong: str, tiny: Tiny, tmp_path: Path, monkeypatch: Any
) -> None:
    """An unrelated reference, or other weights in memory, for what is written and verified."""
    if form == "adapter":
        pytest.importorskip("peft")
    output = tmp_path / "out"

    def make() -> Any:
        return surgery.convert(
            str(tiny("llama", layers=6)),
            layer=3,
            scope="all",
            fold="sink",
            form=form,
            output=output,
            check=checked,
            check_tokens=300,
            calibration_tokens=512,
            force=True,
        )

    if not checked:
        make()
        assert surgery.verify(output).passed
    if wrong == "reference":
        from surgery.outputs import adapter
        from surgery.outputs import behaviour as module

        honest = module.masked_logits
        for place in (module, adapter):
            monkeypatch.setattr(
                place, "masked_logits", lambda *given: torch.roll(honest(*given), 1, dims=-1)
            )
        name = "logits against the paper's mask (hook on the first token)"
    else:
        from contextlib import nullcontext

        monkeypatch.setattr("surgery.folds.editing.edited", lambda *_: nullcontext())
        name = "folded"
    if checked:
        with pytest.raises(VerificationFailed, match=re.escape(name)):
            make()
        assert not output.exists()
    else:
        failing = [check.name for check in surgery.verify(output).checks if not check.passed]
        assert len(failing) == 1
        assert name in failing[0]


def test_logits_that_are_not_finite(tiny_copy: Tiny, logits: tuple[Any, Any, Any]) -> None:
    """A checkpoint that loads and gives NaN is no checkpoint."""
    folder = tiny_copy("llama")
    checkpoint = surgery.resolve(str(folder))
    change(folder, checkpoint, "model.norm.weight", lambda values: values.fill_(float("nan")))
    checks = behaviour(folder, logits, logits[2])
    assert [check.passed for check in checks] == [True, False, False]
    assert checks[1] == Check("logits are finite", False, "6 tokens")


def test_a_checkpoint_that_does_not_load(tiny_copy: Tiny, logits: tuple[Any, Any, Any]) -> None:
    folder = tiny_copy("llama")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BadCheckpoint):
        behaviour(folder, logits, logits[2])
