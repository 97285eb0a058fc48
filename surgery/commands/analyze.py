"""surgery analyze"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.commands.options import analysis_options, output_options


@click.command()
@click.argument("model")
@analysis_options
@click.option(
    "--plot",
    metavar="FILE.png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the norms by layer.",
)
@output_options
def command(model: str, plot: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Locate the Massive Emergence Layer of MODEL and say why."""
    from surgery.commands.terminal import Terminal, print_json
    from surgery.conversion import analyze
    from surgery.errors import BadSettings

    if plot is not None and not plot.absolute().parent.is_dir():
        raise BadSettings(f"The folder of {plot} does not exist.")
    terminal = Terminal(quiet=quiet, as_json=as_json)
    analysis = analyze(model, reporter=terminal, **options)
    emergence = analysis.emergence
    targets = {scope: list(analysis.targets(scope)) for scope in ("first", "all")}
    if plot is not None:
        from surgery.figures import plot_layers

        plot_layers(emergence, plot, title=analysis.checkpoint.origin.name)
    if as_json:
        print_json(
            {
                "model": analysis.checkpoint.origin.name,
                "commit": analysis.checkpoint.origin.commit,
                "model_type": analysis.anatomy.model_type,
                "anatomy": analysis.anatomy.known_from,
                "depth": analysis.anatomy.depth,
                "hidden_size": analysis.anatomy.hidden_size,
                "emergence": emergence.as_dict(),
                "targets": targets,
            }
        )
    terminal.show(emergence)
    if emergence.layer is not None:
        terminal.out.print(
            f"target layers: --scope first → {targets['first']}, "
            f"--scope all → {targets['all'][0]} to {targets['all'][-1]}"
        )
    if plot is not None:
        terminal.say(f"Figure written to {plot}")
    emergence.require()
