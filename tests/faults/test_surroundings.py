"""A disk that is full, a file that may not grow, a source that changes or vanishes, a signal."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from script import run as run_program
from script import run_script, start
from shared import Run
from test_merging import a_recipe

import surgery
from surgery.files import staging
from surgery.outputs import write

Tiny = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
WORDS = ("--layer", "3", "--no-check", "--quiet")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB, less than the plan wants for any checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = run_program("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder)
    if done.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    run_program("umount", folder, check=True)


def test_a_full_disk_is_seen_beforehand(tiny: Tiny, small_disk: Path) -> None:
    done = run_script("convert", tiny(), *WORDS, "-o", small_disk / "out")
    assert done.returncode == 2
    assert "free; choose an --output on a larger disk" in done.stderr
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_cannot_be_written(
    tiny: Tiny, small_disk: Path, tmp_path: Path, run: Run, snapshot: Snapshot
) -> None:
    """Every command that writes says so in one sentence, and changes nothing."""
    source, out = tiny(layers=3, layer=1), small_disk / "out"
    done, new = small_disk / "done", small_disk / "new"
    surgery.convert(str(source), layer=1, check=False, output=tmp_path / "done")
    shutil.copytree(tmp_path / "done", done)
    recipe = a_recipe(tmp_path, source)
    before = snapshot(small_disk)
    run_program("mount", "-o", "remount,ro", small_disk, check=True)
    quick = ("--layer", "1", "--quiet")
    sweep = ("--rates", "0.1", "--scopes", "first", "--folds", "norm", "--selects", "weight")
    for words in (
        ("convert", source, *quick, "--no-check", "-o", out),
        ("convert", source, *quick, "--no-check", "-o", done, "--overwrite"),
        ("convert", source, *quick, "--no-check", "-o", new / "deeper" / "out"),
        ("convert", source, *quick, "--fold", "sink", "--as", "adapter", "--no-check", "-o", out),
        ("sweep", source, *quick, *sweep, "--check-tokens", 256, "-o", out),
        ("finetune", recipe, "-o", out),
        ("revert", done, "-o", out),
        ("card", done),
        ("analyze", source, "--quiet", "--plot", small_disk / "plot.png"),
        ("analyze", source, "--quiet", "--report", out),
        ("compare", source, done, "--check-tokens", 64, "--quiet", "-o", small_disk / "c.json"),
    ):
        sentence = run(*words).sentence()
        assert "Read-only file system" in sentence or " writable" in sentence, (words, sentence)
    assert snapshot(small_disk) == before


def test_a_disk_that_fills_up_meanwhile(
    tiny: Tiny, small_disk: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    """The plan was right when it was made."""
    real = shutil.disk_usage

    def plenty(path: object) -> object:
        return real(path)._replace(free=10**12)

    source = tiny()
    before = snapshot(source)
    size = (source / "model.safetensors").stat().st_size
    (small_disk / "other").write_bytes(b"x" * (6 * 2**20 - size // 2))
    monkeypatch.setattr(shutil, "disk_usage", plenty)
    with pytest.raises(surgery.SurgeryError, match="No space left on device"):
        surgery.convert(str(source), layer=3, check=False, output=small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    assert snapshot(source) == before
    (small_disk / "other").unlink()
    surgery.convert(str(source), layer=3, check=False, output=small_disk / "out")
    assert surgery.verify(small_disk / "out").passed


def test_a_limit_on_the_size_of_files(tiny: Tiny, tmp_path: Path) -> None:
    """As a quota acts: the write fails, in the middle of a file."""
    size = (tiny() / "model.safetensors").stat().st_size

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    output = tmp_path / "work" / "out"
    done = run_script("convert", tiny(), *WORDS, "-o", output, before=limited)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["shrinks", "changes", "vanishes"])
def test_a_source_that_moves(
    what: str, tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the plan and the copy of the second file, as an unlucky `git pull` might."""
    source = tiny_copy("llama", shards=3)
    victim = sorted(source.glob("*.safetensors"))[-1]
    honest = write._copy
    done = []

    def copy(*args: object) -> None:
        if not done:
            done.append(True)
            raw = victim.read_bytes()
            if what == "vanishes":
                victim.unlink()
            elif what == "shrinks":
                victim.write_bytes(raw[:-100])
            else:
                victim.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
                os.utime(victim, ns=(0, 0))
        honest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "_copy", copy)
    with pytest.raises(surgery.SurgeryError) as error:
        surgery.convert(str(source), layer=3, check=False, output=tmp_path / "work" / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("moment", ["writing", pytest.param("loading", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals(number: int, code: int, moment: str, tiny: Tiny, tmp_path: Path) -> None:
    """One sentence, the usual exit code, and nothing left."""
    work = tmp_path / "work"
    work.mkdir()
    program: tuple[str, ...] = ("-c", _WRITING)
    words: tuple[object, ...] = ("convert", tiny(), "--layer", "3", "-o", work / "out")
    if moment == "writing":
        words += ("--no-check", "--quiet")
    else:
        program = ("-m", "surgery")
    process = start(
        *(sys.executable, *program, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # It has begun.
    first = (process.stdout if moment == "writing" else process.stderr).readline()
    begun = list(work.iterdir())
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert moment in first.lower()
    assert len(begun) == (moment == "writing")
    assert process.returncode == code, rest
    assert "nothing was left behind" in rest
    assert "Traceback" not in rest
    assert list(work.iterdir()) == []


# The command as typed, of which the copying takes long.
_WRITING = """
import time
from surgery.outputs import folder
def slow(*_args):
    print("writing", flush=True)
    time.sleep(60)
folder.copy_plan = slow
from surgery.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals_before_the_command_has_begun(number: int, code: int) -> None:
    done = run_program(sys.executable, "-c", _EARLY, int(number))
    assert done.returncode == code
    assert "nothing was left behind" in done.stderr
    assert "Traceback" not in done.stderr


# While its modules are imported.
_EARLY = """
import os, sys
class Finder:
    def find_spec(self, name, *_rest):
        if name == "surgery.commands":
            os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Finder())
from surgery.__main__ import main
main()
"""


def test_a_killed_run_is_cleaned_up_by_the_next(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """What is being written by a living process stays."""
    work = tmp_path / "work"
    slow = (sys.executable, "-c", _SLOW, tiny(), work / "out")
    stopped = start(*slow, stdout=subprocess.PIPE)
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == b"writing\n"
    assert len(list(work.glob(".out.*.part"))) == 1
    run("convert", tiny(), *WORDS, "-o", work / "out").ok()
    assert len(list(work.glob(".out.*.part"))) == 1
    stopped.kill()
    stopped.wait()
    time.sleep(0.05)
    run("convert", tiny(), *WORDS, "--overwrite", "-o", work / "out").ok()
    assert [path.name for path in work.iterdir()] == ["out"]


_SLOW = """
import sys, time
import surgery
from surgery.outputs import folder
def slow(*_args):
    print("writing", flush=True)
    time.sleep(60)
folder.copy_plan = slow
surgery.convert(sys.argv[1], layer=3, check=False, output=sys.argv[2])
"""


def test_a_file_system_without_locks(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there is known to be abandoned, so nothing is removed; all else works."""

    def refuse(*_given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    work = tmp_path / "work"
    (work / ".out.1234.part").mkdir(parents=True)
    for overwrite in (False, True):
        surgery.convert(str(tiny()), layer=3, check=False, output=work / "out", overwrite=overwrite)
        assert {path.name for path in work.iterdir()} == {"out", ".out.1234.part"}
    assert surgery.verify(work / "out").passed
    with staging.held(work):
        pass


def test_a_clock_that_jumps(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on the time of day, and no time is written down."""
    surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "one")
    moments = iter([4e9, 0.0, 2e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(moments))
    surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
