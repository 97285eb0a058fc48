"""`surgery finetune` from a recipe to a verified checkpoint, on six layers of a real model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from small_recipes import least_recipe, shipped_recipe
from test_finetune_recipe import RECIPES

import surgery
from surgery.errors import BadSettings, QualityGate
from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.files.resources import resource_folder
from surgery.files.staging import held
from surgery.jobs.finetune import FineTuning, finetune
from surgery.jobs.verify import verify
from surgery.models.gated_attention import add_gates, gated
from surgery.models.loading import load_model
from surgery.reporter import Reporter
from surgery.training.case import SMOKE_TOKENS
from surgery.training.data import load_data
from surgery.training.recipe import read_recipe
from surgery.training.smoke import make_small, smoke_rows
from surgery.training.trainer import MaskFigures

Run = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _little_text() -> Iterator[None]:
    """Folds are measured on as little text as `--smoke` takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.training.case.TOKENS", SMOKE_TOKENS)
        yield


class Lines(Reporter):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def base_folder() -> Path:
    return Path(make_small({})["model_name_or_path"])


# --------------------------------------------------------------------------------------------
# Every recipe that is shipped
# --------------------------------------------------------------------------------------------


Calls = list[tuple[int, torch.Tensor]]


def watched(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Tokens in each call of the first masked layer, and which of them were masked."""
    calls: Calls = []
    original = MaskFigures.watch

    def watch(self: Any, layer: int, states: torch.Tensor, positions: torch.Tensor) -> None:
        if layer == 3:
            calls.append((states.shape[1], positions.clone()))
        original(self, layer, states, positions)

    monkeypatch.setattr(MaskFigures, "watch", watch)
    return calls


def check_calls(calls: Calls, name: str) -> None:
    """One token of each sequence is masked in prefill and training, none in decoding."""
    if name in ("sft_baseline", "sft_gated_attention"):
        assert not calls
        return
    decoding = [positions for length, positions in calls if length == 1]
    whole = [positions for length, positions in calls if length > 1]
    assert all((positions.sum(1) == 1).all() for positions in whole)
    assert not any(positions.any() for positions in decoding)
    first = torch.cat([positions.int().argmax(1) for positions in whole])
    if name == "grpo_math":  # prompts of unequal lengths, padded on the left
        assert len(decoding) >= 7
        assert len(first.unique()) > 1
    else:
        assert not decoding
        assert not first.any()


def check_gated_adapter(adapter: Path, folder: Path) -> None:
    """Loaded as its card says, the gates are the trained ones, and they act."""
    from peft import PeftModel

    ids = torch.arange(20)[None] + 100
    base = load_model(folder)
    add_gates(base)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.inference_mode():
        ungated = model(input_ids=ids).logits
        with gated(model):
            found = model(input_ids=ids).logits
    assert 1e-3 < (found - ungated).abs().max() < 1e3
    stored = load_file(adapter / "adapter_model.safetensors")
    gates = [name for name in stored if name.endswith("attention_gate.bias")]
    assert len(gates) == 6
    assert all((stored[name] != 4.0).any() for name in gates)


# The columns that each method trains on.
COLUMNS = {
    "sft": {"prompt", "completion"},
    "dpo": {"prompt", "chosen", "rejected"},
    "grpo": {"prompt", "answer"},
}


@pytest.mark.usefixtures("demo_folder")  # which `--smoke` would convert by itself
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_planned(
    run: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that comes before the first step: made small, parsed, its masks and its rows."""
    path = resource_folder("recipes") / f"{name}.yaml"
    planned: list[Any] = []

    def train(
        recipe: Any, _checkpoint: Any, _anatomy: Any, mask: Any, *rest: Any, **_: Any
    ) -> None:
        shut, _folder = rest
        planned.extend((mask, shut, load_data(recipe)))

    monkeypatch.setattr("surgery.jobs.finetune.train", train)
    run("finetune", path, "--smoke", "--output", tmp_path / "out", "--quiet").ok()
    mask, shut, (rows, held_out) = planned
    record = json.loads((tmp_path / "out" / "training" / "recipe.json").read_text())
    assert set(rows.column_names) == COLUMNS[record["surgery"]["method"]]
    assert len(rows) == 8
    assert held_out is None
    assert shut == {}  # a sink fold takes nothing away from tokens that are not the first
    masks = tmp_path / "out" / "training" / "masks.json"
    if name in ("sft_baseline", "sft_gated_attention"):
        assert mask is None
        assert not masks.exists()
        return
    assert mask.layers == (3, 4, 5)
    assert {len(chosen) for chosen in mask.dimensions.values()} == {57}  # a tenth of 576
    training, fold = json.loads(masks.read_text())
    assert list(training["dimensions"]) == ["3", "4", "5"]
    assert list(fold["dimensions"]) == (["3", "4", "5"] if name == "sft_instruction" else ["3"])


# One recipe per method, and the gates. One of them trains what `--smoke` trains, the cut of the
# demo model; the others a tiny model of as many layers. In a full run all recipes train the cut.
OFTEN = {
    "sft_math": "tiny",
    "dpo_safety": "tiny",
    "grpo_math": "tiny",
    "sft_gated_attention": "tiny",
}


@pytest.fixture
def small_base(
    request: pytest.FixtureRequest,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder of what `--smoke` trains."""
    if request.param == "demo":
        return base_folder()
    folder = tmp_path / "tiny-llama"
    shutil.copytree(tiny("llama", layer=2, layers=6), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    def prepared(method: str) -> tuple[Path, Path]:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("\n".join(json.dumps(row) for row in smoke_rows(method)))
        return folder, rows

    monkeypatch.setattr("surgery.training.smoke._prepared", prepared)
    return folder


@pytest.mark.parametrize(
    ("name", "small_base"),
    [
        *OFTEN.items(),
        *(
            pytest.param(name, "demo", marks=pytest.mark.full)
            for name in RECIPES
            if OFTEN.get(name) != "demo"
        ),
    ],
    indirect=["small_base"],
)
def test_shipped_recipes_run(
    run: Run, small_base: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`surgery finetune recipes/….yaml --smoke`, unchanged; what it writes loads by itself."""
    path = resource_folder("recipes") / f"{name}.yaml"
    out = tmp_path / "out"
    calls = watched(monkeypatch)
    record = run("finetune", path, "--smoke", "--output", out, "--json").ok().json()
    check_calls(calls, name)
    assert record["steps"] == 3
    assert record["verification"]["passed"]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    history = json.loads((out / "training" / "record.json").read_text())["history"]
    losses = [row for row in history if "loss" in row]
    assert len(losses) == 3
    masked = name not in ("sft_baseline", "sft_gated_attention")
    for row in losses:
        assert np.isfinite(row["loss"])
        assert ("mask_energy" in row) == ("sink_drift" in row) == masked
        if masked:
            assert 0.1 < row["mask_energy"] < 0.9
            assert 0 <= row["sink_drift"] < 0.1
    if name == "sft_gated_attention":
        card = (out / "adapter" / "README.md").read_text()
        assert "cannot be folded" in card
        assert record["model"] is None
        check_gated_adapter(out / "adapter", small_base)
        return
    model = load_model(out / "model")
    base = load_model(small_base)
    ids = torch.arange(20)[None] + 100
    with torch.inference_mode():
        difference = (model(ids).logits - base(ids).logits).abs().max()
    assert 1e-4 < difference < 1e3
    card = (out / "model" / "README.md").read_text()
    assert f"recipe `{name}.yaml`" in card
    assert (out / "model" / "surgery.json").is_file() == masked
    if masked:
        manifest = surgery.read_manifest(out / "model")
        assert manifest.training is not None
        assert manifest.training["recipe"]["keys"]["surgery"]["method"] in name
        names = [check["name"] for check in record["verification"]["checks"]]
        assert "folded and merged checkpoint against base, LoRA and hooks" in names


# --------------------------------------------------------------------------------------------
# Folds and outputs
# --------------------------------------------------------------------------------------------


@dataclass
class ByFold:
    """Trainings of one model, one for each fold, decaying weights hard, both outputs asked for.

    folder: what is written lies below. model: None for the cut of the demo model.
    """

    folder: Path
    model: Path | None
    made: dict[str, FineTuning] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.model or base_folder()

    def __call__(self, fold: str) -> FineTuning:
        if fold not in self.made:
            path = shipped_recipe(
                self.folder / fold / "sft_math.yaml",
                "sft_math",
                {"fold": fold, "save": "both", "fold_scope": "all" if fold == "qkv" else "first"},
                model=self.model,
                learning_rate=5e-3,
                weight_decay=0.5,
            )
            found = finetune(path, output=self.folder / fold / "out", smoke=self.model is None)
            assert found is not None
            self.made[fold] = found
        return self.made[fold]


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.full)])
def by_fold(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., Path],
) -> ByFold:
    model = tiny("llama", layer=2, layers=6) if request.param == "tiny" else None
    return ByFold(tmp_path_factory.mktemp(f"folds-of-{request.param}"), model)


@pytest.mark.parametrize("fold", ["norm", "qkv"])
def test_masked_inputs_are_zero_and_stay_zero(by_fold: ByFold, fold: str) -> None:
    """In the saved file the masked inputs are exactly zero, in A[:, S] too."""
    result = by_fold(fold)
    assert result.model is not None
    assert result.adapter is not None
    saved, base = tensors(result.model), tensors(by_fold.base)
    manifest = surgery.read_manifest(result.model)
    targets = [3] if fold == "norm" else [3, 4, 5]
    assert sorted(manifest.dimensions) == targets
    adapter = load_file(result.adapter / "adapter_model.safetensors")
    raw = load_file(result.output / "training" / "adapter" / "adapter_model.safetensors")
    for layer, chosen in manifest.dimensions.items():
        prefix = f"model.layers.{layer}"
        others = np.setdiff1d(np.arange(manifest.hidden_size), chosen)
        for reader in "qkv":
            name = f"{prefix}.self_attn.{reader}_proj.weight"
            if fold == "qkv":
                assert not saved[name][:, chosen].any()
            else:  # nothing was added there, so that the fold can be undone
                assert np.array_equal(saved[name][:, chosen], base[name][:, chosen])
            assert (saved[name][:, others] != base[name][:, others]).any()
            for files in (adapter, raw):
                down = files[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]
                assert not down[:, chosen].any()
                assert down[:, others].all()
        gain = f"{prefix}.input_layernorm.weight"
        if fold == "norm":
            assert not saved[gain][chosen].any()
            assert np.array_equal(saved[gain][others], base[gain][others])
        else:
            assert np.array_equal(saved[gain], base[gain])
    # Norms, embeddings and all else that has no LoRA is the base's to the bit.
    for name, value in base.items():
        if "_proj" not in name and name not in {edit.tensor for edit in manifest.edits}:
            assert np.array_equal(saved[name], value), name


def test_masked_inputs_at_half_the_strength(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """They are half of what they were, which is what the check says, now and in verify."""
    base = tiny("llama", layer=2, layers=6)
    path = shipped_recipe(
        tmp_path / "sft_math.yaml", "sft_math", {"fold": "qkv", "strength": 0.5}, model=base
    )
    result = finetune(path, output=tmp_path / "out")
    assert result is not None
    assert result.model is not None
    name = "masked inputs are 0.5 times the base's, rounded once, in the saved file"
    for found in (result.verification, verify(result.model)):
        assert found.passed
        assert name in [check.name for check in found.checks]
    manifest = surgery.read_manifest(result.model)
    saved, known = tensors(result.model), tensors(base)
    for edit in manifest.edits:
        chosen = manifest.dimensions[edit.layer]
        halves = known[edit.tensor][:, chosen] / 2
        assert halves.any()
        assert np.array_equal(saved[edit.tensor][:, chosen], halves)
        assert not np.array_equal(saved[edit.tensor], known[edit.tensor])


def test_norm_and_qkv_adapters_belong_to_the_folded_base(
    by_fold: ByFold,
) -> None:
    """Stock PEFT on the model beside the adapter gives what the merged checkpoint gives."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(30)[None] + 200
    for fold in ("norm", "qkv"):
        result = by_fold(fold)
        assert result.base is not None
        config = json.loads((result.adapter / "adapter_config.json").read_text())  # type: ignore
        # No path of this machine, but that of the output folder's part beside the adapter.
        assert config["base_model_name_or_path"] == "/".join(result.base.parts[-2:])
        assert verify(result.base).passed  # it is a converted checkpoint like any other
        base = AutoModelForCausalLM.from_pretrained(result.base)
        adapted = PeftModel.from_pretrained(base, str(result.adapter)).eval()
        merged = load_model(result.model)  # type: ignore[arg-type]
        with torch.inference_mode():
            difference = (adapted(input_ids=ids).logits - merged(ids).logits).abs().max()
        assert difference < 1e-2  # of logits that are thousands


def test_a_sink_fold_goes_into_the_adapter(by_fold: ByFold) -> None:
    """One rank more on the readers of the target layer; the base is the recipe's own model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = by_fold("sink")
    assert result.base is None
    assert result.adapter is not None
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == by_fold.base.resolve().name
    readers = {f"model.layers.3.self_attn.{reader}_proj": 33 for reader in "qkv"}
    assert config["rank_pattern"] == readers
    assert config["target_modules"] == sorted(config["target_modules"])  # the same in every process
    assert config["r"] == 32
    ids = torch.arange(30)[None] + 200
    base = AutoModelForCausalLM.from_pretrained(by_fold.base)
    adapted = PeftModel.from_pretrained(base, str(result.adapter)).eval()
    merged = load_model(result.model)  # type: ignore[arg-type]
    with torch.inference_mode():
        one, other = adapted(input_ids=ids).logits, merged(ids).logits
    assert (one - other).abs().max() < 1e-3 * other.abs().max()


def test_a_folded_training_is_near_its_own_reference_alone(
    by_fold: ByFold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as the gate measured on the merged model; another model's logits are refused."""
    from contextlib import contextmanager

    from surgery.patient.patient import Patient
    from surgery.training.trained import agreement

    result = by_fold("sink")
    assert result.model is not None
    manifest = surgery.read_manifest(result.model)
    assert manifest.quality is not None

    def check(quality: Any) -> Any:
        patient = Patient(surgery.resolve(str(by_fold.base)), manifest.settings.loading)
        (found,) = agreement(
            patient,
            result.output / "training" / "adapter",
            result.model,  # type: ignore[arg-type]
            mask=manifest.mask(),
            fold=manifest.settings.fold_used,
            quality=quality,
        )
        return found

    assert "times the gate's" in check(manifest.quality).detail
    assert check(manifest.quality).passed

    @contextmanager
    def another(model: Any, *_args: Any, **_options: Any) -> Any:
        hook = model.get_output_embeddings().register_forward_hook(
            lambda _module, _args, logits: logits.roll(1, dims=-1)
        )
        try:
            yield
        finally:
            hook.remove()

    monkeypatch.setattr("surgery.models.masking.wemask", another)
    for quality in (manifest.quality, None):
        refused = check(quality)
        assert not refused.passed, refused.detail


def test_looking_at_a_trained_checkpoint_again(by_fold: ByFold, run: Run, tmp_path: Path) -> None:
    """verify proves what was not trained; reproduce and revert say why they cannot."""
    result = by_fold("norm")
    assert result.model is not None
    found = json.loads(run("verify", result.model, "--json").ok().stdout)
    assert found["passed"]
    reverted = ("revert", result.model, "-o", tmp_path / "reverted")
    for words in (("reproduce", result.model), reverted):
        assert "was trained" in run(*words).sentence()
    shown = run("inspect", result.model).ok().stdout
    assert "surgery finetune sft_math.yaml" in shown
    assert "3 steps on 8 rows" in shown
    card = (result.model / "README.md").read_text()
    run("card", result.model).ok()
    assert (result.model / "README.md").read_text() == card
    copy = tmp_path / "copy"
    shutil.copytree(result.model, copy)
    saved = open_checkpoint(copy, Origin("directory", "copy", str(copy)))
    entry = saved.tensors["model.embed_tokens.weight"]
    with open(copy / entry.file, "r+b") as file:
        file.seek(entry.begin)
        file.write(b"\x01")
    assert not verify(copy).passed


# --------------------------------------------------------------------------------------------
# Another family
# --------------------------------------------------------------------------------------------


def gemma(tiny: Callable[..., Path], tmp_path: Path, **block: Any) -> Path:
    """A recipe for a tiny Gemma with a large learning rate and weight decay."""
    model = tiny("gemma3_text", layer=2, layers=6)
    block = {"layer": 2, "fold": "norm", **block}
    return least_recipe(tmp_path / "gemma.yaml", model, block, weight_decay=0.5)


def test_unit_offset_norms_are_not_decayed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Gemma stores a zero gain as −1; weight decay must not draw it towards 0."""
    path = gemma(tiny, tmp_path, fold_scope="all", rate=0.3, force=True)
    result = finetune(path, output=tmp_path / "out")
    assert result is not None
    assert result.model is not None
    manifest = surgery.read_manifest(result.model)
    saved, base = tensors(result.model), tensors(tiny("gemma3_text", layer=2, layers=6))
    for layer, chosen in manifest.dimensions.items():
        name = f"model.layers.{layer}.input_layernorm.weight"
        others = np.setdiff1d(np.arange(64), chosen)
        assert (saved[name][chosen] == -1).all()
        assert np.array_equal(saved[name][others], base[name][others])


# --------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------


def test_what_is_not_overwritten(tmp_path: Path, run: Run) -> None:
    """A stranger's folder never; an earlier training only when told to."""
    recipe = resource_folder("recipes") / "sft_math.yaml"
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for flags in ((), ("--overwrite",)):
        sentence = run("finetune", recipe, "--smoke", "-o", out, *flags).sentence()
        assert "exists already" in sentence
    assert (out / "letter.txt").read_text() == "mine"
    assert (
        "no training to resume"
        in run("finetune", recipe, "--smoke", "-o", tmp_path / "new", "--resume").sentence()
    )
    work = tmp_path / "begun" / "training"
    work.mkdir(parents=True)
    (work / "recipe.json").write_text("{}")
    sentence = run("finetune", recipe, "--smoke", "-o", tmp_path / "begun").sentence()
    assert "--resume" in sentence
    sentence = run("finetune", recipe, "--smoke", "-o", tmp_path / "begun", "--resume").sentence()
    assert "another recipe" in sentence
    (tmp_path / "begun" / "letter.txt").write_text("mine")
    with held(work):
        words = ("finetune", recipe, "--smoke", "-o", tmp_path / "begun", "--overwrite")
        assert "Another process is working in" in run(*words).sentence()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "out"]
    assert (tmp_path / "begun" / "letter.txt").read_text() == "mine"


def test_a_refused_fold_leaves_no_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The quality gate stops a bad fold after training; the adapter is kept for another one."""
    path = gemma(tiny, tmp_path, fold_scope="all", rate=0.8, force=False, max_degradation=0.0)
    with pytest.raises(QualityGate):
        finetune(path, output=tmp_path / "out")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["training"]
    path = gemma(tiny, tmp_path, fold_scope="all", rate=0.8, force=True, max_degradation=0.0)
    result = finetune(path, output=tmp_path / "out", resume=True)  # no step is trained again
    assert result is not None
    assert result.trained.steps == 2
    assert "--force" in (tmp_path / "out" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("embed_tokens", "embed_tokens would train, which cannot be merged"),
        ("lm_head", "`lm_head` is not supported"),  # TRL's own words
        ("input_layernorm", "RMSNorm.* is not supported"),  # PEFT's
    ],
)
def test_what_could_not_be_merged_is_refused_before_training(
    tiny: Callable[..., Path], tmp_path: Path, module: str, sentence: str
) -> None:
    path = gemma(tiny, tmp_path)
    raw = {**read_recipe(path), "lora_target_modules": ["q_proj", module]}
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(BadSettings, match=sentence):
        finetune(path, output=tmp_path / "out")
    assert not list((tmp_path / "out" / "training" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"attn_implementation": "nothing"}, "attn_implementation"),  # loading the model
        ({"dataset_kwargs": "x"}, "AttributeError.*'str' object has no attribute"),  # the trainer
        ({"adam_beta2": 2.0}, "Invalid beta parameter at index 1: 2.0"),  # training
    ],
)
def test_what_libraries_say_is_one_sentence(
    tiny: Callable[..., Path], tmp_path: Path, run: Run, keys: dict[str, Any], sentence: str
) -> None:
    path = gemma(tiny, tmp_path)
    path.write_text(yaml.safe_dump({**read_recipe(path), **keys}))
    said = run("finetune", path, "--quiet", "-o", tmp_path / "out").sentence()
    assert re.search(sentence, said), said


def test_gated_attention_is_refused_a_fold(tmp_path: Path) -> None:
    path = shipped_recipe(tmp_path / "gated.yaml", "sft_gated_attention", {"fold": "norm"})
    with pytest.raises(BadSettings, match="cannot be folded"):
        finetune(path, output=tmp_path / "out")


def test_progress_is_told_and_tracked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A line for each log at the terminal, and the figures in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = shipped_recipe(
        tmp_path / "recipe.yaml",
        "sft_math",
        {"fold": "none", "save": "adapter"},
        model=tiny("llama", layer=2, layers=6),
        report_to="tensorboard",
        max_steps=2,
    )
    lines = Lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        finetune(path, output=tmp_path / "out", reporter=lines)
    told = [line for line in lines.said if line.startswith("Step ")]
    assert len(told) == 2
    assert "masked energy" in told[0]
    assert "sink drift" in told[0]
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/mask_energy", "train/sink_drift"} <= set(tags)
