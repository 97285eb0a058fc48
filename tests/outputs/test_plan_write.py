"""What may be written where, and that it is written whole, exact, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import BadCheckpoint, BadSettings, SurgeryError, Unsupported
from surgery.files import descriptors, dtypes
from surgery.files.checkpoint import Checkpoint
from surgery.files.generated import CARD, FIGURE, MANIFEST, UNDO
from surgery.files.staging import put
from surgery.folds import edits as fold
from surgery.folds.edits import Columns, Edit, Gain, RankOne, SinkDirection
from surgery.folds.registry import make_edits
from surgery.method.mask import Mask
from surgery.models.anatomy import describe
from surgery.outputs import write
from surgery.outputs.plan import Plan, make_plan
from surgery.outputs.write import copy_plan, staging

Tiny = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]

GENERATED = {CARD, MANIFEST, FIGURE}
LAYERS = (4, 5)


def planned(folder: Path, output: Path, name: str = "qkv", **options: Any) -> Plan:
    """A plan that masks dimensions 3 and 60 of layers 4 and 5."""
    checkpoint = surgery.resolve(str(folder))
    anatomy = describe(checkpoint)
    assert anatomy is not None
    mask = Mask(64, "weight", 1.0, dict.fromkeys(LAYERS, (3, 60)))
    sinks = None
    if name == "sink":
        generator = np.random.default_rng(0)
        sinks = {
            layer: SinkDirection(
                generator.normal(size=2).astype(np.float32),
                generator.normal(size=64).astype(np.float32),
            )
            for layer in LAYERS
        }
    return make_plan(checkpoint, make_edits(anatomy, mask, name, sinks), output, **options)


def tensors_of(folder: Path) -> dict[str, str]:
    """sha256 of every tensor's bytes, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                raw = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = hashlib.sha256(raw).hexdigest()
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------
# Where the output may be
# --------------------------------------------------------------------------------------------


def refused(folder: Path, output: Path, **options: Any) -> str:
    """The sentence with which an output is refused, by the plan and by the whole conversion."""
    with pytest.raises(BadSettings) as by_plan:
        planned(folder, output, **options)
    with pytest.raises(BadSettings) as by_convert:
        surgery.convert(str(folder), layer=3, check=False, output=output, **options)
    assert str(by_plan.value) == str(by_convert.value)
    assert "\n" not in str(by_plan.value)
    return str(by_plan.value)


def test_output_exists(tiny: Tiny, tmp_path: Path, snapshot: Snapshot) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert "exists already" in refused(tiny(), output)
    (output / "mine.txt").write_text("mine")
    assert "exists already" in refused(tiny(), output)
    assert "surgery did not write" in refused(tiny(), output, overwrite=True)
    assert snapshot(tmp_path) == {"out": None, "out/mine.txt": b"mine"}


def test_output_is_a_file(tiny: Tiny, tmp_path: Path, snapshot: Snapshot) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    assert "exists already" in refused(tiny(), output)
    assert "not a directory" in refused(tiny(), output, overwrite=True)
    assert "not a directory" in refused(tiny(), output / "below")
    assert snapshot(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("broken", [True, False])
def test_output_is_a_link(tiny: Tiny, tmp_path: Path, broken: bool) -> None:
    output, target = tmp_path / "out", tmp_path / "target"
    if not broken:
        surgery.convert(str(tiny()), layer=3, check=False, output=target)
    output.symlink_to(target)
    assert "exists already" in refused(tiny(), output)
    assert "not a directory" in refused(tiny(), output, overwrite=True)
    assert output.is_symlink()


@pytest.mark.parametrize("overwrite", [True, False])
def test_output_and_source_overlap(
    tiny_copy: Tiny, tmp_path: Path, overwrite: bool, snapshot: Snapshot
) -> None:
    folder = tiny_copy()
    link = tmp_path / "link"
    link.symlink_to(folder)
    before = snapshot(tmp_path)
    for output in (folder, folder / ".", link, folder / ".." / folder.name):
        assert "the source itself" in refused(folder, output, overwrite=overwrite)
        assert "the source itself" in refused(link, output, overwrite=overwrite)
    for output in (folder / "out", folder.parent, tmp_path, link / "a" / "b"):
        assert "inside one another" in refused(folder, output, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_unusable_names(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 250, "x" * 5000):
        with pytest.raises(SurgeryError) as error:
            surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / name)
        assert error.value.exit_code == 2
    assert left_in(tmp_path) == set()


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 0)() == 0, reason="root, and some systems, may write everywhere"
)
def test_output_in_a_folder_that_is_not_writable(tiny: Tiny, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o500)
    assert "not writable" in refused(tiny(), parent / "out")


def test_not_writable_by_report(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for root, who may write everywhere: as if the system said no."""
    monkeypatch.setattr(os, "access", lambda *_args, **_kwargs: False)
    assert "not writable" in refused(tiny(), tmp_path / "out")


def test_parents_are_made(tiny: Tiny, tmp_path: Path) -> None:
    surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "a" / "b" / "out")
    assert left_in(tmp_path / "a" / "b") == {"out"}


def test_overwrite_replaces_an_earlier_conversion(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    surgery.convert(str(tiny("qwen2")), layer=3, check=False, output=output, rate=0.5)
    (output / "notes.txt").write_text("put there afterwards")
    surgery.convert(str(tiny()), layer=3, check=False, output=output, overwrite=True)
    assert left_in(tmp_path) == {"out"}
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((output / MANIFEST).read_text())["settings"]["rate"] == 0.1
    assert not (output / "notes.txt").exists()


def test_overwrite_of_an_empty_folder(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    surgery.convert(str(tiny()), layer=3, check=False, output=output, overwrite=True)
    assert (output / MANIFEST).is_file()


def test_output_that_appears_while_writing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    """Somebody else's folder is not replaced, with --overwrite neither."""
    output = tmp_path / "out"
    copy = write.copy_plan

    def slow(*args: Any) -> Any:
        done = copy(*args)
        output.mkdir()
        (output / "theirs.txt").write_text("theirs")
        return done

    monkeypatch.setattr("surgery.outputs.folder.copy_plan", slow)
    for overwrite in (False, True):
        with pytest.raises(BadSettings):
            surgery.convert(str(tiny()), layer=3, check=False, output=output, overwrite=overwrite)
        assert snapshot(tmp_path) == {"out": None, "out/theirs.txt": b"theirs"}
        shutil.rmtree(output)


# --------------------------------------------------------------------------------------------
# What the plan refuses and says
# --------------------------------------------------------------------------------------------


def test_disk_too_small(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    size = sum(path.stat().st_size for path in tiny().iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 10**12, size // 2))
    assert "free; choose an --output on a larger disk" in refused(tiny(), tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 0, size + 2**26))
    assert planned(tiny(), tmp_path / "out").bytes_written <= size
    assert left_in(tmp_path) == set()


def test_plan_is_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny("llama", shards=3), tmp_path / "out")
    summary = plan.summary()
    json.dumps(summary)
    assert summary["bytes_written"] == sum(file["bytes"] for file in summary["files"])
    assert summary["bytes_edited"] == 2 * 4 * 64 * (64 + 32 + 32)
    assert summary["tensors_total"] == len(tensors_of(tiny("llama", shards=3)))
    assert [edit["tensor"] for edit in summary["tensors_edited"]] == [
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in LAYERS for name in "qkv"
    ]
    patched = {file["name"] for file in summary["files"] if file["action"] == "patch"}
    assert patched == {edit["file"] for edit in summary["tensors_edited"]}
    with staging(plan.output, plan.checkpoint.folder, overwrite=False) as target:
        written = copy_plan(plan, target)
    assert [file.name for file in written] == [file["name"] for file in summary["files"]]
    assert [file.size for file in written] == [file["bytes"] for file in summary["files"]]
    assert left_in(tmp_path / "out") == {file.name for file in written}


def test_plan_as_data(tiny: Tiny, tmp_path: Path) -> None:
    """Everything that a dry run says, for a small plan."""
    source = tiny("llama", shards=3)
    plan = planned(source, tmp_path / "out", "norm", figure=True, undo_size=12)
    sizes = {path.name: path.stat().st_size for path in source.iterdir() if path.name != CARD}
    found = {file["name"]: file for file in plan.summary()["files"]}
    assert {name: file["bytes"] for name, file in found.items()} == sizes
    edited = [f"model.layers.{layer}.input_layernorm.weight" for layer in LAYERS]
    files = {name: plan.checkpoint.tensors[name].file for name in edited}
    assert plan.summary() == {
        "source": str(source),
        "output": str(tmp_path / "out"),
        "bytes_written": sum(sizes.values()),
        "bytes_needed": sum(sizes.values()) + 12 + 8 * 2**20,
        "bytes_edited": 2 * 4 * 64,
        "tensors_total": len(tensors_of(source)),
        "tensors_edited": [
            {
                "tensor": name,
                "layer": layer,
                "kind": "gain",
                "dtype": "F32",
                "shape": [64],
                "file": files[name],
                "dimensions": 2,
            }
            for layer, name in zip(LAYERS, edited, strict=True)
        ],
        "files": [
            {
                "name": name,
                "bytes": file["bytes"],
                "action": "patch" if name in files.values() else "copy",
            }
            for name, file in found.items()
        ],
        "generated": [
            "README.md",
            "surgery_layers.png",
            "undo/surgery_undo.safetensors",
            "surgery.json",
        ],
        "left_out": [],
    }


@pytest.mark.parametrize(
    ("options", "generated"),
    [
        ({"layer": 3}, {CARD, MANIFEST}),
        ({}, {CARD, MANIFEST, FIGURE}),
        ({"layer": 3, "undo_file": True}, {CARD, MANIFEST}),  # the manifest is enough
        ({"layer": 3, "undo_file": True, "fold": "qkv"}, {CARD, MANIFEST, UNDO}),
        ({"layer": 3, "undo_file": True, "fold": "sink"}, {CARD, MANIFEST, UNDO}),
        ({"layer": 3, "form": "adapter", "fold": "sink"}, {CARD, MANIFEST}),
    ],
)
def test_generated_files_are_as_planned(
    options: dict[str, Any], generated: set[str], tiny: Tiny, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    quick = {"check_tokens": 256, "calibration_tokens": 512, "force": True, "check": False}
    planned = surgery.convert(str(tiny()), output=output, dry_run=True, **quick, **options).plan
    made = surgery.convert(str(tiny()), output=output, **quick, **options)
    assert planned.summary() == made.plan.summary()
    assert set(planned.generated) == generated
    present = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert present == generated | {file.name for file in planned.files}
    kept = [load_file(output / UNDO)] if UNDO in generated else []
    assert planned.undo_size == sum(value.nbytes for file in kept for value in file.values())


def test_space_for_the_undo_file(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = planned(tiny(), tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 0, without.bytes_needed))
    assert planned(tiny(), tmp_path / "out") == without
    with pytest.raises(BadSettings, match="larger disk"):
        planned(tiny(), tmp_path / "out", undo_size=1)


def test_what_a_plan_assumes(tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny(), tmp_path / "out")
    assert plan.generated == (CARD, MANIFEST)
    assert (plan.product, plan.beside, plan.overwrite) == (plan.output, "", False)
    assert plan.undo_size == 0
    assert planned(tiny(), tmp_path / "out", overwrite=True).overwrite


def test_sentences(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan that cannot be is refused with, word for word."""
    source, output = tiny(), tmp_path / "out"

    def sentence(**options: Any) -> str:
        with pytest.raises(SurgeryError) as error:
            planned(source, options.pop("output", output), **options)
        return str(error.value)

    assert sentence(output=source) == ("The output is the source itself; choose another --output.")
    assert sentence(output=source / "out") == (
        f"The output {source / 'out'} and the source {source} lie inside one another; "
        "choose an --output elsewhere."
    )
    output.mkdir()
    assert sentence() == f"{output} exists already; give --overwrite or another --output."
    (output / "mine.txt").write_text("mine")
    assert sentence(overwrite=True) == (
        f"{output} holds files that surgery did not write (no surgery.json), so it will not be "
        "overwritten; remove it yourself or choose another --output."
    )
    file = output / "mine.txt"
    assert sentence(output=file, overwrite=True) == (
        f"{file} is not a directory, so it will not be overwritten."
    )
    assert sentence(output=file / "below") == (
        f"{file} is not a directory; choose another --output."
    )
    shutil.rmtree(output)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 0, 5_000_000))
    needed = planned_size(source)
    assert sentence() == (
        f"Writing needs {needed / 1e9:.2f} GB and {tmp_path} has 0.01 GB free; choose an --output "
        "on a larger disk."
    )
    writable = lambda path, mode: (path, mode) != (tmp_path, os.W_OK | os.X_OK)  # noqa: E731
    monkeypatch.setattr(os, "access", writable)
    assert sentence() == f"{tmp_path} is not writable; choose another --output."


def planned_size(source: Path) -> int:
    """Bytes of a checkpoint without its card, and what a plan keeps free beyond them."""
    return sum(path.stat().st_size for path in source.iterdir() if path.name != CARD) + 8 * 2**20


def test_planning_touches_nothing(tiny: Tiny, tmp_path: Path) -> None:
    planned(tiny(), tmp_path / "a" / "b" / "out")
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("edits", "kind", "word"),
    [
        (
            [Gain("nothing", 0, (1,), 1.0)],
            BadCheckpoint,
            r"^The checkpoint has no tensor nothing to edit\.$",
        ),
        (
            [Gain("a", 0, (1,), 1.0)] * 2,
            BadCheckpoint,
            r"^a would be edited twice\.$",
        ),
        (
            [Gain("a", 0, (4,), 1.0)],
            BadCheckpoint,
            r"^a has shape \[4\], which the mask does not fit\.$",
        ),
        ([Columns("a", 0, (1,), 1.0)], BadCheckpoint, "the mask does not fit"),
        ([Columns("b", 0, (2,), 1.0)], BadCheckpoint, "the mask does not fit"),
        ([Columns("b", 0, (3,), 1.0, axis=0)], BadCheckpoint, "the mask does not fit"),
        (
            [Gain("i", 0, (1,), 1.0)],
            Unsupported,
            r"^i is stored as I8, which cannot be edited; convert the unquantised checkpoint\.$",
        ),
    ],
)
def test_edits_that_the_headers_contradict(
    edits: list[Edit], kind: type[SurgeryError], word: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"a": torch.ones(4), "b": torch.ones(3, 2), "i": torch.ones(4, dtype=torch.int8)}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = surgery.resolve(str(folder))
    with pytest.raises(kind, match=word):
        make_plan(checkpoint, tuple(edits), tmp_path / "out")


# --------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "norm"),
        ("llama", "qkv"),
        ("llama", "sink"),
        ("gpt2", "norm"),
        ("gpt2", "qkv"),
        ("gpt2", "sink"),
        ("phi3", "qkv"),
        ("gpt_neox", "norm"),
        ("qwen3_moe", "qkv"),
    ],
)
def test_only_planned_tensors_differ(
    family: str, name: str, shards: int, tiny: Tiny, tmp_path: Path
) -> None:
    source, output = tiny(family, shards=shards), tmp_path / "out"
    plan = planned(source, output, name)
    with staging(output, source, overwrite=False) as target:
        written = copy_plan(plan, target)
    before, after = tensors_of(source), tensors_of(output)
    assert set(before) == set(after)
    changed = {tensor for tensor in before if before[tensor] != after[tensor]}
    assert changed == {edit.tensor for edit in plan.edits}
    per_layer = {"norm": 2 if family in ("gpt2", "gpt_neox") else 1}
    assert len(changed) == 2 * per_layer.get(
        name, 1 if family in ("gpt2", "phi3", "gpt_neox") else 3
    )
    # Headers, and with them all offsets, are the source's.
    for path in source.glob("*.safetensors"):
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert (output / path.name).read_bytes()[:length] == path.read_bytes()[:length]
    # Side files, the index among them, are the source's.
    for path in source.iterdir():
        if path.name not in GENERATED and path.suffix != ".safetensors":
            assert (output / path.name).read_bytes() == path.read_bytes()
    assert left_in(output) == left_in(source) - GENERATED
    # And the hashes are those of the files.
    for file in written:
        assert file.sha256 == sha256(output / file.name)
        assert file.source_sha256 == sha256(source / file.name)
        assert file.size == (output / file.name).stat().st_size
        edited_here = any(
            plan.checkpoint.tensors[edit.tensor].file == file.name for edit in plan.edits
        )
        assert (file.sha256 != file.source_sha256) == edited_here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["norm", "qkv", "sink"])
def test_stored_formats(dtype: torch.dtype, name: str, tiny: Tiny, tmp_path: Path) -> None:
    """The written tensor is the edit of the stored one, rounded once; its format stays."""
    source, output = tiny("gemma2", dtype=dtype), tmp_path / "out"
    plan = planned(source, output, name)
    with staging(output, source, overwrite=False) as target:
        copy_plan(plan, target)
    stored, edited = (load_file(folder / "model.safetensors") for folder in (source, output))
    for edit in plan.edits:
        assert edited[edit.tensor].dtype == dtype
        one, other = (found[edit.tensor].double().numpy() for found in (stored, edited))
        exact = edit.apply(one, "F64")
        format_name = "BF16" if dtype == torch.bfloat16 else "F16"
        np.testing.assert_array_equal(
            other, dtypes.round_once(exact, format_name).astype(np.float64)
        )
        if name == "norm":
            assert (other[[3, 60]] == -1.0).all()


def test_side_files_in_folders_and_of_every_kind(tiny_copy: Tiny, tmp_path: Path) -> None:
    source, output = tiny_copy(), tmp_path / "out"
    (source / "assets" / "deep").mkdir(parents=True)
    (source / "assets" / "deep" / "x.png").write_bytes(bytes(range(256)) * 9000)
    (source / "README.md").write_text('<p><img width="9" src="./assets/deep/x.png?raw=true"></p>')
    (source / "vocab.txt").write_bytes(b"")
    surgery.convert(str(source), layer=3, check=False, output=output)
    assert sha256(output / "assets/deep/x.png") == sha256(source / "assets/deep/x.png")
    assert (output / "vocab.txt").read_bytes() == b""


def copied(plan: Plan, snapshot: Snapshot) -> tuple[dict[str, bytes | None], list[Any]]:
    with staging(plan.output, plan.checkpoint.folder, overwrite=False) as target:
        written = copy_plan(plan, target)
    found = snapshot(plan.output)
    shutil.rmtree(plan.output)
    return found, written


@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, None]
)
def test_copying_by_reading(
    code: int | None,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: Snapshot,
) -> None:
    """Where the kernel cannot copy, and where there is no such call at all (code None)."""
    plan = planned(tiny("llama", shards=3), tmp_path / "out")
    expected = copied(plan, snapshot)
    monkeypatch.setattr(write, "share_blocks", lambda *_: False)
    if code is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:

        def cannot(*_args: Any) -> int:
            raise OSError(code, "cannot")

        monkeypatch.setattr(os, "copy_file_range", cannot)
    assert copied(plan, snapshot) == expected


def test_copying_by_reflink(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    plan = planned(tiny("llama", shards=3), tmp_path / "out")
    monkeypatch.setattr(write, "share_blocks", lambda *_: False)
    expected = copied(plan, snapshot)

    def share(reader: int, writer: int) -> bool:
        os.pwrite(writer, os.pread(reader, 10**9, 0), 0)
        return True

    monkeypatch.setattr(write, "share_blocks", share)
    monkeypatch.setattr(write, "copy_at", None)  # not needed
    assert copied(plan, snapshot) == expected


@pytest.mark.parametrize(("step", "read"), [(4096, 1000), (777, 64), (10**6, 7001)])
def test_any_step_size(
    step: int,
    read: int,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: Snapshot,
) -> None:
    """Tensors straddle the steps, hashing runs behind: the bytes and hashes are the same."""
    plan = planned(tiny("llama", layers=6), tmp_path / "out", "sink")
    expected = copied(plan, snapshot)
    monkeypatch.setattr(write, "share_blocks", lambda *_: False)
    monkeypatch.setattr(write, "STEP", step)
    monkeypatch.setattr(write, "_READ", read)
    assert copied(plan, snapshot) == expected


def test_the_calls_that_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both copy from the source to the target, from a position to the same one."""
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr("fcntl.ioctl", lambda *args: called.append(args))
    assert descriptors.share_blocks(3, 4) is True
    assert called.pop() == (4, 0x40049409, 3)
    monkeypatch.setattr(os, "copy_file_range", lambda *args: called.append(args) or 7)
    assert descriptors.copy_at(3, 4, 100, 20) == 7
    assert called.pop() == (3, 4, 100, 20, 20)

    def unsupported(*_args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    monkeypatch.setattr("fcntl.ioctl", unsupported)
    assert descriptors.share_blocks(3, 4) is False


@pytest.mark.parametrize("moved", [0, errno.EIO])
def test_a_disk_that_fails_is_not_asked_again(
    moved: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is another way to copy where the system has none, not where the disk is broken."""
    plan = planned(tiny(), tmp_path / "out")

    def copy(*_args: Any) -> int:
        if moved:
            raise OSError(moved, "Input/output error")
        return 0

    monkeypatch.setattr(write, "share_blocks", lambda *_: False)
    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(descriptors, "read_at", None)
    sentence = (
        f"Writing {tmp_path / 'out'} failed: Input/output error."
        if moved
        else "The source became shorter while it was read; run it again."
    )
    with (
        pytest.raises(SurgeryError) as error,
        staging(plan.output, plan.checkpoint.folder, overwrite=False) as target,
    ):
        copy_plan(plan, target)
    assert str(error.value) == sentence
    assert left_in(tmp_path) == set()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
@pytest.mark.parametrize("how", ["taken", "refused", "no such call"])
def test_write_back_is_begun_step_by_step(
    how: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    """The disk is told of every whole step once it is hashed; that is advice, and may fail."""
    plan = planned(tiny(), tmp_path / "out")
    expected = copied(plan, snapshot)
    told: dict[str, list[tuple[int, ...]]] = {}

    def advise(descriptor: int, *advice: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        told.setdefault(name, []).append(advice)
        if how == "refused":
            raise OSError(errno.EINVAL, "no advice, please")

    (weights,) = (file for file in plan.files if file.edits)
    monkeypatch.setattr(write, "STEP", 50_000)
    monkeypatch.setattr(write, "_READ", 10_000)
    if how == "no such call":
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "posix_fadvise", advise)
    assert copied(plan, snapshot) == expected
    if how == "no such call":
        return
    advice = told[weights.name]
    ends = [position + count for position, count, _ in advice]
    assert [position for position, _, _ in advice] == [0, *ends[:-1]]
    assert all(50_000 <= count < 60_000 for _, count, _ in advice)
    assert 0 <= weights.size - ends[-1] < 60_000
    assert {what for _, _, what in advice} == {os.POSIX_FADV_DONTNEED}


def test_where_the_first_patch_is(tiny: Tiny, tmp_path: Path) -> None:
    """Up to there source and output are hashed once; without patches, everywhere."""
    plan = planned(tiny(), tmp_path / "out")
    begins = [plan.checkpoint.tensors[edit.tensor].begin for edit in plan.edits]
    assert write._Patches(plan.checkpoint, plan.edits).first == min(begins)
    assert write._Patches(plan.checkpoint, ()).first >= 2**63


def test_short_reads_and_writes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    """The system may move less than it was asked to."""
    plan = planned(tiny("llama", layers=6), tmp_path / "out")
    expected = copied(plan, snapshot)
    pwrite, preadv, pread = os.pwrite, os.preadv, os.pread

    def cannot(*_args: Any) -> int:
        raise OSError(errno.EXDEV, "cannot")

    monkeypatch.setattr(write, "share_blocks", lambda *_: False)
    monkeypatch.setattr(os, "copy_file_range", cannot)
    monkeypatch.setattr(os, "pwrite", lambda fd, raw, at: pwrite(fd, bytes(raw[:5000]), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:4000]], at))
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 6000), at))
    found = copied(plan, snapshot)
    assert found == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["qkv", "sink"])
def test_memory_is_bounded_by_a_block(
    family: str,
    name: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No more of an edited tensor is in memory than a block of rows, and the bytes are the same."""
    source = tiny(family, dtype=torch.bfloat16)
    plan = planned(source, tmp_path / "whole", name)
    with staging(plan.output, source, overwrite=False) as target:
        whole = copy_plan(plan, target)
    sizes: list[int] = []
    decode = dtypes.decode

    def spy(raw: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        sizes.append(len(raw) // 2)
        return decode(raw, dtype, shape)

    monkeypatch.setattr(dtypes, "decode", spy)
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 500)
    plan = planned(source, tmp_path / "blocks", name)
    with staging(plan.output, source, overwrite=False) as target:
        blocks = copy_plan(plan, target)
    assert max(sizes) <= 500
    assert len(sizes) > 2 * len(plan.edits)
    assert [file.sha256 for file in blocks] == [file.sha256 for file in whole]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_obey_the_umask(umask: int, tiny_copy: Tiny, tmp_path: Path) -> None:
    source, output = tiny_copy(), tmp_path / "out"
    (source / "assets").mkdir()
    (source / "assets" / "x").write_text("x")
    previous = os.umask(umask)
    try:
        surgery.convert(str(source), layer=3, check=False, output=output)
    finally:
        os.umask(previous)
    for path in (output, *output.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


# --------------------------------------------------------------------------------------------
# When something goes wrong
# --------------------------------------------------------------------------------------------


def damaged(folder: Path, tensor: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["norm", "qkv"])
def test_values_that_are_not_finite(
    value: float, name: str, tiny_copy: Tiny, tmp_path: Path
) -> None:
    """Wherever they first matter: when ranking gains, or when editing a weight."""
    folder = tiny_copy()
    tensor = "input_layernorm" if name == "norm" else "self_attn.k_proj"
    damaged(folder, f"model.layers.4.{tensor}.weight", value)
    for select in ("weight", "random"):
        with pytest.raises(BadCheckpoint, match=f"{tensor}.weight holds values that are not fin"):
            surgery.convert(
                str(folder),
                layer=3,
                check=False,
                fold=name,
                select=select,
                output=tmp_path / "out",
            )
    assert left_in(tmp_path) == {folder.parent.name}


def test_an_edit_that_does_not_fit_the_format(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder, output = tiny_copy("llama", dtype=torch.float16), tmp_path / "out"
    plan = planned(folder, output, "sink")
    huge = SinkDirection(np.full(2, 1e30, np.float32), np.ones(64, np.float32))
    edits = tuple(RankOne(e.tensor, e.layer, e.dimensions, 1.0, sink=huge) for e in plan.edits)
    plan = make_plan(plan.checkpoint, edits, output)
    with (
        pytest.raises(BadCheckpoint, match="does not fit into F16"),
        staging(output, folder, overwrite=False) as target,
    ):
        copy_plan(plan, target)
    assert left_in(tmp_path) == {folder.parent.name}


def interrupted(
    tmp_path: Path, source: Path, error: type[BaseException], match: str | None = None
) -> None:
    """A conversion that ends with this error, and leaves nothing but what was there."""
    before = left_in(tmp_path)
    with pytest.raises(error, match=match):
        surgery.convert(str(source), layer=3, check=False, output=tmp_path / "a" / "out")
    assert left_in(tmp_path) == before


def test_source_that_shrinks(
    tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_copy()
    file = source / "model.safetensors"
    copy_at = write.copy_at

    def shrinking(reader: int, writer: int, count: int, position: int) -> int:
        if position and os.fstat(reader).st_size == file.stat().st_size:
            os.truncate(file, position)
        return copy_at(reader, writer, count, position)

    monkeypatch.setattr(write, "share_blocks", lambda *_: False)
    monkeypatch.setattr(write, "copy_at", shrinking)
    monkeypatch.setattr(write, "STEP", 100_000)
    interrupted(tmp_path, source, BadCheckpoint, "became shorter while it was read")


@pytest.mark.parametrize("change", [-1, 1, -(10**6), 0])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_source_that_changed_since_the_plan(
    change: int, name: str, tiny_copy: Tiny, tmp_path: Path
) -> None:
    """In length, or (0) in its time of change alone."""
    source, output = tiny_copy(), tmp_path / "out"
    plan = planned(source, output)
    file = source / name
    before = file.stat()
    os.truncate(file, max(0, before.st_size + change))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + (change == 0)))
    sentence = f"{file} changed while it was read; run the conversion again."
    with (
        pytest.raises(BadCheckpoint, match=f"^{re.escape(sentence)}$"),
        staging(output, source, overwrite=False) as target,
    ):
        copy_plan(plan, target)
    assert left_in(tmp_path) == {source.parent.name}


def test_source_file_that_vanished(
    tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_copy()
    copy = write.copy_plan

    def after_deletion(plan: Plan, *rest: Any) -> Any:
        (source / "tokenizer.json").unlink()
        return copy(plan, *rest)

    monkeypatch.setattr("surgery.outputs.folder.copy_plan", after_deletion)
    interrupted(tmp_path, source, SurgeryError)


@pytest.mark.parametrize(
    ("place", "raised", "expected"),
    [
        ("surgery.outputs.write._Patches.apply", RuntimeError("bug"), RuntimeError),
        ("surgery.outputs.write._Patches.apply", KeyboardInterrupt(), KeyboardInterrupt),
        ("surgery.outputs.write._Hasher._hash", RuntimeError("bug"), RuntimeError),
        (
            "surgery.outputs.write._copy",
            OSError(errno.ENOSPC, "No space left on device"),
            BadSettings,
        ),
        ("surgery.files.staging.sync_tree", OSError(errno.EIO, "Input/output error"), BadSettings),
        ("surgery.outputs.describe.render_card", RuntimeError("bug"), RuntimeError),
        ("surgery.outputs.describe.write_manifest", KeyboardInterrupt(), KeyboardInterrupt),
        ("surgery.outputs.folder.verify_edits", MemoryError(), MemoryError),
        ("tempfile.mkdtemp", OSError(errno.EROFS, "Read-only file system"), BadSettings),
    ],
)
def test_failure_leaves_nothing(
    place: str,
    raised: BaseException,
    expected: type[BaseException],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise raised

    monkeypatch.setattr(place, fail)
    interrupted(tmp_path, tiny(), expected)


@pytest.mark.parametrize("slow", ["copying", "hashing", "patching"])
@pytest.mark.parametrize("why", ["interrupted", "failed"])
def test_an_end_is_prompt(
    slow: str, why: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that write other shards stop at their next block, and nothing is left.

    By themselves they would go on for hundreds of blocks.
    """
    pause = {name: 0.05 if name == slow else 0.0 for name in ("copying", "hashing", "patching")}
    begun = threading.Event()
    blocks = dict.fromkeys(pause, 0)

    def slowed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def slower(*args: Any) -> Any:
            if pause[name]:
                begun.set()
                blocks[name] += 1
                time.sleep(pause[name])
            return call(*args)

        return slower

    source = tiny("llama", shards=3)
    size = max(path.stat().st_size for path in source.glob("*.safetensors"))
    monkeypatch.setattr(write, "STEP", size // 200 if slow == "copying" else size)
    monkeypatch.setattr(write, "_READ", size // 200 if slow == "hashing" else size)
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 1 if slow == "patching" else 4_000_000)
    monkeypatch.setattr(write, "share_blocks", lambda _reader, _writer: False)
    monkeypatch.setattr(write, "copy_at", slowed("copying", write.copy_at))
    monkeypatch.setattr(write, "read_exactly", slowed("hashing", write.read_exactly))
    monkeypatch.setattr(write, "write_exactly", slowed("patching", write.write_exactly))
    plan = planned(source, tmp_path / "out")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # so that all shards are begun together
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    if why == "failed":
        second = sorted(plan.files, key=lambda file: -file.size)[1].name
        opened = write._require_unchanged

        def fails(checkpoint: Checkpoint, file: Any, reader: int) -> None:
            if file.name == second and begun.wait(10):
                raise BadCheckpoint("It changed.")
            opened(checkpoint, file, reader)

        monkeypatch.setattr(write, "_require_unchanged", fails)
    else:
        threading.Thread(
            target=lambda: (begun.wait(10), os.kill(os.getpid(), signal.SIGINT)), daemon=True
        ).start()
    try:
        with (
            pytest.raises(KeyboardInterrupt if why == "interrupted" else BadCheckpoint),
            staging(plan.output, source, overwrite=False) as folder,
        ):
            copy_plan(plan, folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun.is_set()
    assert blocks[slow] < 150, "three shards of two hundred blocks each, or of more"
    assert left_in(tmp_path) == set()


def test_a_written_tensor_that_is_wrong_is_noticed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stores something else, say: the checkpoint never appears."""
    honest = write._Patches.apply

    def wrong(self: Any, reader: int, writer: int, copied: int, ready: Any) -> int:
        done = honest(self, reader, writer, copied, ready)
        if self.first < copied:
            os.pwrite(writer, b"\x01", self.first + 4)
        return done

    monkeypatch.setattr(write._Patches, "apply", wrong)
    with pytest.raises(SurgeryError) as error:
        surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "out")
    assert error.value.exit_code == 5
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("renamed", [1, 2])
def test_an_interruption_between_two_names_leaves_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int, after: bool
) -> None:
    """Where two names cannot be exchanged in one step, the earlier output comes back."""
    monkeypatch.setattr("surgery.files.staging._exchange", lambda _one, _other: False)
    new, output = tmp_path / "new", tmp_path / "out"
    for folder in (new, output):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    real, done = os.rename, []

    def rename(one: Path, other: Path) -> None:
        done.append(other)
        if len(done) != renamed:
            real(one, other)
            return
        if after:
            real(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        put(new, output)
    expected = "new" if renamed == 2 and after else "out"
    assert (output / "file").read_text() == expected


def test_failure_leaves_the_earlier_output(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    output = tmp_path / "out"
    surgery.convert(str(tiny()), layer=3, check=False, output=output)
    before = snapshot(tmp_path)
    monkeypatch.setattr("surgery.files.staging._exchange", lambda _one, _other: False)
    rename = os.rename

    def once_only(source: Any, target: Any) -> None:
        if str(source).endswith(".part"):
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", once_only)
    with pytest.raises(SurgeryError, match="Permission denied"):
        surgery.convert(str(tiny()), layer=3, check=False, rate=0.5, output=output, overwrite=True)
    assert snapshot(tmp_path) == before


def test_progress_counts_every_byte(tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny("llama", shards=3), tmp_path / "out")
    seen: list[int] = []
    with staging(plan.output, plan.checkpoint.folder, overwrite=False) as target:
        copy_plan(plan, target, seen.append)
    assert sum(seen) == plan.bytes_written


def test_the_source_is_never_written(tiny: Tiny, tmp_path: Path, snapshot: Snapshot) -> None:
    source = tiny()
    before = snapshot(source)
    times = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    surgery.convert(str(source), layer=3, output=tmp_path / "out", check_tokens=100)
    assert snapshot(source) == before
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == times


def test_reads_no_more_than_it_needs(tiny: Tiny) -> None:
    """Opening a checkpoint reads headers; the weights may be gone for all it cares."""
    checkpoint = surgery.resolve(str(tiny()))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.size == (tiny() / "model.safetensors").stat().st_size
