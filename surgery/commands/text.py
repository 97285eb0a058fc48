"""Text from a stranger's file, made harmless for a terminal."""

from __future__ import annotations

import unicodedata
from typing import Any


def printable(text: str) -> str:
    """Text from a stranger's file, its control characters (terminal escapes) made visible."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in text
    )


def safe(text: Any) -> str:
    """`printable`, with rich's markup switched off too."""
    from rich.markup import escape  # an error message needs `printable` alone

    return escape(printable(str(text)))
