"""Training under the mask, from a recipe to a verified plain checkpoint or adapter.

locate → mask → train → merge in float32 → fold → verify → card. Under `accelerate launch` every
process runs `finetune`; all but the first only train.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.files.generated import CARD, MANIFEST
from surgery.files.paths import expanded
from surgery.files.staging import write_whole
from surgery.jobs.push import push
from surgery.outputs.checks import Verification
from surgery.outputs.hub import Place, upload_files, visible_files
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.training.begin import (
    ADAPTER,
    BASE,
    MODEL,
    WORK,
    in_one_sentence,
    prepare,
    target_of,
)
from surgery.training.case import Case, make_case, revision_of
from surgery.training.lora import name_base
from surgery.training.masks import choose_masks, read_masks
from surgery.training.products import finish, own_base
from surgery.training.recipe import Recipe, parse_recipe, read_recipe
from surgery.training.smoke import make_small
from surgery.training.trainer import Trained, train


@dataclass(frozen=True)
class FineTuning:
    """What `finetune` wrote. model, adapter, base: folders, None where not asked for.

    base: the folded base that the adapter belongs to, where that is not the recipe's model.
    """

    output: Path
    model: Path | None
    adapter: Path | None
    base: Path | None
    trained: Trained
    record: dict[str, Any]
    verification: Verification


@dataclass(frozen=True)
class _Way:
    """How a training begins: small, resumed, or in place of an earlier one."""

    smoke: bool
    resume: bool
    overwrite: bool


def finetune(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    changes: Mapping[str, Any] | None = None,
    reporter: Reporter = SILENT,
) -> FineTuning | None:
    """Train a LoRA as a recipe says, merge, fold, verify, and write the result.

    Args:
        recipe: a YAML file, see `surgery.training.recipe`.
        output: the folder to write, instead of the recipe's.
        smoke: everything small, on the demo model.
        resume: go on from the last complete checkpoint in the output.
        overwrite: begin again where the output holds an earlier training.
        changes: keys to replace.
        reporter: whom to tell.

    Returns:
        What was written; None on every process but the first.

    Raises:
        SurgeryError: says what is wrong.
    """
    path = expanded(recipe)
    raw = {**read_recipe(path), **(changes or {})}
    target = target_of(output, raw, path)
    if smoke:
        raw = make_small(raw)
    parsed = parse_recipe(raw, path.name, target / WORK / "checkpoints")
    with ExitStack() as stack, in_one_sentence(target):
        return _run(parsed, target, stack, _Way(smoke, resume, overwrite), reporter)


def _run(
    parsed: Recipe, target: Path, stack: ExitStack, way: _Way, reporter: Reporter
) -> FineTuning | None:
    """`finetune` of a parsed recipe; the output is held until `stack` is closed."""
    arguments = parsed.arguments
    main = arguments.process_index == 0
    reporter = reporter if main else SILENT
    with arguments.main_process_first(local=False):
        name = str(parsed.model.model_name_or_path)
        checkpoint = resolve(name, revision_of(parsed), say=reporter.say)
        if main:
            prepare(
                parsed,
                checkpoint.sources,
                target,
                stack,
                resume=way.resume,
                overwrite=way.overwrite,
            )
        case = make_case(parsed, checkpoint, target, way.smoke, reporter)
        masks = choose_masks(case) if main else read_masks(case)
    trained = train(
        parsed,
        checkpoint,
        case.patient.anatomy,
        masks.training,
        masks.closed(case),
        case.work,
        resume=way.resume,
        reporter=reporter,
    )
    if trained is None:
        return None
    made = finish(case, trained, masks)
    if parsed.treatment.push:
        _push(case, made.places)
    places = (made.places[MODEL], made.places[ADAPTER], made.places[BASE])
    return FineTuning(target, *places, trained, made.record, made.verification)


def _push(case: Case, places: Mapping[str, Path | None]) -> None:
    """Upload what was written; an adapter's base goes first, so that the adapter can name it."""
    reporter = case.patient.reporter
    repo = str(case.recipe.treatment.push)
    model, adapter, base = places[MODEL], places[ADAPTER], places[BASE]
    if model is not None:
        if (model / MANIFEST).is_file():
            push(model, repo, reporter=reporter)
        else:
            reporter.say(f"Uploading {model} to {repo}")
            _upload(model, repo, reporter)
    if adapter is not None:
        named = repo if model is None else f"{repo}-adapter"
        if base is not None:
            pushed = push(base, f"{named}-base", reporter=reporter)
            name_base(adapter, f"{named}-base", pushed.commit)
            card = (adapter / CARD).read_text(encoding="utf-8")
            card = card.replace(
                f"`{own_base(case.output)}`", f"`{named}-base` at revision {pushed.commit}"
            )
            write_whole(adapter / CARD, card.encode())
        reporter.say(f"Uploading {adapter} to {named}")
        _upload(adapter, named, reporter)


def _upload(folder: Path, repo: str, reporter: Reporter) -> None:
    files: dict[str, Path | bytes] = {name: folder / name for name in visible_files(folder)}
    upload_files(Place(repo), files, f"Upload {folder.name}", reporter.say)
