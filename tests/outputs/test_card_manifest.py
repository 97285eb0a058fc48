"""The record of a conversion: complete, portable, and refused when damaged."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import surgery
from surgery.errors import BadCheckpoint, SurgeryError
from surgery.files.checkpoint import Origin
from surgery.files.generated import CARD, FIGURE, LOSS_FIGURE, MANIFEST
from surgery.jobs import verify as review
from surgery.outputs.card import (
    ADAPTER_CARD,
    card_metadata,
    command_line,
    front_matter,
    render_card,
)
from surgery.outputs.manifest import (
    Manifest,
    clean_numbers,
    read_manifest,
    tool_version,
    write_manifest,
)
from surgery.outputs.registry import opened
from surgery.outputs.treatment import Treatment
from surgery.settings import Settings

Tiny = Callable[..., Path]
Run = Callable[..., Any]

QUICK = {"check_tokens": 256, "calibration_tokens": 512}


@pytest.fixture(scope="module")
def converted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`converted(fold=…)`: a checked conversion of the tiny Llama. Not to be changed."""
    known: dict[str, Path] = {}

    def make(family: str = "llama", **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in known:
            target = tmp_path_factory.mktemp("converted") / "out"
            surgery.convert(str(tiny(family)), output=target, **QUICK, **options)
            known[key] = target
        return known[key]

    return make


@pytest.fixture
def converted_copy(converted: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(**options: Any) -> Path:
        target = tmp_path / "copy"
        shutil.copytree(converted(**options), target)
        return target

    return make


def raw(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def metadata_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


# --------------------------------------------------------------------------------------------
# The manifest
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["norm", "qkv", "sink"])
def test_round_trip(fold: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = converted(fold=fold)
    manifest = read_manifest(folder)
    write_manifest(manifest, tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_what_it_says(converted: Callable[..., Path], tiny: Tiny) -> None:
    manifest = read_manifest(converted())
    assert manifest.tool == f"wemask-surgery {tool_version()}"
    assert (manifest.base.kind, manifest.base.name) == ("directory", "tiny-llama")
    assert (manifest.model_type, manifest.hidden_size, manifest.depth) == ("llama", 64, 8)
    assert manifest.emergence is not None
    assert manifest.emergence["layer"] == 3
    assert list(manifest.dimensions) == [4]
    assert len(manifest.dimensions[4]) == 6
    assert [record.tensor for record in manifest.edits] == ["model.layers.4.input_layernorm.weight"]
    assert manifest.settings.rate == 0.1
    assert "device" not in manifest.settings.recorded()  # of no use elsewhere
    assert manifest.quality is not None
    assert [row["name"] for row in manifest.quality["variants"]] == ["base", "reference", "folded"]
    assert manifest.verification is not None
    assert manifest.verification["passed"] is True
    assert {"python", "torch", "numpy", "transformers"} <= set(manifest.versions)
    for record in manifest.files:
        path = converted() / record.name
        assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record.size == path.stat().st_size
    names = {path.name for path in converted().iterdir()}
    assert {record.name for record in manifest.files} == names - {MANIFEST}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_original_gains_undo_the_norm_fold(
    family: str, converted: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    """Written back, they give the base model's file, byte for byte."""
    folder = converted(family)
    manifest = read_manifest(folder)
    checkpoint = surgery.resolve(str(folder))
    undone = tmp_path / "model.safetensors"
    shutil.copyfile(folder / "model.safetensors", undone)
    with safe_open(tiny(family) / "model.safetensors", "np") as base, open(undone, "r+b") as file:
        for record in manifest.edits:
            assert record.original is not None
            original = base64.b64decode(record.original, validate=True)
            assert original == base.get_tensor(record.tensor).tobytes()
            file.seek(checkpoint.tensors[record.tensor].begin)
            file.write(original)
    assert len(manifest.edits) == (2 if family == "gpt2" else 1)
    assert undone.read_bytes() == (tiny(family) / "model.safetensors").read_bytes()
    digest = hashlib.sha256(undone.read_bytes()).hexdigest()
    assert digest == next(r.source_sha256 for r in manifest.files if r.name == undone.name)


@pytest.mark.parametrize("fold", ["qkv", "sink"])
def test_no_originals_of_large_weights(fold: str, converted: Callable[..., Path]) -> None:
    manifest = read_manifest(converted(fold=fold))
    assert len(manifest.edits) == 3
    assert all(record.original is None for record in manifest.edits)


def test_rebuilt_edits_are_the_edits(converted: Callable[..., Path], tiny: Tiny) -> None:
    """The manifest alone gives the written tensors back."""
    base = surgery.resolve(str(tiny()))
    for fold in ("norm", "qkv", "sink"):
        folder = converted(fold=fold)
        written = surgery.resolve(str(folder))
        for edit in read_manifest(folder).rebuilt_edits():
            edited = edit.apply(base.read(edit.tensor), base.tensors[edit.tensor].dtype)
            np.testing.assert_array_equal(edited, written.read(edit.tensor))


@pytest.mark.parametrize(
    ("form", "typed"),
    [
        *(("norm", typed) for typed in ("absolute", "home")),
        *(pytest.param("norm", typed, marks=pytest.mark.full) for typed in ("relative", "above")),
        *((form, "absolute") for form in ("sink", "adapter", "gguf", "gguf-adapter")),
    ],
)
def test_no_path_of_this_machine(
    form: str, typed: str, tiny_copy: Tiny, tmp_path: Path, request: Any, run: Run
) -> None:
    """Whatever was typed, no file that is written names it; the base is found again here."""
    home = tmp_path / "a-home"
    (home / "work").mkdir(parents=True)
    if "gguf" in form:
        from gguf_cut import LAYER

        model = shutil.copy(request.getfixturevalue("small_gguf"), home / "cut.gguf")
        more: list[Any] = ["--layer", LAYER, *(["--as", form] if form != "gguf" else [])]
    else:
        model = tiny_copy().rename(home / "base")
        more = ["--as", "adapter"] if form == "adapter" else []
    more += ["--fold", "norm" if form in ("norm", "gguf") else "sink"]
    text = home / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog by the river bank.\n" * 60)
    start = {"absolute": f"{home}/", "home": "~/", "relative": "", "above": "../"}[typed]
    out = tmp_path / ("out.gguf" if "gguf" in form else "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.chdir(home / "work" if typed == "above" else home)
        run(
            *("convert", f"{start}{model.name}", "-o", out, *more, "--force", "--quiet"),
            *("--calibration", f"{home}/words.txt" if typed == "home" else f"{start}words.txt"),
            *("--check-tokens", 128, "--calibration-tokens", 256),
        ).ok()
        patch.chdir(tmp_path)  # from where nothing that was typed leads to the base
        files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
        for path in files:
            content = path.read_bytes()
            places = [str(tmp_path), str(Path.home()), "a-home", "/tmp/"]
            if path.suffix in (".md", ".json"):  # anything short is somewhere in the weights
                places += ["~/", "../"]
            for place in places:
                found = content.find(place.encode())
                assert found < 0, (path.name, content[max(0, found - 80) : found + 80])
        run("verify", out, "--quiet").ok()
        assert run("reproduce", out, "--json").ok().json()["same"]
    manifest = opened(out)[1]
    assert manifest.base.typed == manifest.settings.model == model.name
    assert manifest.settings.calibration == "words.txt"
    model.rename(tmp_path / "elsewhere")
    if form != "gguf":  # of which the file itself has all
        assert "--base" in run("verify", out, "--quiet").sentence()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": None}, "schema version"),
        ({"files": [{"name": "../x", "size": 1, "sha256": "0"}]}, "outside its folder"),
        ({"files": [{"name": "/etc/passwd", "size": 1, "sha256": "0"}]}, "outside its folder"),
        ({"dimensions": {}}, "names no layer"),
        ({"dimensions": {"4": []}}, "dimensions of layer 4"),
        ({"dimensions": {"4": [64]}}, "dimensions of layer 4"),
        ({"dimensions": {"4": [-1]}}, "dimensions of layer 4"),
        ({"dimensions": {"8": [1]}}, "layer 8 does not exist"),
        ({"strength": 2.0}, "--strength"),
        ({"strength": float("nan")}, "JSON"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"settings": {}}, "settings lack"),
        ({"edits": [{}]}, "edits.0"),
        ({"sinks": {"4": {"center": "*", "detector": "", "leak": {}}}}, "damaged"),
        ({"quality": {"variants": [{}], "tokens": 1, "sequences": 1}}, "variants.0"),
        ({"quality": {"variants": []}}, "damaged"),
        ({"verification": {"checks": [{"name": 1}]}}, "checks.0"),
        ({"emergence": {"layer": "3"}}, "damaged"),
        ({"auto_class": "os, sys"}, "auto_class"),
    ],
)
def test_damaged_in_a_known_place(
    change: dict[str, Any], word: str, converted_copy: Callable[..., Path], run: Run
) -> None:
    folder = converted_copy()
    (folder / MANIFEST).write_text(json.dumps({**raw(folder), **change}))
    with pytest.raises(BadCheckpoint, match=word):
        read_manifest(folder)
    for command in ("inspect", "verify", "card", "reproduce"):
        assert run(command, folder, "--quiet").sentence()


BLOCK = asdict(Treatment())
TRAINING: dict[str, Any] = {
    "recipe": {"name": "r.yaml", "keys": {"surgery": BLOCK}},
    **dict.fromkeys(("steps", "rows", "processes", "trainable"), 1),
    "changed": [],
    "versions": {},
}


def test_the_least_that_is_said_of_a_training(
    converted_copy: Callable[..., Path], run: Run
) -> None:
    """Enough for all that reads it; null is a value that a recipe may give."""
    folder = converted_copy()
    training = copy.deepcopy(TRAINING)
    training["recipe"]["keys"]["datasets"] = training["first_loss"] = None
    (folder / MANIFEST).write_text(json.dumps({**raw(folder), "training": training}))
    assert "r.yaml" in run("inspect", folder).ok().stdout
    run("card", folder).ok()


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ({}, "recipe.name"),
        ({"name": 1, "keys": {"surgery": BLOCK}}, "recipe.name"),
        ({"name": "r"}, "recipe.keys"),
        ({"name": "r", "keys": {}}, "damaged"),
        ({"name": "r", "keys": {"surgery": {}}}, "surgery lacks"),
        ({"name": "r", "keys": {"surgery": {**BLOCK, "method": "x"}}}, "method must be one of"),
        ({"name": "r", "keys": {"surgery": {**BLOCK, "rate": "x"}}}, "rate"),
        ({"name": "r", "keys": {"surgery": BLOCK, "datasets": [1]}}, "damaged"),
        ({"name": "r", "keys": {"surgery": BLOCK, "datasets": [{}]}}, "path"),
    ],
)
def test_damaged_training(
    recipe: dict[str, Any], word: str, converted_copy: Callable[..., Path], run: Run
) -> None:
    folder = converted_copy()
    training = {**TRAINING, "recipe": recipe}
    (folder / MANIFEST).write_text(json.dumps({**raw(folder), "training": training}))
    for command in ("inspect", "verify", "card"):
        assert word in run(command, folder, "--quiet").sentence()


@pytest.mark.parametrize("key", ["tensor", "file", "layer", "kind"])
def test_damaged_edit(key: str, converted_copy: Callable[..., Path], run: Run) -> None:
    folder = converted_copy()
    found = raw(folder)
    for value in ("nothing", 99, None, "model.norm.weight", ["x"]):
        changed = copy.deepcopy(found)
        changed["edits"][0][key] = value
        (folder / MANIFEST).write_text(json.dumps(changed))
        outcome = run("verify", folder, "--quiet")
        if key != "file":  # which is for reading: the base says where a tensor lies
            assert outcome.code in (5, 6, 7)
        if outcome.code:
            outcome.sentence()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 99999, b'{"schema_version": 1}']
)
def test_not_a_manifest(content: bytes, tmp_path: Path, run: Run) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BadCheckpoint):
        read_manifest(tmp_path)
    assert run("inspect", tmp_path, "--quiet").code == 7


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value within JSON data."""
    found = [at] if at else []
    if isinstance(value, dict):
        for key, part in value.items():
            found += paths_in(part, (*at, key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            found += paths_in(part, (*at, number))
    return found


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([10**30, -1, 0.5, 1e308, "", "x", "4", "../x", "\x1b[2J", "\ud800", [], {}]),
    st.text(max_size=5),
    st.floats(),
    st.lists(st.integers(-2, 70), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.parametrize("fold", ["norm", "sink"])
@hypothesis.settings(max_examples=60)
@given(data=st.data())
def test_any_damage(
    fold: str,
    data: st.DataObject,
    converted: Callable[..., Path],
    tiny: Tiny,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """One value is wrong or gone: all that reads manifests works, or says so in one sentence."""
    folder = converted(fold=fold)
    found = raw(folder)
    where = data.draw(st.sampled_from(paths_in(found)), label="place")
    holder: Any = found
    for key in where[:-1]:
        holder = holder[key]
    if data.draw(st.booleans(), label="gone"):
        del holder[where[-1]]
    else:
        holder[where[-1]] = data.draw(WRONG, label="value")
    target = tmp_path_factory.getbasetemp() / f"damaged-{fold}"
    if not target.exists():
        shutil.copytree(folder, target)
    (target / MANIFEST).write_text(json.dumps(found))
    try:
        manifest = read_manifest(target)
    except BadCheckpoint:
        return
    # What was read can be used, whether or not it is true.
    render_card(manifest, {}, figure=True)
    command_line(manifest.settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.outputs.folder.behaviour", lambda *_args: [])  # what takes time
        try:
            review.verify(target, base=str(tiny()))
        except SurgeryError:
            return


def test_verification_notices_every_false_statement_about_bytes(
    converted_copy: Callable[..., Path],
) -> None:
    """Not all of a manifest can be checked; what it says of dimensions and bytes is."""
    folder = converted_copy(fold="sink")
    true = raw(folder)
    changes: list[Callable[[dict[str, Any]], None]] = [
        lambda m: m["dimensions"]["4"].__setitem__(0, m["dimensions"]["4"][0] ^ 1),
        lambda m: m.__setitem__("strength", 0.5),
        lambda m: m["edits"].pop(),
        lambda m: m["files"][0].__setitem__("sha256", "0" * 64),
        lambda m: m["sinks"]["4"].__setitem__(
            "detector", "AACAPw" + m["sinks"]["4"]["detector"][6:]
        ),
    ]
    assert surgery.verify(folder).passed
    for change in changes:
        found = copy.deepcopy(true)
        change(found)
        (folder / MANIFEST).write_text(json.dumps(found))
        assert not surgery.verify(folder).passed


def test_clean_numbers() -> None:
    value = {"a": [1, float("nan"), (float("inf"), 2.5)], "b": None, "c": "x"}
    assert clean_numbers(value) == {"a": [1, None, [None, 2.5]], "b": None, "c": "x"}


# --------------------------------------------------------------------------------------------
# The card
# --------------------------------------------------------------------------------------------


def test_metadata_is_inherited(converted: Callable[..., Path]) -> None:
    found = metadata_of((converted() / CARD).read_text(encoding="utf-8"))
    assert found["license"] == "apache-2.0"
    assert found["language"] == ["en"]
    assert found["tags"] == [
        "text-generation",
        "llama",
        "test-fixture",
        "wemask",
        "surgery",
        "massive-activations",
    ]
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "model-index" not in found


def manifest_of(folder: Path, **origin: Any) -> Manifest:
    manifest = read_manifest(folder)
    return replace(manifest, base=Origin(**{**vars(manifest.base), **origin}))


@pytest.mark.parametrize(
    ("origin", "base", "expected"),
    [
        ({"kind": "hub", "name": "Qwen/Qwen3-4B"}, {}, "Qwen/Qwen3-4B"),
        ({"kind": "hub", "name": "gpt2"}, {"base_model": "other/one"}, "gpt2"),
        ({"kind": "gguf", "note": "Some/Model (MIT), as a GGUF"}, {}, "Some/Model"),
        ({}, {"base_model": "some/base"}, "some/base"),
        ({}, {"base_model": ["two", "of them"]}, None),
        ({}, {}, None),
    ],
)
def test_base_model(
    origin: dict[str, str],
    base: dict[str, Any],
    expected: str | None,
    converted: Callable[..., Path],
) -> None:
    found = card_metadata(manifest_of(converted(), **origin), base)
    assert found.get("base_model") == expected
    assert found.get("base_model_relation") == ("finetune" if expected else None)


def test_only_true_metadata_is_inherited(converted: Callable[..., Path]) -> None:
    base = {
        "license": "other",
        "license_name": "custom",
        "license_link": "LICENSE",
        "model-index": [{"name": "x"}],
        "metrics": ["accuracy"],
        "widget": [{"text": "x"}],
        "base_model_relation": "quantized",
        "tags": "not a list",
        "datasets": ["a/b"],
        "library_name": "mlx",
    }
    found = card_metadata(read_manifest(converted()), base)
    for key in ("license", "license_name", "license_link", "datasets"):
        assert found[key] == base[key]
    assert {"model-index", "metrics", "widget", "base_model_relation"}.isdisjoint(found)
    assert found["library_name"] == "transformers"
    assert found["tags"] == ["wemask", "surgery", "massive-activations"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# Title\n", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n# Title\r\n", {"license": "mit"}),
        ("# Title\n", {}),
        ("", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", {}),
        ("---\nlanguage:\n- no\n- en\n---\n", {"language": ["no", "en"]}),
        ("---\nlanguage: no\ninference: false\n---\n", {"language": "no", "inference": False}),
        ("---\nlicense: mit\ndate: 2024-13-45\n---\n", {"license": "mit", "date": "2024-13-45"}),
        ("---\nlicense: mit\n", {"license": "mit"}),
        ("\n\n---\nlicense: mit\n---\n", {"license": "mit"}),
        (" \t\r\n---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("\ufeff---\nlicense: mit\n---\n", {"license": "mit"}),
        ("\ufeff\n---\nlicense: mit\n---\n", {"license": "mit"}),
        (
            "---\nlicense: &l mit\nlicense_name: *l\n---\n",
            {"license": "mit", "license_name": "mit"},
        ),
        ("---\nlicense: other\ntags: [a]\nlicense: mit\n---\n", {"license": "mit", "tags": ["a"]}),
        ("---\nx: &a [1]\ny: [*a, *a]\n---\n", {"x": [1], "y": [[1], [1]]}),
    ],
)
def test_front_matter(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(text.encode())
    assert front_matter(tmp_path / CARD) == expected


def test_no_front_matter(tmp_path: Path) -> None:
    assert front_matter(tmp_path / CARD) == {}
    (tmp_path / CARD).write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert set(front_matter(tmp_path / CARD)) <= {"license"}


def test_the_cards_code_loads_the_model(tiny: Tiny, tmp_path: Path) -> None:
    """A model of images and text has another class than one of text alone."""
    import more_models

    case = more_models.CASES["qwen2_vl"]
    multimodal = more_models.save(case, tmp_path / "base")
    for base, layer, expected in (
        (multimodal, case.layer, "Qwen2VLForConditionalGeneration"),
        (tiny("llama"), 3, "LlamaForCausalLM"),
    ):
        out = tmp_path / expected
        surgery.convert(str(base), layer=layer, check=False, output=out)
        code = re.search(r"```python\n(.*?)```", (out / CARD).read_text(), re.DOTALL)
        assert code is not None
        loaded: dict[str, Any] = {}
        exec(re.sub(r'"path/to/[^"]*"', repr(str(out)), code[1]), loaded)
        assert type(loaded["model"]).__name__ == expected
    older = raw(out)
    del older["auto_class"]
    (out / MANIFEST).write_text(json.dumps(older))
    assert "AutoModelForCausalLM" in render_card(read_manifest(out), {}, figure=False)
    plain = read_manifest(tmp_path / "Qwen2VLForConditionalGeneration")
    card = render_card(plain, {}, ADAPTER_CARD, figure=False)
    assert "base = AutoModelForImageTextToText." in card


def test_norwegian_stays_norwegian(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy()
    (folder / CARD).write_text("---\nlicense: mit\nlanguage:\n- no\n- nb\n---\n")
    surgery.convert(str(folder), layer=3, check=False, output=tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert metadata_of(card)["language"] == ["no", "nb"]
    assert "false" not in card.split("---\n")[1]


@pytest.mark.parametrize("fold", ["norm", "qkv", "sink"])
def test_figures_are_the_manifests(fold: str, converted: Callable[..., Path]) -> None:
    folder = converted(fold=fold)
    card, manifest = (folder / CARD).read_text(encoding="utf-8"), read_manifest(folder)
    assert manifest.quality is not None
    for row in manifest.quality["variants"]:
        assert f"{row['perplexity']:.4g}" in card
    assert "layer 3" in card
    assert "6 of the 64 dimensions" in card
    assert f"The `{fold}` fold" in card
    assert ("every token" in card) == (fold != "sink")
    assert ("Leak of the sink detector" in card) == (fold == "sink")
    assert ("holds the original values" in card) == (fold == "norm")
    assert "nan" not in card.lower().replace("finance", "")
    assert "None" not in card
    assert "{{" not in card
    assert "{%" not in card
    assert "float32" in card
    assert f"![Norms by layer]({FIGURE})" in card
    assert (folder / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"\n{4,}", card)


def test_the_command_of_the_card_repeats_the_conversion(
    tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the base lies, whose name alone it says."""
    import shlex

    folder, first = tiny(), tmp_path / "first"
    monkeypatch.chdir(folder.parent)
    words = (
        *("convert", folder, "--rate", "0.25", "--scope", "all", "--fold", "sink", "--seed", "3"),
        *("--select", "random", "--strength", "0.5", "--check-tokens", "200"),
        *("--calibration-tokens", "600", "--max-degradation", "5"),
    )
    run(*words, "-o", first, "--quiet").ok()
    command = command_line(read_manifest(first).settings)
    assert command in (first / CARD).read_text()
    program, *rest = shlex.split(command)
    assert program == "surgery"
    with pytest.MonkeyPatch.context() as patch:  # the card names no path
        patch.chdir(folder.parent)
        run(*rest, "-o", tmp_path / "second", "--quiet").ok()
    for path in first.iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name


def test_command_line_is_safe_to_paste() -> None:
    command = command_line(Settings("x; rm -rf ~", revision="$(id)"))
    assert "'x; rm -rf ~'" in command
    assert "'$(id)'" in command


def test_no_check_is_admitted(tiny: Tiny, tmp_path: Path) -> None:
    surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert "Nothing was measured" in card
    assert "given by the user" in card
    assert "perplexity |" not in card
    assert "--no-check" in card
    assert not (tmp_path / "out" / FIGURE).exists()
    assert FIGURE not in card


@pytest.mark.parametrize("drawn", [True, False])
def test_a_loss_figure_is_shown_where_it_is(
    drawn: bool, converted_copy: Callable[..., Path], run: Run
) -> None:
    """Of a training that logged no loss there is none."""
    folder = converted_copy()
    (folder / MANIFEST).write_text(json.dumps({**raw(folder), "training": TRAINING}))
    if drawn:
        (folder / LOSS_FIGURE).write_bytes((folder / FIGURE).read_bytes())
    run("card", folder).ok()
    assert (LOSS_FIGURE in (folder / CARD).read_text(encoding="utf-8")) == drawn


def test_the_returned_manifest_is_the_one_in_the_file(
    tiny: Tiny, small_gguf: Path, tmp_path: Path
) -> None:
    from gguf_cut import LAYER

    for form, model, more in (
        ("checkpoint", tiny(), {}),
        ("adapter", tiny(), {"fold": "sink"}),
        ("gguf", small_gguf, {"layer": LAYER}),
        ("gguf-adapter", small_gguf, {"layer": LAYER, "fold": "sink"}),
    ):
        out = tmp_path / (f"{form}.gguf" if "gguf" in form else form)
        given = {"form": form} if "adapter" in form else {}
        made = surgery.convert(str(model), output=out, force=True, **QUICK, **more, **given)
        assert made.verification is not None
        assert made.verification.passed
        assert made.manifest == opened(out)[1], form


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_other_strengths(strength: float, converted: Callable[..., Path]) -> None:
    folder = converted(strength=strength)
    card = (folder / CARD).read_text()
    manifest = read_manifest(folder)
    assert f"weakened by a strength of {strength:g}" in card
    assert manifest.strength == strength
    assert len(manifest.edits) == (0 if strength == 0 else 1)
    assert ("No tensor of the base model was changed" in card) == (strength == 0)


def test_given_layers(tiny: Tiny, tmp_path: Path) -> None:
    surgery.convert(str(tiny()), layers=(2, 4, 5), check=False, fold="qkv", output=tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert "In layers 2, 4, 5, 6 of the 64" in card
    assert "target layers were given by the user" in card
