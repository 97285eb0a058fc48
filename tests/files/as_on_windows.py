"""Makes a process meet what Windows lacks, forbids or does differently; importing it does so.

The names are hidden after torch and transformers are imported, which have their own ways there, and
before surgery is. What is forbidden there raises here what it raises there.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.file_download  # noqa: F401
import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

HIDDEN = (
    *("pread", "preadv", "preadv2", "pwrite", "pwritev", "readv", "writev", "copy_file_range"),
    *("posix_fadvise", "posix_fallocate", "pathconf", "fpathconf"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "fdatasync", "geteuid", "sysconf"),
    *("sched_getaffinity", "mkfifo", "fork"),
)


def _opened() -> set[str]:
    """What this process has open or mapped."""
    links = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with io.FileIO("/proc/self/maps") as file:
        lines = file.readall().decode().splitlines()
    return links | {line.split(maxsplit=5)[5] for line in lines if line.count("/") > 0}


def _refuse_while_open(path: Any) -> None:
    """Windows neither removes nor renames what is open, or a folder that something in it is."""
    place = os.path.realpath(path)
    if any(name == place or name.startswith(f"{place}/") for name in _opened()):
        raise PermissionError(32, "The process cannot access the file", str(path))


def _renaming(honest: Callable[..., None], *, replaces: bool) -> Callable[..., None]:
    def rename(source: Any, target: Any) -> None:
        _refuse_while_open(source)
        if os.path.lexists(target):
            if not replaces or os.path.isdir(target):
                raise FileExistsError(183, "Cannot create a file when that file already exists")
            _refuse_while_open(target)
        honest(source, target)

    return rename


def _removing(honest: Callable[..., None]) -> Callable[..., None]:
    def remove(path: Any) -> None:
        if os.path.lexists(path) and ".lock" not in str(path):  # filelock has its ways
            _refuse_while_open(path)
        honest(path)

    return remove


def _opening(honest: Callable[..., int]) -> Callable[..., int]:
    def opening(path: Any, flags: int, *mode: int, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path, flags, *mode, **options)

    return opening


def _flushing(honest: Callable[[int], None], mode: Callable[[int], int]) -> Callable[[int], None]:
    def flush(descriptor: int) -> None:
        if mode(descriptor) & (os.O_WRONLY | os.O_RDWR) == 0:
            raise OSError(9, "Bad file descriptor")
        honest(descriptor)

    return flush


def _text(honest: Callable[..., Any]) -> Callable[..., Any]:
    def opening(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Lines end in two characters where nobody says how, and texts are in code page 1252."""
        if "b" not in mode:
            encoding = "cp1252" if encoding in (None, "locale") else encoding
            if newline is None and set(mode) & set("wax+"):
                newline = "\r\n"
        return honest(file, mode, buffering, encoding, errors, newline, *rest, **options)

    return opening


def _library(honest: Any) -> Any:
    def load(name: Any, *rest: Any, **options: Any) -> Any:
        # filelock takes the ways of the system that it is told of, which is still this one.
        if name is None and sys._getframe(1).f_globals["__name__"].startswith("surgery"):
            raise TypeError("argument of type 'NoneType' is not iterable")
        return honest(name, *rest, **options)

    return load


def hide() -> None:
    """From here on."""
    import fcntl

    status, getfl = fcntl.fcntl, fcntl.F_GETFL
    # shutil decided when it was imported to remove through descriptors of folders.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for name in HIDDEN:
        if hasattr(os, name):
            delattr(os, name)
    os.rename = _renaming(os.rename, replaces=False)
    os.replace = _renaming(os.replace, replaces=True)
    os.unlink = _removing(os.unlink)
    os.remove = _removing(os.remove)
    os.open = _opening(os.open)
    os.fsync = _flushing(os.fsync, lambda descriptor: status(descriptor, getfl))
    builtins.open = io.open = _text(io.open)  # type: ignore[assignment]
    ctypes.CDLL = _library(ctypes.CDLL)  # type: ignore[misc]
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    for name in [name for name in sys.modules if name.partition(".")[0] == "filelock"]:
        del sys.modules[name]
    warnings.filterwarnings("ignore", message="only soft file lock")


assert not any(name.partition(".")[0] == "surgery" for name in sys.modules)
transformers.logging.set_verbosity_error()
sys.path.insert(0, str(Path(__file__).parents[1]))
hide()
