"""What the tests share: one thread, no caches of the user, tiny checkpoints, the command line."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# huggingface_hub reads its folders when it is first imported, which is below.
_HOME = tempfile.mkdtemp(prefix="surgery-tests-home-")
os.environ["HF_HOME"] = _HOME
os.environ["MPLCONFIGDIR"] = _HOME
os.environ.pop("HF_TOKEN", None)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import script  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from shared import Outcome, Run, Tiny  # noqa: E402

# A shared machine has its slow moments, and a test that fails must fail again for the next person.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("tests")

CONVERT_QUICKLY = ("--check-tokens", "256", "--calibration-tokens", "512")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Threads would wait for each other longer than these models take to run."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted sources are kept for the session, so that `demo` is converted once in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("surgery-cache")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg-cache")))
        yield
    shutil.rmtree(_HOME, ignore_errors=True)


# --------------------------------------------------------------------------------------------
# Tiny checkpoints
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny(family, **options)`: a saved tiny model, made once per session. Not to be changed."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str = "llama", **options: Any) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / f"tiny-{family}"
            made[key] = tiny_models.save(family, folder, **options)
        return made[key]

    return make


@pytest.fixture
def tiny_copy(tiny: Tiny, tmp_path: Path) -> Tiny:
    """As `tiny`, but a copy that the test may change."""

    def make(family: str = "llama", **options: Any) -> Path:
        target = Path(tempfile.mkdtemp(prefix="copy-", dir=tmp_path)) / f"tiny-{family}"
        shutil.copytree(tiny(family, **options), target)
        return target

    return make


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("convert", folder, ...)`: a command in this process.

    An exception that would be a traceback for the user fails the test.
    """
    from surgery.commands import cli

    monkeypatch.setenv("COLUMNS", "250")

    def call(*words: Any) -> Outcome:
        result = CliRunner().invoke(
            cli, [str(word) for word in words], prog_name="surgery", catch_exceptions=True
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def shell() -> Run:
    """As `run`, in a process of its own: what a user's shell sees."""

    def call(*words: Any, **options: Any) -> Outcome:
        return python("-m", "surgery", *words, **options)

    return call


def python(*words: Any, **options: Any) -> Outcome:
    """Run the interpreter of the tests."""
    done = script.run(sys.executable, *words, timeout=120, env={"OMP_NUM_THREADS": "1"}, **options)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(name="python")
def _python() -> Run:
    """The interpreter of the tests, with these arguments."""
    return python


# --------------------------------------------------------------------------------------------
# Looking at folders
# --------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """Everything below a folder: the bytes of each file, None for each folder."""

    def look(folder: Path) -> dict[str, bytes | None]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))
        }

    return look
