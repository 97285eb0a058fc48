"""`python -m surgery` and the `surgery` script."""

from __future__ import annotations

import os
import signal
import sys

from surgery.errors import Terminated


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(sys.stdout, "reconfigure"):  # tables have characters that not every terminal has
        sys.stdout.reconfigure(errors="replace")
    try:
        from surgery.commands import cli

        cli(prog_name="surgery")
    except KeyboardInterrupt as error:  # before or after the command, which has its own words
        word, code = ("Terminated", 143) if isinstance(error, Terminated) else ("Interrupted", 130)
        sys.stderr.write(f"{word}; nothing was left behind.\n")
        os._exit(code)
    except OSError as error:  # of stdout, in the help and whatever else comes before a command
        sys.stderr.write(f"Error: {error.strerror or error}.\n")
        os._exit(1)


def _terminate(_signal: int, _frame: object) -> None:
    # A second one must not interrupt the cleaning up that the first has begun.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


if __name__ == "__main__":
    main()
