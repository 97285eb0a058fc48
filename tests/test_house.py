"""The house: directions of imports, sizes, and registries that agree with what names them."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import fields
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import surgery
from surgery.folds.registry import FOLDS
from surgery.outputs.registry import OUTPUTS, output_for
from surgery.settings import FORMS, Settings

ROOT = Path(surgery.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 450, 60


def test_imports_run_downward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts in pyproject.toml, as `make lint` checks them."""
    linter = pytest.importorskip("importlinter.cli", reason="import-linter is not installed")
    monkeypatch.chdir(ROOT.parent)
    assert linter.lint_imports(no_cache=True) == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_and_functions_are_short(path: Path) -> None:
    """Lines of a module; of a function those from its first statement after the docstring."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < LONGEST_FUNCTION, node.name


def test_every_form_has_one_kind_of_output() -> None:
    """`--as` offers what the registry writes; the others are chosen by the name of the output."""
    assert {output_for(form, None).name for form in FORMS} == set(FORMS)
    assert {kind.name for kind in OUTPUTS} - set(FORMS) == {"gguf"}
    assert output_for("checkpoint", Path("x.gguf")).name == "gguf"


@pytest.mark.parametrize("job", [surgery.convert, surgery.publish])
def test_a_signature_shows_every_setting(job) -> None:
    """With the default that the command line and the manifest have."""
    shown = inspect.signature(job).parameters
    hidden = {"check", "push_to_hub"} if job is surgery.publish else set()
    for known in fields(Settings):
        if known.name not in {"model", *hidden}:
            assert shown[known.name].default == known.default, known.name
    assert all(kind.kind is not kind.VAR_KEYWORD for kind in shown.values())


def test_folds_are_known_by_their_names() -> None:
    assert {name: fold.name for name, fold in FOLDS.items()} == {name: name for name in FOLDS}


def test_every_package_that_is_imported_is_declared() -> None:
    """Not only because another one brings it, which may stop doing so."""
    project = ROOT.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("pyproject.toml is not beside the package")
    words = re.findall(r'"([A-Za-z][\w.-]*)', project.read_text(encoding="utf-8"))
    declared = {word.lower().replace("_", "-") for word in words}
    imported: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    installed = packages_distributions()
    strange = {
        name
        for name in imported - sys.stdlib_module_names - {"surgery", "tomllib"}
        if not {d.lower().replace("_", "-") for d in installed.get(name, [name])} & declared
    }
    assert strange == set()
