"""surgery families"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from surgery.commands.options import output_options

if TYPE_CHECKING:
    from surgery.models.families import Row


@click.command()
@click.argument("names", nargs=-1, metavar="[FAMILY]...")
@output_options
def command(names: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """List the model families: what is possible in each, and how it was tested.

    FAMILY is a model_type as in config.json; all of them without it. Every row is checked against
    a trace of the model before anything is edited, and a family that is not listed is inferred
    from such a trace, or refused.
    """
    from rich.box import SIMPLE_HEAD

    from surgery.commands.tables import titled
    from surgery.commands.terminal import Terminal, print_json
    from surgery.commands.text import safe
    from surgery.errors import BadSettings
    from surgery.models.families import rows

    known = rows()
    strange = sorted(set(names) - {row.family for row in known})
    if strange:
        raise BadSettings(
            f"The table of families has no {strange[0]}; such a model is traced, and then "
            "converted or refused."
        )
    chosen = [row for row in known if not names or row.family in names]
    if as_json:
        print_json({"families": [asdict(row) for row in chosen]})
        return
    table = titled(
        f"{len(chosen)} kinds of decoder",
        expand=True,
        caption="Tested on tiny random checkpoints saved by transformers, a massive activation "
        "planted at a known layer: located there, each fold written and loaded by transformers. "
        "=: logits bit-equal to the hook. ≈: equal at the sink token.",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading, ratio in (
        ("family", 5),
        ("norm → who reads it", 6),
        ("folds", 3),
        ("not possible", 5),
    ):
        table.add_column(heading, overflow="fold", ratio=ratio)
    alike: dict[Row, list[Row]] = {}
    for row in chosen:
        alike.setdefault(replace(row, family="", inside=()), []).append(row)
    for group in alike.values():
        table.add_row(*(safe(cell) for cell in _cells(group)))
    Terminal(quiet=quiet).out.print(table)


def _cells(rows: list[Row]) -> tuple[str, ...]:
    """One line of the table, for rows that differ in nothing but the family."""
    row = rows[0]
    readers = [", ".join(reader.partition(".")[2] for reader in mixer) for mixer in row.readers]
    if row.skipped:
        readers.append("none, where the layer has no attention")
    marks = [f"{fold}\u00a0=" for fold in row.bit_equal] + [f"{fold}\u00a0≈" for fold in row.near]
    impossible = [f"{'norm' if row.folds else 'any fold'}: {row.refusal}"] if row.refusal else []
    if row.folds and "weight" not in row.select:
        impossible.append("--select weight: there is no gain")
    if row.folds and not row.located:
        impossible.append("locating: no massive activation lasts, so give --layer")
    inside = [whole for one in rows for whole in one.inside]
    return (
        ", ".join(one.family for one in rows)
        + (f", where {row.when}" if row.when else "")
        + (f"; also inside {', '.join(inside)}" if inside else ""),
        f"{row.norm} ({row.norm_kind}) → {'; or '.join(readers)}" if row.norm else "",
        ", ".join(marks) or "refused",
        "; ".join(impossible),
    )
