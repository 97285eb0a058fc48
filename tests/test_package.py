"""The wheel: built, installed in an environment of its own, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import tiny_models
from script import run as run_program

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and sees our dependencies behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run_program(
        *(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT), check=True
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    run_program(
        *(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel), check=True
    )
    # A .pth line comes after the environment's own packages: the wheel's `surgery` wins.
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_convert_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Templates and texts travel inside the wheel; nothing of the repository is used."""
    source = tiny_models.save("llama", tmp_path / "model", layer=3, layers=8)
    clean = dict.fromkeys(key for key in os.environ if key.startswith("PYTHON"))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return run_program(installed, *words, cwd=tmp_path, env=clean)

    where = run("-c", "import surgery; print(surgery.__file__)")
    assert str(installed.parents[1]) in where.stdout
    done = run(
        *("-m", "surgery", "convert", source, "--rate", "0.1", "--output", "out"),
        *("--max-degradation", "1000", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["target_layers"] == [4]
    assert "WeMask" in (tmp_path / "out" / "README.md").read_text()
    recipes = run(
        "-c",
        "from surgery.resources import resource_folder as f; "
        "print(f('hub_cards').is_dir(), f('recipes').is_dir())",
    )
    assert recipes.stdout.split() == ["True", "True"]
