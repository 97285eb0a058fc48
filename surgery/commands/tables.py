"""The objects of the pipeline as tables, by their type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from surgery.commands.text import printable, safe
from surgery.files.generated import UNDO
from surgery.method.locate import Emergence
from surgery.outputs.checks import Verification
from surgery.outputs.plan import Plan, RemotePlan
from surgery.report.numbers import COLUMNS, short

if TYPE_CHECKING:
    from surgery.files.checkpoint import Checkpoint
    from surgery.folds.edits import Edit
    from surgery.measure.evidence import Evidence
    from surgery.measure.quality import Quality
    from surgery.sweeping.result import Sweep

_LABELS = {"base": "base", "reference": "paper's reference (hook)", "folded": "folded weights"}


def titled(title: str, **options: Any) -> Table:
    """A table with its title at the left."""
    return Table(title=title, title_justify="left", **options)


@singledispatch
def tables(result: Any) -> Iterator[RenderableType]:
    """The tables for what a step found.

    What has no function of its own below is a Quality: to register that would import torch, which
    a plan is shown without.
    """
    quality: Quality = result
    longest = quality.positions.longest
    table = titled(f"Quality on {quality.tokens} held-out tokens, in sequences of up to {longest}")
    table.add_column("model")
    for heading in ("perplexity", "against base", "KL(reference ‖ ·)", "KL(base ‖ ·)"):
        table.add_column(heading, justify="right")
    for row in quality.variants:
        table.add_row(
            _LABELS.get(row.name, row.name),
            short(row.perplexity),
            "" if row.name == "base" else f"{row.against_base:+.1%}",
            short(row.kl_from_reference),
            short(row.kl_from_base),
        )
    yield table
    yield from _fold_in_words(quality)


def _fold_in_words(quality: Quality) -> Iterator[RenderableType]:
    """The interval that the gate judges by, and where the fold differs from its reference."""
    interval, found = quality.interval, quality.positions
    if interval.low is not None and interval.high is not None:
        end = "which decides" if interval.decided else "which decides nothing at the limit"
        yield Text(
            f"Loss of the fold against base: {interval.difference:+.4f} nats per token, 95 % "
            f"interval {interval.low:+.4f} to {interval.high:+.4f}, {end}"
        )
    late = "" if found.late is None else f", {short(found.late)} beyond"
    yield Text(
        f"KL(reference ‖ folded): {short(found.early)} on the first 256 positions{late}; largest "
        f"{short(found.largest)} at position {found.largest_at} ({found.largest_token!r})"
    )


@tables.register(Emergence)
def _emergence(found: Emergence) -> Iterator[RenderableType]:
    table = titled("Sink token by layer (medians over the prompts)", box=SIMPLE_HEAD)
    for heading in ("layer", "sink norm", "× its input", "others' median", "sink / others"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in found.rows:
        emerged = row.layer == found.layer
        table.add_row(
            str(row.layer),
            short(row.sink_output),
            f"×{short(row.magnification)}",
            short(row.others),
            short(row.ratio),
            "← ME Layer" if emerged else "",
            style="bold green" if emerged else None,
        )
    yield table
    votes = ", ".join(
        f"{'none' if layer is None else f'layer {layer}'} × {count}"
        for layer, count in found.counts.items()
    )
    positions = ", ".join(f"{place} × {count}" for place, count in found.sink_positions.items())
    lengths = [vote.tokens for vote in found.votes]
    lines = []
    if found.layer is not None:
        lines.append(
            f"Massive Emergence Layer {found.layer} (counted from 0): the sink token grows "
            f"×{short(found.magnification)}; next best lasting layer ×{short(found.runner_up)}; "
            f"confidence {found.confidence}"
        )
    lines.append(
        f"votes: {votes}   ({len(found.votes)} prompts of {min(lengths)} to {max(lengths)} tokens)"
    )
    lines.append(f"sink position: {positions}")
    yield Text("\n".join(lines))


@tables.register(Plan)
def _plan(plan: Plan) -> Iterator[RenderableType]:
    table = titled("Plan", show_header=False)
    patched = [file.name for file in plan.files if file.edits]
    table.add_row("output", safe(plan.product))
    table.add_row("edits", _edits(plan.edits))
    if plan.beside:
        table.add_row("base", f"untouched: the edits become {plan.beside} beside it")
        size = f"{plan.bytes_written / 1e3:.3g} kB"
        table.add_row("files", safe(", ".join(file.name for file in plan.files)) + f" ({size})")
        yield table
        return
    table.add_row(
        "tensors",
        f"{len(plan.edits)} of {len(plan.checkpoint.tensors)} change "
        f"({plan.bytes_edited / 1e6:.3g} of {plan.checkpoint.size / 1e6:.4g} MB)",
    )
    table.add_row(
        "files", f"{len(plan.files)} copied, of which patched: {safe(', '.join(patched) or 'none')}"
    )
    if plan.generated:
        table.add_row("made anew", safe(", ".join(plan.generated)))
    table.add_row("disk", f"{plan.bytes_needed / 1e6:,.4g} MB needed")
    _left_out(table, plan.checkpoint)
    yield table


@tables.register(RemotePlan)
def _remote_plan(plan: RemotePlan) -> Iterator[RenderableType]:
    table = titled("Plan", show_header=False)
    table.add_row("repository", safe(plan.repository))
    table.add_row("edits", _edits(plan.edits))
    sent, copied = sum(plan.sent.values()) / 1e6, sum(plan.copied.values()) / 1e6
    table.add_row(
        "patched here and sent", f"{safe(', '.join(plan.sent) or 'none')} ({sent:,.4g} MB)"
    )
    table.add_row("copied on the server", f"{len(plan.copied)} files ({copied:,.4g} MB)")
    _left_out(table, plan.checkpoint)
    yield table


@tables.register(Verification)
def _verification(verification: Verification) -> Iterator[RenderableType]:
    table = titled("Verification", show_header=False)
    for check in verification.checks:
        mark = "[green]✓[/green]" if check.passed else "[bold red]✗[/bold red]"
        table.add_row(mark, safe(check.name), safe(check.detail))
    yield table


def _left_out(table: Table, checkpoint: Checkpoint) -> None:
    copies = [name for name in checkpoint.left_out if name != UNDO]
    if copies:
        table.add_row("left out", f"{safe(', '.join(copies))} (other copies of the weights)")
    if UNDO in checkpoint.left_out:
        table.add_row("left out", f"{UNDO} (it undoes the base's own conversion: keep the base)")


def _edits(edits: Sequence[Edit]) -> str:
    """How many edits of which kind in which layers."""
    edited: dict[str, list[int]] = {}
    for edit in edits:
        edited.setdefault(edit.kind.replace("_", "-"), []).append(edit.layer)
    what = "; ".join(
        f"{len(layers)} {kind} edit{'s' if len(layers) > 1 else ''} in layers "
        f"{min(layers)} to {max(layers)}"
        if min(layers) != max(layers)
        else f"{len(layers)} {kind} edit{'s' if len(layers) > 1 else ''} in layer {layers[0]}"
        for kind, layers in edited.items()
    )
    return what or "none (strength 0)"


def evidence_tables(found: Evidence) -> Iterator[RenderableType]:
    """What the table of an Emergence does not show, in tables narrow enough for a terminal."""
    shown = {"sink", "others", "magnification"}
    columns = [column for column in COLUMNS if column[1] not in shown]
    for part in (columns[:5], columns[5:10], columns[10:]):
        table = titled("Evidence by layer (medians over the prompts)", box=SIMPLE_HEAD)
        for heading in ("layer", *(heading for heading, *_ in part)):
            table.add_column(heading, justify="right")
        for row in found.rows:
            table.add_row(str(row.layer), *(short(getattr(row, name)) for _, name, _ in part))
        yield table
        yield Text("\n".join(f"{heading}: {meaning}" for heading, _, meaning in part))
    if found.mask is not None:
        effect = found.mask
        yield Text(
            f"the mask at layer {effect.layer}: S holds {effect.energy:.1%} of the sink's energy; "
            f"cosine before and after {effect.cosine:.4f}; key changes by {short(effect.key)}, "
            f"value by {short(effect.value)} of its norm"
        )
    for note in found.notes:
        yield Text(f"note: {printable(note)}")


def side_by_side(rows: Sequence[Mapping[str, str]]) -> Table:
    """Models side by side, as in the paper's Table 8, from their cells by heading."""
    table = titled("Massive Emergence Layers", box=SIMPLE_HEAD)
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(safe(cell) for cell in row.values()))
    return table


def sweep_table(found: Sweep) -> Table:
    """Every point of a sweep, best first, narrow enough for a terminal."""
    tasks = found.score == "tasks"
    table = titled(
        f"Sweep of {safe(found.model)}: lowest {'error' if tasks else found.score} first "
        f"(base perplexity {short(found.base_perplexity)}"
        f"{f', error {short(found.base_score)}' if tasks else ''})",
        caption="KL ref: KL(paper's reference ‖ folded), nats; "
        + ("error: 1 − score, mean over the tasks" if tasks else "KL base: KL(base ‖ folded)"),
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    several = len({row.point.strength for row in found.rows}) > 1
    for heading in ("rate", "scope", "fold", "select", *(("strength",) if several else ())):
        table.add_column(heading)
    last = "error" if tasks else "KL base"
    for heading in ("perplexity", "against", "KL ref", last):
        table.add_column(heading, justify="right")
    table.add_column("front")
    for row in found.rows:
        point, figures = row.point, row.figures
        settings = [f"{point.rate:g}", point.scope, point.fold, point.select]
        if several:
            settings.append(f"{point.strength:g}")
        if figures is None:
            table.add_row(*settings, safe(row.error), style="dim")
            continue
        table.add_row(
            *settings,
            short(figures["perplexity"]),
            f"{figures['against_base']:+.1%}",
            short(figures["kl_from_reference"]),
            short(figures["task_error" if tasks else "kl_from_base"]),
            "●" if row.on_front else "",
            style="bold green" if row is found.best else None,
        )
    return table
