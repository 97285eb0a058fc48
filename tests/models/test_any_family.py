"""Every family: planted, located, folded through plan and write, loaded by stock transformers.

One test for each model of `more_models.CASES`, and one that holds `surgery families` to them: what
that command says was tested is what is tested here, no less and no more. By default that is one
model for each row of the family table; all of them are in the full selection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import more_models
import numpy as np
import pytest
import torch
from more_models import CASES, DEPTH, HIDDEN, Case
from safetensors import safe_open
from shared import Run, rest_in_full

import surgery
from surgery.errors import BadCheckpoint, Unsupported
from surgery.files.checkpoint import Checkpoint
from surgery.folds.calibrate import sink_directions
from surgery.folds.editing import EditedWeights
from surgery.folds.registry import FOLDS, make_edits
from surgery.measure.trial import PAIRS, VARIANTS, Edited, run_trial
from surgery.method.locate import agree
from surgery.method.mask import Mask, attention_targets, largest
from surgery.models import families, stream
from surgery.models.anatomy import Anatomy, effective_gain
from surgery.models.discovery import decoder_layers
from surgery.models.families import MULTIMODAL, family_of
from surgery.models.ground import Loaded
from surgery.models.lending import Lender
from surgery.models.loading import load_model, load_tokenizer
from surgery.models.masking import masked
from surgery.models.observe import layer_norms, pad, sink_magnitudes
from surgery.outputs.checks import verify_edits, verify_structure, verify_untouched
from surgery.outputs.plan import make_plan
from surgery.outputs.write import copy_plan
from surgery.patient import texts
from surgery.patient.patient import examine

MASKED = HIDDEN // 4


def condition(case: Case) -> str:
    """Which row of its family a case belongs to."""
    fields = {"model_type": case.model_type, **case.fields}
    family = next(one for one in families.FAMILIES if case.model_type in one.model_types)
    assert family_of(fields) is not None
    return next((one.condition for one in family.cases if one.holds(fields)), "")


def one_for_each_row() -> set[str]:
    """The first model of each row of the table and each case of it, and of each layout of either.

    Alone, and inside a multimodal model where the row has one.
    """
    first: dict[tuple[Any, ...], str] = {}
    for name, case in CASES.items():
        row = families._BY_TYPE[case.model_type].model_types
        layout = name.partition("-")[2]
        first.setdefault((row, condition(case), layout, bool(case.whole)), name)
    return set(first.values())


ROWS = one_for_each_row()
SUPPORTED = rest_in_full((name for name, case in CASES.items() if case.folds), ROWS)
REFUSED = rest_in_full((name for name, case in CASES.items() if not case.folds), ROWS)


def needs(case: Case) -> None:
    if not case.exists:
        pytest.skip(f"this release of transformers has no {case.whole or case.model_type}")


def logits_of(model: Any, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    return found[real.bool()].float()


def divergence(known: torch.Tensor, other: torch.Tensor) -> float:
    """KL(known ‖ other) in nats per token."""
    logs, others = known.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((logs.exp() * (logs - others)).sum(-1).mean())


def beyond_the_depth(folder: Path) -> dict[str, torch.Tensor]:
    """Copies of the last layer's tensors under the number of a layer that does not exist."""
    copies = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                last = re.fullmatch(
                    rf"(.*\b(?:layers|h|blocks)\.){DEPTH - 1}(\.(?!.*expert).*)", name
                )
                if last and "vis" not in name:
                    copies[f"{last[1]}{DEPTH}{last[2]}"] = file.get_tensor(name) + 1
    assert copies
    return copies


@contextmanager
def reading(model: Any, readers: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What linears give in the forward passes of the block."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, result: seen.update({name: result.detach().double()})

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in readers]
    yield seen
    for handle in handles:
        handle.remove()


def choose(
    model: Any, anatomy: Anatomy, checkpoint: Checkpoint, targets: Sequence[int], prompts: Any
) -> Mask:
    """By gain, or by activation where norms have none."""
    if anatomy.at(targets[0]).gain:
        scores = {at: effective_gain(anatomy, checkpoint, at) for at in targets}
        return Mask(HIDDEN, "weight", 1.0, {at: largest(scores[at], MASKED) for at in targets})
    with pytest.raises(Unsupported, match="use --select activation"):
        effective_gain(anatomy, checkpoint, targets[0])
    scores = sink_magnitudes(model, anatomy, targets, prompts)
    return Mask(HIDDEN, "activation", 1.0, {at: largest(scores[at], MASKED) for at in targets})


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    needs(case)
    folder = more_models.save(case, tmp_path / "base")
    more_models.add_ignored_tensors(
        folder, {**beyond_the_depth(folder), "mtp.layers.0.weight": torch.ones(3)}
    )
    checkpoint = surgery.resolve(str(folder))

    if case.from_five and not more_models.FIVE:
        with pytest.raises(Unsupported, match="disagree about its attention input"):
            examine(checkpoint)
        return

    # The table says of it what running it says, and which folds are legal.
    anatomy = examine(checkpoint)
    assert anatomy.known_from == "table, confirmed by trace"
    assert anatomy.model_type == case.model_type
    legal = ("qkv", "sink") if anatomy.norm_refusal else ("norm", "qkv", "sink")
    assert legal == case.folds
    if "norm" not in legal:
        with pytest.raises(Unsupported, match=rf"--fold norm is not possible.*{case.refused}"):
            FOLDS["norm"].require(anatomy)

    # The massive activation is found where it was planted, loaded or streamed.
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompts = texts.encode(tokenizer, texts.bundled("calibration")[:3], 60)
    norms = layer_norms(model, anatomy, prompts)
    expected = case.layer if case.lasts else None
    assert agree(norms).layer == expected
    streamed = stream.LayerStream(checkpoint, anatomy).locate(prompts)
    assert streamed.emergence.layer == expected

    # Zeroing folds in every later layer: to the bit what the hook does, and nothing else changed.
    windows = texts.windows(tokenizer, texts.bundled("heldout"), 40, 120)
    ids, real = pad([*windows, windows[0][:15]])
    base = logits_of(model, ids, real)
    everywhere = attention_targets(case.layer, anatomy.attends, "all")
    mask = choose(model, anatomy, checkpoint, everywhere, prompts)
    with masked(model, anatomy, mask, "all"):
        hooked = logits_of(model, ids, real)
    assert divergence(base, hooked) > 3e-4
    for fold in legal[:-1]:
        edits = make_edits(anatomy, mask, fold)
        assert {edit.layer for edit in edits} == set(everywhere)
        written = write(checkpoint, edits, tmp_path / fold)
        assert torch.equal(logits_of(load_model(written), ids, real), hooked)

    # The sink fold in the first later layer that attends: at the sink what the hook does.
    first = attention_targets(case.layer, anatomy.attends, "first")
    mask = replace(mask, dimensions={first[0]: mask.dimensions[first[0]]})
    calibration = texts.windows(tokenizer, texts.bundled("calibration"), 128, 2500)
    loaded = Loaded(model, anatomy)
    sinks, leaks = sink_directions(loaded, checkpoint, mask, calibration)
    edits = make_edits(anatomy, mask, "sink", sinks)
    folded = load_model(write(checkpoint, edits, tmp_path / "sink"))
    readers = anatomy.at(first[0]).readers
    with masked(model, anatomy, mask), reading(model, readers) as by_hook:
        paper = logits_of(model, ids, real)
    with reading(model, readers) as unmasked:
        logits_of(model, ids, real)
    with reading(folded, readers) as by_fold:
        sink = logits_of(folded, ids, real)
    for reader in readers:
        change = (unmasked[reader] - by_hook[reader])[:, 0].norm(dim=-1).max()
        assert change > 0
        distance = (by_fold[reader] - by_hook[reader]).norm(dim=-1)
        assert distance[:, 0].max() < 1e-3 * change
        ordinary = distance[:, 1:][real[:, 1:].bool()].square().mean().sqrt()
        assert ordinary < 3 * leaks[first[0]].ordinary_rms * change < 0.5 * change
    every = load_model(write(checkpoint, make_edits(anatomy, mask, "qkv"), tmp_path / "every"))
    assert divergence(paper, sink) < divergence(paper, logits_of(every, ids, real))
    journeys_agree(loaded, Edited(checkpoint, mask, edits, sinks), windows)


def journeys_agree(loaded: Loaded, edited: Edited, windows: Sequence[Sequence[int]]) -> None:
    """Base, hook and fold through the layers, from memory and from the files, as in whole runs."""
    model, anatomy = loaded.model, loaded.anatomy
    ids, real = pad(windows)
    weights = EditedWeights(model, edited.checkpoint, edited.edits)
    whole = {"base": logits_of(model, ids, real)}
    with masked(model, anatomy, edited.mask):
        whole["reference"] = logits_of(model, ids, real)
    with weights.active():
        whole["folded"] = logits_of(model, ids, real)
    lengths = [len(window) for window in windows]
    logs = {name: logits.double().log_softmax(-1).split(lengths) for name, logits in whole.items()}
    lent = Lender(edited.checkpoint, anatomy)
    answers = []
    for ground in (loaded, lent):
        trial = run_trial(ground, edited, windows)
        answers.append(trial.answers[edited.mask.layers[0]])
        for row, one in enumerate(trial.sequences):
            length = len(one.ids)
            for name in VARIANTS:
                targets = torch.tensor(one.ids[1:])[:, None]
                losses = -logs[name][row][: length - 1].gather(-1, targets)[:, 0]
                np.testing.assert_allclose(one.losses[name], losses, rtol=1e-4, atol=1e-4)
            for p, q in PAIRS:
                known, other = logs[p][row], logs[q][row]
                found = (known.exp() * (known - other)).sum(-1)
                np.testing.assert_allclose(one.divergences[p, q], found, rtol=1e-2, atol=2e-6)
    np.testing.assert_allclose(answers[0].ordinary, answers[1].ordinary, rtol=1e-2, atol=1e-5)
    assert all(
        parameter.is_meta for parameter in decoder_layers(lent.model, anatomy)[0].parameters()
    )


def write(checkpoint: Checkpoint, edits: Any, folder: Path) -> Path:
    """Through plan and write, proved to have changed what was planned and no other byte."""
    folder.mkdir()
    copy_plan(make_plan(checkpoint, edits, folder.with_name(f"{folder.name}-final")), folder)
    for check in (
        verify_structure(checkpoint, folder),
        verify_edits(checkpoint, folder, edits),
        verify_untouched(checkpoint, folder, [edit.tensor for edit in edits]),
    ):
        assert check.passed, check.detail
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence, and without the table too."""
    case = CASES[name]
    needs(case)
    folder = more_models.save(case, tmp_path / "base")
    with pytest.raises(
        Unsupported, match=rf"^{case.model_type} cannot be converted.*{case.refused}"
    ):
        surgery.convert(str(folder), layer=2, fold="qkv", output=tmp_path / "out")
    monkeypatch.delitem(families._BY_TYPE, case.model_type)
    with pytest.raises(Unsupported):
        examine(surgery.resolve(str(folder)))
    assert not (tmp_path / "out").exists()


def test_the_list_is_what_is_tested(run: Run) -> None:
    """`surgery families --json` claims what `test_supported` and `test_refused` show."""
    listed = {
        (row["family"], row["when"]): row for row in run("families", "--json").json()["families"]
    }
    tested: dict[tuple[str, str], list[Case]] = {}
    for case in CASES.values():
        tested.setdefault((case.model_type, condition(case)), []).append(case)
    assert set(listed) == set(tested)
    for key, row in listed.items():
        cases = tested[key]
        for case in cases:
            assert tuple(row["folds"]) == case.folds
            assert tuple(row["bit_equal"]) == case.folds[:-1]
            assert tuple(row["near"]) == case.folds[-1:]
            assert row["located"] == (bool(case.folds) and case.lasts)
            assert bool(row["refusal"]) == (case.folds != ("norm", "qkv", "sink"))
            assert re.search(case.refused, row["refusal"])
        assert set(row["inside"]) == {case.whole for case in cases if case.whole}
    assert set(MULTIMODAL) == {case.whole for case in CASES.values() if case.whole}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"lists the {len({family for family, _ in listed})} decoder families" in readme


def test_every_row_of_the_table_is_tested_by_default() -> None:
    tested = {(CASES[name].model_type, condition(CASES[name])) for name in ROWS}
    for family in families.FAMILIES:
        for when in ("", *(case.condition for case in family.cases)):
            assert tested & {(name, when) for name in family.model_types}, (family, when)


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


def test_the_list_for_people(run: Run) -> None:
    said = run("families").ok().stdout
    for name in {case.model_type for case in CASES.values()} | set(MULTIMODAL):
        assert re.search(rf"\b{name}\b", said), name
    one = run("families", "falcon", "gemma4_text").ok().stdout
    assert "new_decoder_architecture = true" in one
    assert "inside gemma4" in one
    assert "llama" not in one
    assert "no such_family" in run("families", "such_family").sentence()


def test_layers_without_attention_are_skipped_with_a_word(run: Run, tmp_path: Path) -> None:
    """Jamba here attends in layers 1 and 4; the massive activation emerges in layer 2."""
    folder = more_models.save(CASES["jamba"], tmp_path / "jamba")
    options = ("--check-tokens", "200", "--rate", "0.25", "--force")
    done = run("convert", folder, "--output", tmp_path / "out", *options).ok()
    assert "Skipping layer 3: no attention there to mask" in done.stderr
    changed = run("inspect", tmp_path / "out", "--json").json()
    assert [edit["tensor"] for edit in changed["edits"]] == [
        "model.layers.4.input_layernorm.weight"
    ]
    wrong = run("convert", folder, "--layers", "3", "--output", tmp_path / "other", *options)
    assert "Layer 3 has no attention input to mask" in wrong.sentence()


@pytest.mark.parametrize("name", ["gemma3", "gemma3n_text", "gemma4_text", "bloom", "olmo"])
def test_the_whole_conversion(name: str, run: Run, tmp_path: Path) -> None:
    """Where it has something particular to cope with: several inputs, streams, shared keys."""
    case = CASES[name]
    needs(case)
    if case.from_five and not more_models.FIVE:
        pytest.skip("refused in this release, see test_supported")
    folder = more_models.save(case, tmp_path / "base")
    selected = ("--select", "activation") if name == "olmo" else ()
    done = run(
        *("convert", folder, "--output", tmp_path / "out", "--fold", "sink", "--rate", "0.25"),
        *("--check-tokens", "200", "--calibration-tokens", "1500", "--force", "--json", *selected),
    ).json()
    assert done["verification"]["passed"]
    assert run("verify", tmp_path / "out", "--base", folder, "--json").json()["passed"]
    if selected:
        refused = run("convert", folder, "--output", tmp_path / "other", "--fold", "qkv")
        assert "use --select activation" in refused.sentence()


# --------------------------------------------------------------------------------------------
# A release of transformers that lays a model out differently
# --------------------------------------------------------------------------------------------


def test_another_reader_inside_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    original = LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, *rest = original(self, hidden_states, *args, **kwargs)
        return (output + hidden_states, *rest)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    refuses(tmp_path, r"self_attn reads the attention input through \w*add")


def test_another_reader_of_the_norm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        normed = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(hidden_states=normed, **kwargs)[0] + self.mlp(normed)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    refuses(tmp_path, "disagree about its legality of norm")


def refuses(folder: Path, words: str) -> None:
    base = more_models.save(replace(CASES["llama"], folds=()), folder / "base")
    with pytest.raises(Unsupported, match=words):
        surgery.convert(str(base), layer=1, output=folder / "out")
    assert not (folder / "out").exists()


def test_two_decoders_in_one_checkpoint(tmp_path: Path) -> None:
    """Which of them the model reads cannot be told by names."""
    folder = more_models.save(CASES["llama"], tmp_path / "base")
    other = "language_model.model.layers.0.input_layernorm.weight"
    more_models.add_ignored_tensors(folder, {other: torch.ones(HIDDEN)})
    with pytest.raises(BadCheckpoint, match=r"both at model\.layers and at language_model\.model"):
        examine(surgery.resolve(str(folder)))
