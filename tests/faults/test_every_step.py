"""Every step of writing, with the process killed there, or the operation failing."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

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
from surgery import staging

Snapshot = Callable[[Path], dict[str, bytes | None]]


full = pytest.mark.full
WAYS = ["new", "overwrite", pytest.param("overwrite without exchange", marks=full)]


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
            check=False,
            output=output,
            overwrite=request.param != "new",
        )

    def reset() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        if request.param != "new":
            shutil.copytree(earlier, output)

    return job, reset, source, output


@pytest.mark.parametrize("case", WAYS, indirect=True)
def test_killed_at_every_step(
    case: tuple[Job, Callable[[], None], Path, Path], snapshot: Snapshot
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
    for at in points(job, reset):
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


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("new", "input/output error"),
        pytest.param("new", "no space", marks=full),
        pytest.param("new", "interrupted", marks=full),
        pytest.param("overwrite", "no space", marks=full),
        pytest.param("overwrite", "input/output error", marks=full),
        pytest.param("overwrite", "interrupted", marks=full),
        pytest.param("overwrite without exchange", "no space", marks=full),
        pytest.param("overwrite without exchange", "interrupted", marks=full),
    ],
    indirect=["case"],
)
def test_failing_at_every_step(
    case: tuple[Job, Callable[[], None], Path, Path], what: str, snapshot: Snapshot
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
    for at in points(job, reset):
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
