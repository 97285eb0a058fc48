"""surgery push"""

from __future__ import annotations

from pathlib import Path

import click

from surgery.commands.options import UserPath, output_options


@click.command()
@click.argument("folder", metavar="DIR", type=UserPath(path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Create the repository public instead of private.")
@click.option("--revision", help="Branch to upload to; created when missing.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", "-m", help="Commit message.")
@output_options
def command(
    folder: Path,
    repo: str,
    public: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Upload the converted checkpoint in DIR to REPO on the Hub, private unless --public.

    The token is read from HF_TOKEN or the cached login (`hf auth login`).
    """
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.jobs.push import push

    terminal = Terminal(quiet=quiet, as_json=as_json)
    pushed = push(
        folder,
        repo,
        public=public,
        revision=revision,
        create_pr=create_pr,
        message=message,
        reporter=terminal,
    )
    if as_json:
        print_json(vars(pushed))
    privacy = "private" if pushed.private else "public"
    terminal.out.print(
        f"[bold green]Pushed[/bold green] {safe(pushed.url)} ({privacy}): {len(pushed.files)} "
        f"files, names, sizes and digests as here: {safe(', '.join(pushed.files))}"
    )
    if pushed.pull_request:
        terminal.out.print(f"Pull request: {safe(pushed.pull_request)}")
