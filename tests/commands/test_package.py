"""The wheel: built, installed in an environment of its own, and used there."""

from __future__ import annotations

import ast
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

import surgery

ROOT = Path(__file__).parents[2]


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
        "from surgery.files.resources import resource_folder as f; "
        "print(f('hub_cards').is_dir(), f('recipes').is_dir())",
    )
    assert recipes.stdout.split() == ["True", "True"]


def test_public_names_are_the_same_for_type_checkers_and_at_run_time() -> None:
    """What `TYPE_CHECKING` imports is what the table of lazy names holds, from the same modules."""
    tree = ast.parse((ROOT / "surgery" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        name.name: str(node.module).removeprefix("surgery.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported == surgery._HOMES
    assert set(surgery.__all__) == set(imported) <= set(dir(surgery))
    for name in surgery.__all__:
        assert getattr(surgery, name) is not None


def test_gated_attention_is_where_the_cards_of_trained_models_say() -> None:
    code = "import surgery; print(surgery.gated_attention.add_gates.__name__)"
    done = run_program(sys.executable, "-c", code)
    assert done.stdout.strip() == "add_gates", done.stderr


def test_the_log_is_silent_until_asked_for() -> None:
    code = "import logging, surgery; logging.getLogger('surgery.any').warning('heard')"
    done = run_program(sys.executable, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
