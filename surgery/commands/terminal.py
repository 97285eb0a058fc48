"""What people see: steps, progress bars and tables, by rich; nothing with --quiet or --json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from surgery.commands.text import safe
from surgery.outputs.manifest import clean_numbers
from surgery.reporter import Reporter


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(clean_numbers(value), indent=2, ensure_ascii=True))


class Terminal(Reporter):
    """Tables on stdout, steps and progress on stderr."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.silent = quiet or as_json
        # Without emoji: a name may have a word between colons.
        self.out = Console(quiet=self.silent, highlight=False, emoji=False)
        self.err = Console(stderr=True, quiet=self.silent, highlight=False, emoji=False)
        if self.silent:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def say(self, message: str) -> None:
        self.err.print(f"[dim]•[/dim] {safe(message)}")

    def show(self, result: Any) -> None:
        from surgery.commands.tables import tables  # imports numpy

        for table in tables(result):
            self.out.print(table)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        count = DownloadColumn() if total > 10_000_000 else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True, disable=self.silent) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.advance(task, done)
