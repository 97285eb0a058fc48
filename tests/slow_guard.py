"""A pytest plugin: prints what took longest and, in CI, fails when one test takes too long.

A test's time is what pytest itself measures: its setup, call and teardown together. A fixture's
setup counts for the test that asks for it first, save what is made for all workers at once (see
`shared.made_once`). The limit is for a fast, quiet machine: a fixed calculation is timed where the
tests run, before the first of them and again after each that seems too slow, and the limit grows
by as much as the slower of the two took longer than on such a machine. It never shrinks.

Tests marked `full`, `runtimes` or `packages` take minutes by design, and those marked `whole` run
the whole demo model, once, for the time that it takes; they are printed only. Under
pytest-xdist the workers calculate, and send the factor along with a report; the controller prints
and judges.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import shared

LIMIT = 15.0  # seconds, of one test, on a machine whose factor is 1
SHOWN = 10
EXEMPT = frozenset({"full", "runtimes", "packages", "whole"})
# Seconds that `calibration` takes on a fast, quiet machine.
REFERENCE = 0.03
_FACTOR, _WAITED = "slow_guard_factor", "slow_guard_waited"


def calibration() -> float:
    """Seconds that a fixed calculation takes: a product, a hash, a loop of Python, fresh memory.

    None of it uses a second thread, as the tests do not.
    """
    matrix = np.random.default_rng(0).standard_normal((128, 128))
    block = bytes(1 << 20)
    begun = time.perf_counter()
    for _ in range(6):
        np.einsum("ij,jk->ik", matrix, matrix, optimize=False)
        hashlib.sha256(block).digest()
        sum(number * number % 7 for number in range(100_000))
        np.ones(2 << 20)  # too large to be memory that was had before
    return time.perf_counter() - begun


def factor_of(seconds: float) -> float:
    """How many times longer than on a fast, quiet machine a test may take here; at least 1."""
    return max(1.0, seconds / REFERENCE)


class SlowGuard:
    """Durations of all tests, in the process that reports them.

    seconds: of each test, by its node id. slow: those over the limit, with their factors.
    factor: the largest one that any process measured. waited: seconds spent on what is made for
    all workers, those spent waiting for another worker to make it included.
    """

    def __init__(self, *, fails: bool) -> None:
        """fails: whether a test over the limit fails the session."""
        self.fails = fails
        self.seconds: dict[str, float] = defaultdict(float)
        self.slow: dict[str, float] = {}
        self.factor = 1.0
        self.waited = 0.0
        self._here: float | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        """Calculate before the first test; the controller of pytest-xdist runs none."""
        if self._here is None:
            self._here = factor_of(calibration())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Iterator[None, pytest.TestReport, pytest.TestReport]:  # type: ignore[type-arg]
        """Where the test runs: say how fast this machine is just now, if that may matter."""
        report = yield
        waited, shared.waited_seconds = shared.waited_seconds, 0.0
        report.user_properties.append((_WAITED, waited))
        spent = item.stash.get(_SPENT, 0.0) + report.duration - waited
        item.stash[_SPENT] = spent
        if report.when == "teardown":
            assert self._here is not None
            factor = max(self._here, factor_of(calibration())) if spent > LIMIT else self._here
            report.user_properties.append((_FACTOR, factor))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Where the reports come together."""
        found = dict(report.user_properties)
        self.seconds[report.nodeid] += report.duration - found.get(_WAITED, 0.0)
        self.waited += found.get(_WAITED, 0.0)
        if _FACTOR in found:
            self.factor = max(self.factor, found[_FACTOR])
            seconds = self.seconds[report.nodeid]
            if seconds > LIMIT * found[_FACTOR] and not EXEMPT & report.keywords.keys():
                self.slow[report.nodeid] = found[_FACTOR]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a session that would otherwise have passed."""
        if self.fails and self.slow and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the slowest functions, and the tests that are too slow."""
        if not self.seconds:
            return
        functions: dict[str, list[float]] = defaultdict(list)
        for test, seconds in self.seconds.items():
            functions[test.partition("[")[0]].append(seconds)
        slowest = sorted(functions.items(), key=lambda one: -sum(one[1]))[:SHOWN]
        terminalreporter.section(f"slowest {len(slowest)} test functions")
        for name, each in slowest:
            cases = f" ({len(each)} cases, longest {max(each):.1f} s)" if len(each) > 1 else ""
            terminalreporter.line(f"{sum(each):6.1f} s  {name}{cases}")
        terminalreporter.line(f"{self.waited:6.1f} s  on what is made for all workers")
        terminalreporter.line(
            f"limit for one test: {LIMIT:.0f} s × {self.factor:.1f}, the speed of this machine"
        )
        for test, factor in self.slow.items():
            found = f"{self.seconds[test]:.1f} s, more than {LIMIT:.0f} s × {factor:.1f}"
            terminalreporter.line(f"too slow: {test} took {found}", red=True)


_SPENT = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """Watch every run; fail slow tests where the environment variable CI is set."""
    config.pluginmanager.register(SlowGuard(fails=bool(os.environ.get("CI"))), "slow-guard-watch")
