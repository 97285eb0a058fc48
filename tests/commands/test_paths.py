"""Paths as people type them: `~` left by the shell, and names of GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shared import Run, Tiny

import surgery
from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.gguf_file import is_gguf, names_gguf, shard_path, shards_of
from surgery.files.paths import expanded
from surgery.patient.source import resolve, resolve_light
from surgery.training.begin import target_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_outputs_and_inputs(home: Path, tiny_copy: Tiny, run: Run) -> None:
    """parsedmarc 485, dace 1578."""
    tiny_copy().rename(home / "model")
    quick = ("--no-check", "--layer", 3)
    run("convert", "~/model", *quick, "--output=~/out").ok()
    assert (home / "out" / "model.safetensors").is_file()
    run("verify", "~/out", "--base=~/model").ok()
    run("inspect", "~/out").ok()
    run("card", "~/out").ok()
    run("revert", "~/out", "--output=~/back", "--base=~/model").ok()
    run("compare", "~/model", "~/out", "--output=~/r.json", "--plot=~/p.png", "-q").ok()
    run("analyze", "~/model", "--plot=~/a.png", "-q").ok()
    assert {path.name for path in home.iterdir()} == {
        *("model", "out", "back", "r.json", "p.png", "a.png"),
    }
    assert not (home.parent / "~").exists()


def test_functions(home: Path, tiny_copy: Tiny) -> None:
    tiny_copy().rename(home / "model")
    (home / "text.txt").write_text("Numbers are useful as well. " * 50)
    done = surgery.convert(
        "~/model", layer=3, output="~/out", check=False, calibration="~/text.txt"
    )
    assert done.output == home / "out"
    assert surgery.verify("~/out").passed
    assert target_of("~/trained", {}, Path("r.yaml")) == home / "trained"
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_names_of_gguf_files(tmp_path: Path) -> None:
    for name in ("a.GGUF", "blob"):
        (tmp_path / name).write_bytes(b"GGUF and more")
        assert is_gguf(tmp_path / name)
    (tmp_path / "b.gguf").write_bytes(b"something else")
    assert not is_gguf(tmp_path / "b.gguf")
    assert not is_gguf(tmp_path)
    assert names_gguf(Path("x.Gguf"))
    assert shard_path(Path("x.GGUF"), 1, 1) == Path("x.GGUF")
    assert shard_path(Path("x.GGUF"), 1, 2) == Path("x-00001-of-00002.GGUF")
    assert shard_path(Path("x"), 1, 1) == Path("x.gguf")
    shards = [tmp_path / f"m-0000{number}-of-00002.GGUF" for number in (1, 2)]
    for shard in shards:
        shard.write_bytes(b"GGUF")
    assert shards_of(shards[1]) == shards


@pytest.mark.parametrize("name", ["cut.GGUF", "0a1b2c"])
def test_a_gguf_by_its_first_bytes(
    small_gguf: Path, tmp_path: Path, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf_cut import LAYER  # needs gguf, as the fixture does

    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))  # not read under another name
    source = tmp_path / name
    shutil.copyfile(small_gguf, source)
    output = tmp_path / "out.GGUF"
    run("convert", source, "--layer", LAYER, "--no-check", "-o", output).ok()
    assert output.is_file()
    run("inspect", output).ok()
    run("revert", output, "-o", tmp_path / "back.GGUF").ok()
    assert (tmp_path / "back.GGUF").read_bytes() == source.read_bytes()


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(BadCheckpoint, match="is a file"):
        resolve(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("find", [resolve, resolve_light])
def test_two_revisions(find: object) -> None:
    with pytest.raises(BadSettings, match="names a revision and so does --revision two"):
        find("someone/name@one", "two")  # type: ignore[operator]
