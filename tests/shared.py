"""What the tests share by name; fixtures are in conftest.py."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from hub_server import HubServer

import pytest
from filelock import FileLock

# The cores are shared out among the workers of pytest-xdist, and with what they start: threads that
# wait for a core they do not get take longer than none.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

Tiny = Callable[..., Path]

# What this process spent in `made_once` since somebody last asked: no one test's own time.
waited_seconds = 0.0


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills in whichever process comes first; the others wait for it.

    A process that dies meanwhile leaves no folder, only the beginning of one beside it, which the
    next process removes.
    """
    global waited_seconds
    begun, before = time.perf_counter(), waited_seconds
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                temporary = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                make(temporary)
                os.rename(temporary, folder)
    waited_seconds = before + time.perf_counter() - begun
    return folder


def rest_in_full(names: Iterable[str], few: Collection[str]) -> list[Any]:
    """Parameters for all names, of which only a few are in the default selection of tests."""
    names = tuple(names)
    assert set(few) & set(names), "something must be left"
    return [pytest.param(name, marks=() if name in few else pytest.mark.full) for name in names]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    def ok(self) -> Outcome:
        """This outcome, after checking that the command succeeded."""
        assert self.code == 0, (self.code, self.stderr)
        return self

    def sentence(self) -> str:
        """The one sentence on stderr with which a command failed; nothing else was said."""
        assert self.code != 0, self.stdout
        assert "Traceback" not in self.stdout + self.stderr
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("Error: "), self.stderr
        assert len(lines[0]) > len("Error: 12345")
        return lines[0]

    def json(self) -> Any:
        """The one JSON object on stdout."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Outcome]


def use_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Make this process speak to a server, with its token and a cache of its own.

    As the environment of `hub.env()` does for a process that is started with it.

    Args:
        hub: The server, which runs.
        monkeypatch: What undoes this.
        home: Folder for downloads, as HF_HOME.
    """
    from huggingface_hub import HfFileSystem

    for variable, value in {**hub.env(), "HF_HOME": str(home)}.items():
        monkeypatch.setenv(variable, value)
    places = {
        "huggingface_hub.constants.HF_HUB_CACHE": str(home / "hub"),
        "huggingface_hub.constants.HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in {**hub.patches(), **places}.items():
        monkeypatch.setattr(name, value, raising=False)
    HfFileSystem.clear_instance_cache()
