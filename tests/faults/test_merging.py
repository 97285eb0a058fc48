"""Every step of merging, folding and publishing a training, with the process killed there."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from small_recipes import least_recipe

sys.path.insert(0, str(Path(__file__).parent))

from crash_points import (
    KILLED,
    Job,
    count,
    fail,
    in_child,
    interrupt,
    kill,
    left_beside,
    run_until,
)

from surgery.errors import BadSettings
from surgery.jobs import finetune as finetuning
from surgery.jobs.finetune import FineTuning, finetune
from surgery.settings import Settings
from surgery.training.recipe import parse_recipe, read_recipe

Snapshot = Callable[[Path], dict[str, bytes | None]]
PRODUCTS = ("base", "adapter", "model")
# Of the steps, this many are tried in every run; all of them in a full one.
SAMPLE = 4


def a_recipe(folder: Path, model: Path | str, **block: Any) -> Path:
    """Two steps of training a tiny model, of which everything is kept that can be."""
    block = {"layer": 1, "fold": "norm", "save": "both", "force": True, **block}
    return least_recipe(folder / "recipe.yaml", model, block, save_steps=1)


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    """Folds are measured on little text, and the loss is a figure that takes no time to draw."""

    def plot(_history: Any, file: Path, _title: str) -> bool:
        file.write_bytes(b"a figure")
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.training.products.plot_loss", plot)
        patch.setattr(Settings, "check_tokens", 128)
        patch.setattr(Settings, "calibration_tokens", 128)
        yield


class Training:
    """A training that is done, and what follows it as a job of its own."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.source, self.output, self.done = source, folder / "work" / "out", folder / "done"
        self.recipe = a_recipe(folder, source)
        captured: list[Any] = []
        honest = finetuning.finish

        def finish(*given: Any) -> FineTuning:
            captured[:] = given
            shutil.copytree(self.output, self.done)
            return honest(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetuning, "finish", finish)
            finetune(self.recipe, output=self.output)
        self.merge: Job = lambda: honest(*captured) and None

    def reset(self) -> None:
        """Back to the moment after the training."""
        shutil.rmtree(self.output)
        shutil.copytree(self.done, self.output)

    def resume(self) -> None:
        """As a user goes on."""
        finetune(self.recipe, output=self.output, resume=True)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Training:
    return Training(tmp_path_factory.mktemp("training"), tiny("llama", layers=3, layer=1))


def products(training: Training, snapshot: Snapshot) -> dict[str, dict[str, bytes | None]]:
    """Everything below the products that are there."""
    return {
        name: snapshot(training.output / name)
        for name in PRODUCTS
        if (training.output / name).exists()
    }


def weights(found: dict[str, dict[str, bytes | None]]) -> dict[str, Any]:
    """The products without what tells how long something took."""
    ending = (".safetensors", "config.json")
    return {
        name: {path: raw for path, raw in files.items() if path.endswith(ending)}
        for name, files in found.items()
    }


def steps(total: int, sampled: bool) -> list[int]:
    """The steps to try, the first and the last among them."""
    return sorted({*range(1, total + 1, total // SAMPLE if sampled else 1), total})


def merging_steps(training: Training, sampled: bool) -> list[int]:
    training.reset()
    return steps(count(training.merge), sampled)


amounts = pytest.mark.parametrize(
    "sampled", [True, pytest.param(False, marks=pytest.mark.full)], ids=["some", "all"]
)


@amounts
def test_killed_at_every_step(training: Training, snapshot: Snapshot, sampled: bool) -> None:
    """A product is absent or whole, an adapter never without its base; going on gives the same."""
    of_source = snapshot(training.source)
    training.reset()
    assert in_child(training.merge) == 0
    whole, tree = products(training, snapshot), snapshot(training.output)
    assert sorted(whole) == sorted(PRODUCTS)
    seen = set()
    for at in merging_steps(training, sampled):
        training.reset()
        assert run_until(training.merge, at, kill) == KILLED
        present = products(training, snapshot)
        assert present == {name: whole[name] for name in present}, at
        assert "adapter" not in present or "base" in present
        seen.add(len(present))
        assert in_child(training.merge) == 0, at
        assert snapshot(training.output) == tree, at
    assert in_child(training.resume) == 0
    assert weights(products(training, snapshot)) == weights(whole)
    assert snapshot(training.source) == of_source
    assert sampled or seen == {0, 1, 2, 3}


@amounts
@pytest.mark.parametrize("what", ["no space", "interrupted"])
def test_failing_at_every_step(
    training: Training, snapshot: Snapshot, what: str, sampled: bool
) -> None:
    """One sentence or a clean interruption; nothing half-written and nothing temporary is left."""
    action = {"no space": fail(errno.ENOSPC), "interrupted": interrupt}[what]

    def merge() -> None:
        with finetuning.in_one_sentence(training.output):
            training.merge()

    training.reset()
    assert in_child(training.merge) == 0
    whole = products(training, snapshot)
    failed = 0
    for at in merging_steps(training, sampled):
        training.reset()
        code = run_until(merge, at, action)
        assert code in (0, 1, 2, 7, 130), at
        failed += code != 0
        present = products(training, snapshot)
        assert present == {name: whole[name] for name in present}, at
        assert code != 0 or present == whole
        # Unless it was the removing of what is temporary that failed, which the next run does.
        assert present == whole or not list(training.output.rglob(".*")), at
    assert failed


@amounts
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_training_is_begun_or_not(
    overwrite: bool, training: Training, tmp_path: Path, snapshot: Snapshot, sampled: bool
) -> None:
    """Killed at every step of beginning: nothing, the earlier training, or the new one."""
    output = tmp_path / "work" / "out"
    recipe = parse_recipe(read_recipe(training.recipe), "recipe.yaml", output)

    def begin() -> None:
        with ExitStack() as stack:
            finetuning.prepare(recipe, (), output, stack, resume=False, overwrite=overwrite)

    def reset() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        if overwrite:
            shutil.copytree(training.done, output)

    reset()
    before = snapshot(output)
    assert in_child(begin) == 0
    new = snapshot(output)
    assert set(new) == {"training", "training/recipe.json"}
    seen = set()
    reset()
    for at in steps(count(begin), sampled):
        reset()
        assert run_until(begin, at, kill) == KILLED
        now = snapshot(output)
        assert now in (before, new), at
        seen.add(now == new)
        # What exists by then is not begun again unasked.
        assert in_child(begin) == (2 if now == new and not overwrite else 0), at
        assert snapshot(output) == new
        assert not left_beside(output) or now == new
    assert seen == {False, True}


@pytest.mark.parametrize(
    "kilobytes",
    [pytest.param(1, marks=pytest.mark.full), 20, pytest.param(300, marks=pytest.mark.full), 500],
)
def test_files_that_may_not_grow(
    kilobytes: int, training: Training, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a quota acts, wherever in a training it does: one sentence, and --resume goes on."""
    output = training.output.parent / f"limited-{kilobytes}"

    def job() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, 1024 * kilobytes))
        try:
            finetune(training.recipe, output=output)
        except BadSettings as error:
            print(error, file=sys.stderr)
            raise

    def again() -> None:
        finetune(training.recipe, output=output, resume=(output / "training").exists())

    code = in_child(job)
    said = capfd.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert "File too large" in said or "could not be written" in said
    assert in_child(again) == 0
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == sorted(
        ["training", *PRODUCTS]
    )
