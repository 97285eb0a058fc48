"""Training under the mask, from a recipe to a verified plain checkpoint or adapter.

locate → mask → train → merge in float32 → fold → verify → card. Under `accelerate launch` every
process runs `finetune`; all but the first only train.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import BadSettings
from surgery.files.checkpoint import Checkpoint, Origin, open_checkpoint, read_json
from surgery.files.staging import held, put, remove_stale, replacing, sync_tree, write_whole
from surgery.jobs.convert import Conversion, calibrate_sinks, convert
from surgery.method.locate import Emergence
from surgery.method.mask import Mask, attention_targets
from surgery.models.anatomy import Anatomy
from surgery.models.names import StoredNames
from surgery.outputs.checks import Check, Verification
from surgery.outputs.manifest import clean_numbers
from surgery.outputs.plan import CARD, LOSS_FIGURE, Plan, check_apart
from surgery.patient.locating import choose_mask, find_emergence, given_emergence
from surgery.patient.source import resolve
from surgery.reporter import SILENT, Reporter
from surgery.settings import Settings
from surgery.training.lora import (
    LowRank,
    closed_inputs,
    name_base,
    read_adapter,
    with_sinks,
    write_adapter,
    write_merged,
)
from surgery.training.recipe import BLOCK, Recipe, parse_recipe, read_recipe
from surgery.training.trained import (
    add_training,
    agreement,
    stands_alone,
    verify_closed,
    verify_masked,
)
from surgery.training.trainer import Trained, disk_failed, train, training_versions

# What lies in the output folder.
MODEL, ADAPTER, BASE = "model", "adapter", "base"
WORK = "training"
# Text that a smoke test measures and calibrates on.
SMOKE_TOKENS = 128


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
class _Case:
    """What all steps need to know."""

    recipe: Recipe
    checkpoint: Checkpoint
    anatomy: Anatomy
    settings: Settings
    output: Path

    @property
    def work(self) -> Path:
        return self.output / WORK


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

    recipe: a YAML file, see `surgery.recipe`. output: the folder to write, instead of the recipe's.
    smoke: everything small, on the demo model. resume: go on from the last complete checkpoint in
    the output. overwrite: begin again where the output holds an earlier training. changes: keys to
    replace. None on every process but the first. Raises a SurgeryError that says what is wrong.
    """
    path = Path(recipe)
    raw = {**read_recipe(path), **(changes or {})}
    target = _target(output, raw, path)
    if smoke:
        from surgery.training.smoke import make_small

        raw = make_small(raw)
    parsed = parse_recipe(raw, path.name, target / WORK / "checkpoints")
    with ExitStack() as stack, _in_one_sentence(target):
        return _run(parsed, target, stack, smoke, resume, overwrite, reporter)


def _target(output: str | Path | None, raw: Mapping[str, Any], recipe: Path) -> Path:
    """The folder to write: as told, else the recipe's, else named after the recipe."""
    block = raw.get(BLOCK)
    named = output or (block.get("output") if isinstance(block, dict) else None)
    if named is not None and (not isinstance(named, str | Path) or "\0" in str(named)):
        raise BadSettings(f"{BLOCK}: output cannot be {named!r}.")
    return Path(os.path.abspath(named or f"{recipe.stem}-output"))


@contextmanager
def _in_one_sentence(output: Path) -> Iterator[None]:
    """What the disk refuses while training, which several libraries say in their own ways."""
    try:
        yield
    except Exception as error:
        if not disk_failed(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        if isinstance(error, RuntimeError):
            reason = "a checkpoint could not be written (is the disk full?)"
        raise BadSettings(
            f"Training in {output} failed: {reason.rstrip('.')}; once that is mended, go on with "
            "--resume."
        ) from error


def _run(
    parsed: Recipe,
    target: Path,
    stack: ExitStack,
    smoke: bool,
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
) -> FineTuning | None:
    """`finetune` of a parsed recipe; the output is held until `stack` is closed."""
    arguments = parsed.arguments
    main = arguments.process_index == 0
    reporter = reporter if main else SILENT
    with arguments.main_process_first(local=False):
        checkpoint = resolve(
            str(parsed.model.model_name_or_path), _revision(parsed), say=reporter.say
        )
        if main:
            sources = checkpoint.sources
            _prepare(parsed, sources, target, stack, resume=resume, overwrite=overwrite)
        case = _case(parsed, checkpoint, target, smoke)
        emergence, masks = _masks(case, reporter) if main else (None, _read_masks(case))
    training_mask, fold_mask = masks
    treatment = parsed.treatment
    shut = (
        closed_inputs(
            case.anatomy,
            _union(training_mask, fold_mask),
            treatment.fold,
            fold_mask.layers if fold_mask is not None else (),
            treatment.tokens,
        )
        if training_mask is not None
        else {}
    )
    trained = train(
        parsed,
        checkpoint,
        case.anatomy,
        training_mask,
        shut,
        case.work,
        resume=resume,
        reporter=reporter,
    )
    if trained is None:
        return None
    return _finish(case, trained, emergence, fold_mask, shut, reporter)


def _revision(recipe: Recipe) -> str | None:
    revision = recipe.keys.get("model_revision")
    return str(revision) if revision is not None else None


def _case(recipe: Recipe, checkpoint: Checkpoint, output: Path, smoke: bool) -> _Case:
    treatment = recipe.treatment
    settings = Settings(
        model=str(recipe.model.model_name_or_path),
        rate=float(treatment.rate),
        scope=treatment.scope,
        fold=treatment.fold if treatment.folds else "norm",
        select=treatment.select,
        strength=float(treatment.strength),
        layer=treatment.layer,
        revision=_revision(recipe),
        seed=recipe.arguments.seed,
        max_degradation=float(treatment.max_degradation),
        force=treatment.force,
        check_tokens=SMOKE_TOKENS if smoke else Settings.check_tokens,
        calibration_tokens=SMOKE_TOKENS if smoke else Settings.calibration_tokens,
        device="cpu" if recipe.arguments.use_cpu else None,
        trust_remote_code=bool(getattr(recipe.arguments, "trust_remote_code", False)),
    )
    anatomy = examine(checkpoint, trust_remote_code=settings.trust_remote_code)
    if treatment.folds:
        anatomy.require(treatment.fold)
    return _Case(recipe, checkpoint, anatomy, settings, output)


def _prepare(
    recipe: Recipe,
    sources: Sequence[Path],
    output: Path,
    stack: ExitStack,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the work folder, or find the one to resume from; BadSettings where neither may be.

    Until `stack` is closed no other process trains there.
    """
    work, known = output / WORK, output / WORK / "recipe.json"
    record = json.loads(json.dumps(recipe.record(), default=str))
    if resume:
        remove_stale(output)
        if not known.is_file():
            raise BadSettings(f"{output} holds no training to resume; begin it without --resume.")
        before = read_json(known)
        differing = _differing(before, record)
        if differing:
            raise BadSettings(
                f"{output} was begun with another recipe ({', '.join(differing)} differ); a "
                "resumed training must be the same one."
            )
        stack.enter_context(held(work))
        _write_json(known, record)
        return
    check_apart(sources, output)
    with replacing(output, lambda: _check_output(output, overwrite=overwrite)) as folder:
        _check_output(output, overwrite=overwrite)
        (folder / WORK).mkdir()
        _write_json(folder / WORK / "recipe.json", record)
        stack.enter_context(held(folder / WORK))


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Raise BadSettings unless a training may begin in `output`."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise BadSettings(f"{output} exists already and is no folder; choose another --output.")
    work = output / WORK
    if not (work / "recipe.json").is_file():
        if any(output.iterdir()):
            raise BadSettings(f"{output} exists already; choose another --output.")
        return
    if not overwrite:
        raise BadSettings(
            f"{output} holds a training already; go on with --resume, begin again with "
            "--overwrite, or choose another --output."
        )
    with held(work):
        pass


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, f"{json.dumps(value, indent=1)}\n".encode())


# What may change between a training and its resumption: none of it touches the weights.
_AFTERWARDS = {"save", "output", "push", "max_degradation", "force"}


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two recipes are different trainings."""

    def plain(record: Mapping[str, Any]) -> dict[str, Any]:
        block = record.get(BLOCK) or {}
        kept = {key: value for key, value in block.items() if key not in _AFTERWARDS}
        return {**{key: value for key, value in record.items() if key != BLOCK}, **kept}

    one, other = plain(before), plain(now)
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------

Masks = tuple[Mask | None, Mask | None]


def _masks(case: _Case, reporter: Reporter) -> tuple[Emergence | None, Masks]:
    """The emergence layer, and the masks of training and of the fold."""
    treatment = case.recipe.treatment
    if not treatment.masks:
        return None, (None, None)
    subject = Subject(case.checkpoint, case.settings, reporter)
    if treatment.layer is not None:
        emergence = given_emergence(treatment.layer)
    else:
        emergence = find_emergence(subject, case.anatomy, case.settings, reporter)
        reporter.show(emergence)

    def mask_for(scope: str) -> Mask:
        targets = attention_targets(emergence.require(), case.anatomy.attends, scope)
        return choose_mask(subject, case.anatomy, targets, case.settings)

    training = mask_for(treatment.scope)
    fold = mask_for(treatment.fold_scope) if treatment.folds else None
    subject.release()
    masks = (training, fold)
    _write_json(case.work / "masks.json", [_as_data(mask) for mask in masks])
    return emergence, masks


def _read_masks(case: _Case) -> Masks:
    if not case.recipe.treatment.masks:
        return None, None
    training, fold = json.loads((case.work / "masks.json").read_text(encoding="utf-8"))
    return _from_data(training), _from_data(fold)


def _as_data(mask: Mask | None) -> Any:
    return asdict(mask) if mask is not None else None


def _from_data(data: Any) -> Mask | None:
    if data is None:
        return None
    chosen = {int(layer): tuple(dims) for layer, dims in data["dimensions"].items()}
    return Mask(data["hidden_size"], data["select"], data["strength"], chosen)


def _union(one: Mask, other: Mask | None) -> Mask:
    if other is None:
        return one
    return replace(one, dimensions={**other.dimensions, **one.dimensions})


# ---------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------


def _finish(
    case: _Case,
    trained: Trained,
    emergence: Emergence | None,
    fold_mask: Mask | None,
    shut: Mapping[str, tuple[int, ...]],
    reporter: Reporter,
) -> FineTuning:
    """Merge, fold, verify and write everything under temporary names, then rename."""
    part = case.output / ".finishing"
    shutil.rmtree(part, ignore_errors=True)
    for name in (BASE, ADAPTER, MODEL):
        remove_stale(case.output / name)
    part.mkdir()
    try:
        return _finish_in(part, case, trained, emergence, fold_mask, shut, reporter)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _finish_in(
    part: Path,
    case: _Case,
    trained: Trained,
    emergence: Emergence | None,
    fold_mask: Mask | None,
    shut: Mapping[str, tuple[int, ...]],
    reporter: Reporter,
) -> FineTuning:
    from surgery.training.loss_plot import plot_loss

    treatment = case.recipe.treatment
    record = _record(case, trained)
    figure = part / LOSS_FIGURE
    drawn = plot_loss(trained.history, figure, f"{case.checkpoint.origin.name}: {case.recipe.name}")
    if treatment.intervention == "gated_attention":
        base, revision = _names(case.checkpoint)
        shutil.copytree(trained.adapter, part / ADAPTER)
        name_base(part / ADAPTER, base, revision)
        checks = stands_alone(part / ADAPTER, record, case.checkpoint)
    else:
        checks = _products(case, trained, emergence, fold_mask, shut, record, part, reporter)
    verification = Verification(tuple(checks))
    reporter.show(verification)
    verification.require()
    record = {**record, "verification": verification.as_dict()}
    for name in (MODEL, ADAPTER):
        if (part / name).is_dir():
            add_training(part / name, record, checks, figure if drawn else None, case.checkpoint)
    # An adapter's base first, so that no adapter is ever there without it.
    places = {name: _publish(part / name, case.output / name) for name in (BASE, ADAPTER, MODEL)}
    if drawn:
        os.replace(figure, case.output / "loss.png")
    _write_json(case.work / "record.json", record)
    if treatment.push:
        _push(case, places, reporter)
    return FineTuning(
        case.output,
        places[MODEL],
        places[ADAPTER],
        places[BASE],
        trained,
        record,
        verification,
    )


class _Within(Reporter):
    """A step of ours told like the others: its files are not final, its checks come with ours."""

    def __init__(self, outer: Reporter) -> None:
        self.say, self.bar = outer.say, outer.bar  # type: ignore[method-assign]
        self._outer = outer

    def show(self, result: Any) -> None:
        if not isinstance(result, Plan | Verification):
            self._outer.show(result)


def _publish(folder: Path, target: Path) -> Path | None:
    if not folder.is_dir():
        return None
    sync_tree(folder)
    put(folder, target)
    return target


def _products(
    case: _Case,
    trained: Trained,
    emergence: Emergence | None,
    fold_mask: Mask | None,
    shut: Mapping[str, tuple[int, ...]],
    record: dict[str, Any],
    part: Path,
    reporter: Reporter,
) -> list[Check]:
    """The merged checkpoint, the adapter and its base, as the recipe asks; what was verified."""
    treatment = case.recipe.treatment
    reporter.say("Merging in float32")
    updates, names = _updates(case, trained.adapter)
    merged = part / "merged"
    record["changed"] = write_merged(case.checkpoint, updates, names, merged)
    checks = [verify_closed(updates, shut)] if shut else []
    folded = merged
    if fold_mask is not None:
        folding = _Within(reporter)
        conversion = _fold(case, merged, part / MODEL, fold_mask, emergence, folding)
        folded = conversion.output
        assert conversion.verification is not None
        checks += conversion.verification.checks
        if treatment.fold != "sink":
            checks.append(verify_masked(folded, case.anatomy, fold_mask, treatment.fold))
    reporter.say("Comparing with the trained model under hooks")
    checks += agreement(
        case.checkpoint, case.anatomy, case.settings, trained.adapter, fold_mask, folded
    )
    if treatment.save in ("adapter", "both"):
        _adapter(case, updates, names, merged, fold_mask, emergence, part, reporter)
        checks += agreement(
            open_checkpoint(folded, Origin("directory", "merged", str(folded))),
            case.anatomy,
            case.settings,
            part / ADAPTER,
            None,
            folded,
            base=part / BASE if (part / BASE).is_dir() else case.checkpoint.folder,
        )
    if treatment.save == "adapter":
        shutil.rmtree(folded)
    elif fold_mask is None:
        os.rename(merged, part / MODEL)
        (part / MODEL / "surgery.json").unlink(missing_ok=True)  # it would speak of the base
    shutil.rmtree(merged, ignore_errors=True)
    return checks


def _updates(case: _Case, adapter: Path) -> tuple[dict[str, LowRank], Any]:
    """The trained updates, and the checkpoint's name of each parameter."""
    import torch

    from surgery.models.loading import auto_class, load_config

    config = load_config(case.checkpoint.folder, trust_remote_code=case.settings.trust_remote_code)
    with torch.device("meta"):
        model = auto_class(config).from_config(
            config, trust_remote_code=case.settings.trust_remote_code
        )
    stored = StoredNames(case.checkpoint, model)

    def transposed(module: str) -> bool:
        return type(model.get_submodule(module)).__name__ == "Conv1D"

    return read_adapter(adapter, transposed), stored.of


def _fold(
    case: _Case,
    source: Path,
    output: Path,
    mask: Mask,
    emergence: Emergence | None,
    reporter: Reporter,
    **changes: Any,
) -> Conversion:
    """A checkpoint with the mask in its weights, written down as made from the recipe's model."""
    treatment = case.recipe.treatment
    options = {
        name: value
        for name, value in vars(case.settings).items()
        if name not in ("model", "revision", "scope", "layer")
    }
    return convert(
        str(source),
        output=output,
        mask=mask,
        emergence=emergence,
        scope=treatment.fold_scope,
        layer=treatment.layer,
        reporter=reporter,
        spoken_as=(case.settings.model, case.settings.revision, case.checkpoint.origin),
        **{**options, **changes},
    )


def _adapter(
    case: _Case,
    updates: Mapping[str, LowRank],
    names: Any,
    merged: Path,
    fold_mask: Mask | None,
    emergence: Emergence | None,
    part: Path,
    reporter: Reporter,
) -> None:
    """The updates as an adapter of the model they belong to.

    After `norm` and `qkv` that is the folded base, written beside it. A sink fold is itself of rank
    one and goes into the adapter, which then belongs to the recipe's own model.
    """
    treatment = case.recipe.treatment
    base, revision = _names(case.checkpoint)
    if fold_mask is not None and treatment.fold == "sink":
        made = open_checkpoint(merged, Origin("directory", "merged", str(merged)))
        subject = Subject(made, case.settings, reporter)
        sinks, _ = calibrate_sinks(subject, case.anatomy, fold_mask, case.settings, reporter)

        def weight(module: str) -> Any:
            return made.read(names(f"{module}.weight"))

        updates = with_sinks(updates, case.anatomy, fold_mask, sinks, weight)
    elif fold_mask is not None:
        reporter.say("Folding the base that the adapter belongs to")
        folder = case.checkpoint.folder
        # What counts was measured on the merged model, and the adapter is compared with that.
        _fold(case, folder, part / BASE, fold_mask, emergence, SILENT, check=False)
        base, revision = str(case.output / BASE), None
    write_adapter(part / ADAPTER, updates, base, revision)


def _names(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """The model and revision that an adapter of a checkpoint names."""
    if checkpoint.origin.kind == "hub":
        return checkpoint.origin.name, checkpoint.origin.commit
    return str(checkpoint.folder.resolve()), None


def _record(case: _Case, trained: Trained) -> dict[str, Any]:
    """What the manifest and the card say about the training."""
    losses = [row["loss"] for row in trained.history if "loss" in row]
    held_out = [row["eval_loss"] for row in trained.history if "eval_loss" in row]
    recipe = json.loads(json.dumps(case.recipe.record(), default=str))
    return clean_numbers(
        {
            "recipe": {"name": case.recipe.name, "keys": recipe},
            "base": asdict(case.checkpoint.origin),
            "steps": trained.steps,
            "seconds": round(trained.seconds, 1),
            "rows": trained.rows,
            "evaluation_rows": trained.evaluation_rows,
            "processes": trained.processes,
            "trainable": trained.trainable,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "held_out_loss": held_out[-1] if held_out else None,
            "history": list(trained.history),
            "versions": training_versions(),
            "changed": [],
        }
    )


def _push(case: _Case, places: Mapping[str, Path | None], reporter: Reporter) -> None:
    """Upload what was written; an adapter's base goes first, so that the adapter can name it."""
    import huggingface_hub

    from surgery.jobs.push import push

    repo = str(case.recipe.treatment.push)
    model, adapter, base = places[MODEL], places[ADAPTER], places[BASE]
    if model is not None:
        if (model / "surgery.json").is_file():
            push(model, repo, reporter=reporter)
        else:
            reporter.say(f"Uploading {model} to {repo}")
            _upload(huggingface_hub.HfApi(), model, repo)
    if adapter is not None:
        named = repo if model is None else f"{repo}-adapter"
        if base is not None:
            pushed = push(base, f"{named}-base", reporter=reporter)
            name_base(adapter, f"{named}-base", pushed.commit)
            card = (adapter / CARD).read_text(encoding="utf-8")
            card = card.replace(f"`{base}`", f"`{named}-base` at revision {pushed.commit}")
            write_whole(adapter / CARD, card.encode())
        reporter.say(f"Uploading {adapter} to {named}")
        _upload(huggingface_hub.HfApi(), adapter, named)


def _upload(api: Any, folder: Path, repo: str) -> None:
    from surgery.outputs.hub import in_one_sentence

    with in_one_sentence(repo):
        created = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder)
