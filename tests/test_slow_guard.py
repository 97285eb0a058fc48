"""The guard against slow tests: what it prints, what it fails, and what it must not fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import shared
import slow_guard

pytest_plugins = ["pytester"]

CONFTEST = """
import sys
sys.path.insert(0, {folder!r})  # for the workers of pytest-xdist
import slow_guard
slow_guard.calibration = lambda: {factor} * slow_guard.REFERENCE
pytest_plugins = ["slow_guard"]
"""
SLOW = """
import time
import pytest

@pytest.mark.parametrize("seconds", [0.5, 0.0])
def test_sleeps(seconds):
    time.sleep(seconds)

def test_is_quick():
    pass
"""
WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions below run in this process, and with a limit that is soon reached."""
    monkeypatch.setattr(slow_guard, "LIMIT", 0.3)
    monkeypatch.setattr(slow_guard, "calibration", slow_guard.calibration)
    monkeypatch.setenv("CI", "true")
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)


def session(
    pytester: pytest.Pytester, *words: str, factor: float = 1.0, tests: str = SLOW
) -> pytest.RunResult:
    pytester.makeconftest(CONFTEST.format(factor=factor, folder=str(Path(__file__).parent)))
    pytester.makepyfile(tests)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *words)


@WORKERS
def test_a_slow_test_fails_a_session_that_passes(
    workers: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    done = session(pytester, *workers)
    done.assert_outcomes(passed=3)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        [
            "*slowest 2 test functions*",
            "*0.? s *test_sleeps (2 cases, longest 0.? s)",
            "*0.0 s *test_is_quick",
            "*too slow: *test_sleeps?0.5? took 0.? s, more than 0 s × 1.0",
        ]
    )
    assert str(done.stdout).count("too slow") == 1


@WORKERS
def test_a_slow_machine_fails_nothing(workers: tuple[str, ...], pytester: pytest.Pytester) -> None:
    done = session(pytester, *workers, factor=10.0)
    assert done.ret == pytest.ExitCode.OK
    done.stdout.fnmatch_lines(["*limit for one test: * × 10.0*"])
    done.stdout.no_fnmatch_line("*too slow*")


def test_a_fast_machine_is_given_no_less() -> None:
    assert slow_guard.factor_of(slow_guard.REFERENCE / 3) == 1.0
    assert slow_guard.factor_of(slow_guard.REFERENCE * 3) == pytest.approx(3.0)


def test_a_machine_that_becomes_slow_fails_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again after the test that seems too slow."""
    pytester.makepyfile(SLOW)
    answers = iter([1.0, 10.0])
    monkeypatch.setattr(slow_guard, "calibration", lambda: next(answers) * slow_guard.REFERENCE)
    done = pytester.runpytest_inprocess("-p", "slow_guard", "-p", "no:cacheprovider")
    assert done.ret == pytest.ExitCode.OK
    assert list(answers) == []


def test_outside_ci_it_is_said_only(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI")
    done = session(pytester)
    assert done.ret == pytest.ExitCode.OK
    done.stdout.fnmatch_lines(["*too slow: *test_sleeps*"])


@pytest.mark.parametrize("marker", sorted(slow_guard.EXEMPT))
def test_what_is_slow_by_design(marker: str, pytester: pytest.Pytester) -> None:
    done = session(pytester, tests=SLOW.replace("@", f"@pytest.mark.{marker}\n@", 1))
    assert done.ret == pytest.ExitCode.OK
    done.stdout.fnmatch_lines(["*test_sleeps*longest 0.?*"])
    done.stdout.no_fnmatch_line("*too slow*")


def test_setup_and_teardown_count(pytester: pytest.Pytester) -> None:
    tests = """
    import time
    import pytest

    @pytest.fixture
    def around():
        time.sleep(0.2)
        yield
        time.sleep(0.2)

    def test_nothing(around):
        pass
    """
    assert session(pytester, tests=tests).ret == pytest.ExitCode.TESTS_FAILED


def test_what_is_made_for_all_does_not_count(pytester: pytest.Pytester) -> None:
    tests = """
    import time
    from shared import made_once

    def test_nothing(tmp_path):
        made_once(tmp_path / "made", lambda folder: time.sleep(0.5))
    """
    assert session(pytester, tests=tests).ret == pytest.ExitCode.OK


def test_failures_stay_failures(pytester: pytest.Pytester) -> None:
    done = session(pytester, tests=SLOW + "\n    assert False\n")
    done.assert_outcomes(passed=2, failed=1)
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_the_calculation_is_short() -> None:
    assert slow_guard.calibration() < 100 * slow_guard.REFERENCE


# --------------------------------------------------------------------------------------------
# What all workers share
# --------------------------------------------------------------------------------------------


MAKE = """
import os, sys, time
from pathlib import Path
from shared import made_once

def make(folder):
    with open(folder.parent / "calls", "a") as file:
        file.write("x")
    (folder / "half").touch()
    time.sleep(0.2)
    if sys.argv[2] == "die":
        os._exit(9)
    (folder / "whole").touch()

assert (made_once(Path(sys.argv[1]), make) / "whole").is_file()
"""


def start(folder: Path, how: str = "live") -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", MAKE, str(folder), how]
    return subprocess.Popen(words, cwd=Path(__file__).parent)


def test_made_once_by_several_processes(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "made"
    processes = [start(folder) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (folder.parent / "calls").read_text() == "x"


def test_made_again_after_a_process_died_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert start(folder, "die").wait(60) == 9
    assert not folder.exists()
    shared.made_once(folder, lambda temporary: (temporary / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    def fail(_folder: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        shared.made_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
