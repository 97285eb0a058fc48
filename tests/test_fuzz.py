"""Every parser of a stranger's bytes on damaged inputs; `make fuzz` tries a million."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from targets import TARGETS, attempt, seeds

names = pytest.mark.parametrize("name", list(TARGETS))
# How many inputs: enough to notice a parser that has become careless, and more in a full run.
amounts = pytest.mark.parametrize(
    "examples", [40, pytest.param(200, marks=pytest.mark.full)], ids=["some", "many"]
)


@names
def test_what_once_went_wrong(name: str) -> None:
    """The kept inputs: whole ones, and all that ever failed."""
    known = seeds(name)
    assert known
    for data in known:
        attempt(name, data)


@amounts
@names
def test_random_bytes(name: str, examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.binary(max_size=300))
    def check(data: bytes) -> None:
        attempt(name, data)

    check()


@amounts
@names
def test_damaged_seeds(name: str, examples: int) -> None:
    """Bytes of a valid input changed, cut out, doubled or inserted."""

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        raw = bytearray(data.draw(st.sampled_from(seeds(name)), label="seed"))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(0, len(raw) - 1)))
            until = min(len(raw), at + data.draw(st.sampled_from([0, 1, 2, 8, 40])))
            raw[at:until] = data.draw(
                st.one_of(
                    st.binary(max_size=9),
                    st.just(bytes(raw[at:until]) * 2),
                    st.sampled_from([b"null", b"-1", b"1e400", b"[[[[", b'""', b"\xff" * 8]),
                )
            )
        attempt(name, bytes(raw))

    check()
