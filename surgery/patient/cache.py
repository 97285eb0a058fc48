"""Sources in another format than safetensors: converted once, and kept in the user's cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from surgery.errors import BadSettings
from surgery.files.paths import expanded
from surgery.files.staging import sync_tree, temporary_sibling

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where sources that are not safetensors are kept once converted."""
    chosen = os.environ.get("SURGERY_CACHE")
    if chosen:
        return expanded(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wemask-surgery"


def kept(name: str, make: Callable[[Path], None], beginning: Callable[[Path], None]) -> Path:
    """A folder in the cache, made once.

    Args:
        name: Its name; says all that its content depends on.
        make: Fills it.
        beginning: Told its path when it has to be made.

    Raises:
        BadSettings: The cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        _log.debug("%s is there already", target)
    else:
        beginning(target)
        try:
            with temporary_sibling(target) as temporary:
                make(temporary)
                sync_tree(temporary)
                _publish(temporary, target)
        except OSError as error:
            raise BadSettings(
                f"{target.parent} is not writable ({error.strerror or error}); set SURGERY_CACHE "
                "to a folder that is."
            ) from error
    return target


def _publish(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # another process may have been faster, with the same result
            raise
