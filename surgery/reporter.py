"""Whom a job tells what it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class Reporter:
    """Where a conversion says what it does; this one shows nothing, and logs the steps."""

    def say(self, message: str) -> None:
        """A step has begun."""
        logger.info("%s", message)

    def show(self, result: Any) -> None:
        """An Emergence, Plan, Quality or Verification is known."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar of `total` units; the block calls what it gets with units done."""
        yield lambda _done: None


SILENT = Reporter()
