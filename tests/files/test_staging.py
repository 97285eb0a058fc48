"""Files that several write at once: each is somebody's whole one, and nothing is left beside it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from surgery.files.staging import write_whole

SIZE = 50_000
WRITES = 100


def write_many(path: Path, number: int) -> list[str]:
    """Write a file often, with this writer's own bytes; what failed."""
    failed = []
    for _ in range(WRITES):
        try:
            write_whole(path, bytes([number]) * SIZE)
        except Exception as error:
            failed.append(repr(error))
    return failed


def read_until(path: Path, done: threading.Event) -> tuple[int, int]:
    """How often a file was read, and how often it was not one writer's whole file."""
    reads = torn = 0
    while not done.is_set():
        raw = path.read_bytes()
        reads += 1
        torn += len(raw) != SIZE or len(set(raw)) != 1
    return reads, torn


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_several_writers_of_one_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(bytes(SIZE))
    done = threading.Event()
    pool: Any
    with ThreadPoolExecutor(1) as reader:
        seen = reader.submit(read_until, path, done)
        try:
            if kind == "threads":
                with ThreadPoolExecutor(8) as pool:
                    failed = list(pool.map(write_many, [path] * 8, range(1, 9)))
            else:
                with multiprocessing.get_context("spawn").Pool(4) as pool:
                    failed = pool.starmap(write_many, [(path, number) for number in range(1, 5)])
        finally:
            done.set()
        reads, torn = seen.result()
    assert reads > 0
    assert torn == 0
    assert [error for errors in failed for error in errors] == []
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    (tmp_path / ".results.json.0123abcd.part").write_bytes(b"half")
    (tmp_path / ".results.json.mine.part").write_bytes(b"a user's")
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == [".results.json.mine.part", "results.json"]


def test_names_of_any_length_and_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".json")
    write_whole(path, b"whole")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "plain"])


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="irectory"):
        write_whole(tmp_path / "folder", b"x")
    assert os.listdir(tmp_path) == ["folder"]
