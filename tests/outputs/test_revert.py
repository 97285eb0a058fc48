"""Undoing a conversion restores the base byte for byte, or says why not and writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.generated import UNDO

Tiny = Callable[..., Path]
QUICK = {"check": False, "layer": 3}
Snapshot = Callable[[Path], dict[str, bytes | None]]


@pytest.fixture
def base(tiny_copy: Tiny) -> Callable[..., Path]:
    """A base with a card, a figure of its own and a second copy of its weights."""

    def make(family: str = "llama", **options: Any) -> Path:
        folder = tiny_copy(family, **options)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
        (folder / "surgery_layers.png").write_bytes(b"a picture")
        (folder / "surgery_loss.png").write_bytes(b"another")
        (folder / "extra").mkdir()
        (folder / "extra" / "notes.txt").write_text("kept")
        return folder

    return make


@pytest.mark.parametrize(
    ("family", "fold", "undo_file", "source"),
    [
        ("llama", "norm", False, "manifest"),
        ("gemma3_text", "norm", False, "manifest"),
        ("gpt2", "norm", False, "manifest"),
        ("llama", "qkv", True, "undo file"),
        ("gpt2", "qkv", True, "undo file"),
        ("phi3", "sink", True, "undo file"),
        ("llama", "sink", False, "base"),
    ],
)
def test_byte_for_byte(
    base: Callable[..., Path],
    snapshot: Snapshot,
    tmp_path: Path,
    family: str,
    fold: str,
    undo_file: bool,
    source: str,
) -> None:
    folder = base(family, shards=2)
    before = snapshot(folder)
    made = surgery.convert(
        str(folder),
        output=tmp_path / "out",
        fold=fold,
        undo_file=undo_file,
        include=("extra/*",),
        **QUICK,
    )
    assert (made.output / UNDO).is_file() == undo_file
    if source != "base":
        shutil.rmtree(folder)
    result = surgery.revert(tmp_path / "out", tmp_path / "back")
    assert result.source == source
    assert result.files == sum(content is not None for content in before.values())
    assert snapshot(tmp_path / "back") == before


def test_what_qkv_keeps_is_small(base: Callable[..., Path], tmp_path: Path) -> None:
    """The columns alone, and no part of the checkpoint that a runtime loads."""
    folder = base()
    surgery.convert(str(folder), output=tmp_path / "out", fold="qkv", undo_file=True, **QUICK)
    undo = tmp_path / "out" / UNDO
    assert undo.stat().st_size < 0.2 * (folder / "model.safetensors").stat().st_size
    assert undo.parent != tmp_path / "out"
    verification = surgery.verify(tmp_path / "out")
    assert verification.passed
    assert surgery.reproduce(tmp_path / "out").same


@pytest.mark.parametrize("what", ["weights", "manifest", "undo file"])
def test_damage_is_found(base: Callable[..., Path], tmp_path: Path, what: str) -> None:
    folder, out = base(), tmp_path / "out"
    fold = "sink" if what == "undo file" else "norm"
    surgery.convert(str(folder), output=out, fold=fold, undo_file=True, **QUICK)
    if what == "manifest":
        table = json.loads((out / "surgery.json").read_text())
        original = table["edits"][0]["original"]
        table["edits"][0]["original"] = original[-8:] + original[8:]
        (out / "surgery.json").write_text(json.dumps(table))
    else:
        path = out / (UNDO if what == "undo file" else "model.safetensors")
        raw = bytearray(path.read_bytes())
        raw[-9] ^= 1
        path.write_bytes(bytes(raw))
    with pytest.raises(BadCheckpoint):
        surgery.revert(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".back*"))


def test_an_earlier_undo_file(
    base: Callable[..., Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    """Two would have one name: the plan says which one is kept where."""
    first, second = tmp_path / "first", tmp_path / "second"
    quick = ("--fold", "qkv", "--undo-file", "--no-check", "--layer", 3)
    plain = run("convert", base(), "-o", first, *quick).ok()
    assert "own conversion" not in plain.stdout
    again = run("convert", first, "-o", second, *quick).ok()
    assert f"{UNDO} (it undoes the base's own conversion: keep the base)" in again.stdout
    told = run("revert", second, "-o", tmp_path / "back").ok()
    assert UNDO in told.stderr


def test_without_the_base(base: Callable[..., Path], tmp_path: Path) -> None:
    """Without an undo file the base is asked for; another model is not taken for it."""
    folder, out = base(), tmp_path / "out"
    surgery.convert(str(folder), output=out, fold="qkv", **QUICK)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    with pytest.raises(BadCheckpoint, match="--undo-file"):
        surgery.revert(out, tmp_path / "back")
    other = base("llama", seed=7)
    with pytest.raises(BadCheckpoint, match="sha256"):
        surgery.revert(out, tmp_path / "back", base=str(other))
    assert surgery.revert(out, tmp_path / "back", base=str(elsewhere)).source == "base"


def test_command(base: Callable[..., Path], run: Callable[..., Any], tmp_path: Path) -> None:
    folder, out = base(), tmp_path / "out"
    run("convert", folder, "-o", out, "--no-check", "--layer", 3, "--quiet").ok()
    told = run("revert", out, "--output", tmp_path / "back", "--json").ok().json()
    assert told["source"] == "manifest"
    assert "exists already" in run("revert", out, "-o", tmp_path / "back").sentence()
    assert "no surgery.json" in run("revert", folder, "-o", tmp_path / "x").sentence()
    with pytest.raises(BadSettings):
        surgery.revert(out, tmp_path / "back")
