"""`python -m surgery` and the `surgery` script."""

from __future__ import annotations

from surgery.commands import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="surgery")


if __name__ == "__main__":
    main()
