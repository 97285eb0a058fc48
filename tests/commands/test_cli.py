"""The command line: help, silence, JSON, one sentence for every mistake, exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from script import run as run_program

import surgery
from surgery import errors
from surgery.commands import _COMMANDS
from surgery.files.generated import CARD, FIGURE, MANIFEST
from surgery.files.weights import SINGLE

Tiny = Callable[..., Path]
Run = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, bytes | None]]

QUICK = ("--check-tokens", "256", "--calibration-tokens", "512")


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checked conversion of the tiny Llama. Not to be changed."""
    target = tmp_path_factory.mktemp("finished") / "out"
    surgery.convert(str(tiny()), output=target, check_tokens=256, calibration_tokens=512)
    return target


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


# --------------------------------------------------------------------------------------------
# Help, and how little is imported for it
# --------------------------------------------------------------------------------------------


def test_help_names_every_command(run: Run) -> None:
    for flag in ("--help", "-h"):
        text = run(flag).ok().stdout
        for name, line in _COMMANDS.items():
            assert f"  {name} " in text
            assert line[:30] in text


@pytest.mark.parametrize("name", list(_COMMANDS))
def test_help_of_each_command(name: str, run: Run) -> None:
    outcome = run(name, "--help").ok()
    assert outcome.stdout.startswith(f"Usage: surgery {name} ")
    assert "--json" in outcome.stdout
    assert "--quiet" in outcome.stdout
    assert outcome.stderr == ""
    # What the list of commands says is what the command says.
    first = outcome.stdout.split("\n\n")[1]
    words = _COMMANDS[name].rstrip(".").split()
    assert len(set(words) & set(first.replace(",", " ").replace(".", " ").split())) >= 3


def test_version(run: Run, shell: Run) -> None:
    from importlib import metadata

    expected = f"surgery {metadata.version('wemask-surgery')}\n"
    assert run("--version").ok().stdout == expected
    assert shell("--version").ok().stdout == expected


def test_unknown_command(shell: Run) -> None:
    outcome = shell("operate")
    assert outcome.code == 2
    assert "No such command" in outcome.stderr
    assert "Traceback" not in outcome.stderr


HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "rich", "yaml", "matplotlib")
HEAVY += ("pydantic",)


@pytest.mark.parametrize(
    ("calls", "absent"),
    [
        ([["--help"]], HEAVY),
        ([["--version"]], ("torch", "transformers", "huggingface_hub")),
        # What none of them imports in one process, each imports in none.
        ([[name, "--help"] for name in _COMMANDS], ("torch", "transformers")),
    ],
    ids=["help", "version", "help of each command"],
)
def test_help_imports_little(calls: list[list[str]], absent: tuple[str, ...], python: Run) -> None:
    code = (
        "import sys\n"
        "from surgery.__main__ import main\n"
        f"for words in {calls!r}:\n"
        "    sys.argv = ['surgery', *words]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "    else:\n"
        "        raise AssertionError(words)\n"
        f"print([name for name in {absent!r} if name in sys.modules])\n"
    )
    assert python("-c", code).ok().stdout.splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing_heavy(python: Run) -> None:
    code = f"import sys, surgery; print([n for n in {HEAVY!r} if n in sys.modules])"
    assert python("-c", code).ok().stdout == "[]\n"
    assert set(dir(surgery)) >= {"__all__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        surgery.nothing  # noqa: B018
    for name in surgery.__all__:
        assert getattr(surgery, name) is not None


def test_unchecked_conversion_imports_no_torch(tiny: Tiny, tmp_path: Path, python: Run) -> None:
    """A change of a few kilobytes should not cost the seconds that torch takes to load."""
    code = (
        "import sys\n"
        "from surgery.commands import cli\n"
        f"words = ['convert', {str(tiny())!r}, '--layer', '3', '--no-check', '--quiet']\n"
        f"cli([*words, '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "print([n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])\n"
    )
    assert python("-c", code).ok().stdout == "[]\n"
    assert (tmp_path / "out" / MANIFEST).is_file()


# --------------------------------------------------------------------------------------------
# What is printed
# --------------------------------------------------------------------------------------------


def test_dry_run(tiny: Tiny, tmp_path: Path, run: Run, snapshot: Snapshot) -> None:
    words = ("convert", tiny(), "--layer", 3, "--dry-run", "-o", tmp_path / "a" / "out")
    before = snapshot(tiny())
    text = run(*words).ok().stdout
    for part in ("1 gain edit in layer 4", str(tmp_path / "a" / "out"), "1 of 75", SINGLE):
        assert part in text
    assert "nothing was written" in text
    plan = run(*words, "--json").ok().json()
    assert plan["written"] is False
    assert plan["quality"] is None
    assert plan["target_layers"] == [4]
    assert plan["dimensions_per_layer"] == 6
    assert plan["plan"]["tensors_edited"][0]["tensor"] == "model.layers.4.input_layernorm.weight"
    assert run(*words, "--quiet").ok().stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert snapshot(tiny()) == before


def test_default_output(
    tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("convert", tiny(), "--no-check", "--quiet")
    run(*words, "--layer", 3).ok()
    run(*words, "--layer", 3, "--rate", 0.25, "--scope", "all", "--fold", "qkv").ok()
    run(*words, "--layers", "4,6-7", "--select", "random", "--strength", 0.5).ok()
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny-llama-wemask-norm-first-0.1",
        "tiny-llama-wemask-qkv-all-0.25",
        "tiny-llama-wemask-norm-layers4+6+7-0.1-random-strength0.5",
    }


def test_convert_tells_what_it_does(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    outcome = run("convert", tiny(), "-o", tmp_path / "out", *QUICK).ok()
    for part in (
        "← ME Layer",
        "Massive Emergence Layer 3 (counted from 0)",
        "confidence high",
        "1 gain edit in layer 4",
        "paper's reference",
        "folded weights",
        "bit-equal in float32",
        f"Written {tmp_path / 'out'}",
    ):
        assert part in outcome.stdout, part
    assert "✗" not in outcome.stdout
    assert "Loading tiny-llama" in outcome.stderr


JSON_COMMANDS = ["analyze", "convert", "verify", "inspect", "card", "reproduce"]
full = pytest.mark.full
HERE = [(name, False) for name in JSON_COMMANDS]
# Where libraries could add a word of their own that a test in this process would not see; in every
# run that is seen in the conversion of test_package.py.
IN_A_SHELL = [pytest.param(name, True, marks=full) for name in ("convert", "verify")]


def words_of(name: str, tiny: Tiny, output: Path, tmp_path: Path) -> tuple[Any, ...]:
    if name == "analyze":
        return (name, tiny())
    if name == "convert":
        return (name, tiny(), "-o", tmp_path / "new", *QUICK)
    return (name, output)


@pytest.mark.parametrize(("name", "in_a_shell"), [*HERE, *IN_A_SHELL])
def test_json_is_one_object_and_nothing_else(
    name: str, in_a_shell: bool, tiny: Tiny, output: Path, tmp_path: Path, run: Run, shell: Run
) -> None:
    call = shell if in_a_shell else run
    outcome = call(*words_of(name, tiny, output, tmp_path), "--json").ok()
    found = outcome.json()
    assert outcome.stderr == ""
    assert outcome.stdout.isascii()
    assert found
    if name == "analyze":
        assert found["emergence"]["layer"] == 3
    if name == "convert":
        assert found["emergence_layer"] == 3
        assert found["written"] is True
        assert found["verification"]["passed"] is True
        assert [row["name"] for row in found["quality"]["variants"]] == [
            "base",
            "reference",
            "folded",
        ]
        assert found["quality"]["variants"][0]["kl_from_reference"] > 0
    if name == "verify":
        assert found["passed"] is True
        assert len(found["checks"]) == 8
    if name == "inspect":
        assert found == json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    if name == "reproduce":
        assert found["same"] is True


@pytest.mark.parametrize(("name", "in_a_shell"), [*HERE, *IN_A_SHELL])
def test_quiet_prints_nothing(
    name: str, in_a_shell: bool, tiny: Tiny, output: Path, tmp_path: Path, run: Run, shell: Run
) -> None:
    call = shell if in_a_shell else run
    outcome = call(*words_of(name, tiny, output, tmp_path), "--quiet").ok()
    assert (outcome.stdout, outcome.stderr) == ("", "")


# --------------------------------------------------------------------------------------------
# Mistakes
# --------------------------------------------------------------------------------------------


def changed_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def without(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def text_file(folder: Path, content: str, name: str = "text.txt") -> Path:
    path = folder.parent / name
    path.write_text(content, encoding="utf-8")
    return path


# Each: what is wrong, the words after `convert` (a function of a copy of the tiny Llama), the
# exit code, and a part of the sentence.
MISTAKES: list[tuple[str, Callable[[Path], tuple[Any, ...]], int, str]] = [
    ("no such folder", lambda f: (f / "nothing",), 7, "neither an existing folder"),
    ("a file", lambda f: (f / SINGLE,), 7, "give a checkpoint folder"),
    ("an empty folder", lambda f: (without(f, "*"),), 7, "no config.json"),
    ("no weights", lambda f: (without(f, "*.safetensors"),), 7, "holds no model.safetensors"),
    ("rate 0", lambda f: (f, "--rate", 0), 2, "--rate must lie between 0 and 1"),
    ("rate 1", lambda f: (f, "--rate", 1), 2, "--rate must lie between 0 and 1"),
    ("rate nan", lambda f: (f, "--rate", "nan"), 2, "--rate must lie between 0 and 1"),
    ("rate negative", lambda f: (f, "--rate", -0.1), 2, "--rate must lie between 0 and 1"),
    ("rate masks nothing", lambda f: (f, "--rate", 0.01), 2, "hidden size of 64; use at least"),
    ("rate tiny", lambda f: (f, "--rate", 1e-12), 2, "hidden size of 64"),
    ("strength 2", lambda f: (f, "--strength", 2), 2, "--strength must lie between"),
    ("strength nan", lambda f: (f, "--strength", "nan"), 2, "--strength must lie between"),
    ("layer too large", lambda f: (f, "--layer", 8), 2, "--layer 8"),
    ("the last layer", lambda f: (f, "--layer", 7), 2, "not a layer with one after it"),
    ("layer negative", lambda f: (f, "--layer", -1), 2, "--layer -1"),
    ("layers too large", lambda f: (f, "--layers", "3,8"), 2, "--layers names 8"),
    ("layer and layers", lambda f: (f, "--layer", 3, "--layers", 4), 2, "not both"),
    ("seed negative", lambda f: (f, "--select", "random", "--seed", -1), 2, "--seed"),
    ("check tokens 0", lambda f: (f, "--check-tokens", 0), 2, "--check-tokens"),
    ("limit negative", lambda f: (f, "--max-degradation", -1), 2, "--max-degradation"),
    ("limit infinite", lambda f: (f, "--max-degradation", "inf"), 2, "give --force"),
    ("unknown device", lambda f: (f, "--device", "abacus"), 2, "device 'abacus' cannot be used"),
    ("meta device", lambda f: (f, "--device", "meta"), 2, "device 'meta' cannot be used"),
    (
        "no such calibration file",
        lambda f: (f, "--calibration", f / "nothing.txt"),
        2,
        "cannot be read",
    ),
    (
        "an empty calibration file",
        lambda f: (f, "--calibration", text_file(f, " \n")),
        2,
        "holds no text",
    ),
    (
        "too short a calibration file",
        lambda f: (f, "--calibration", text_file(f, "Hm.")),
        2,
        "too short",
    ),
    (
        "binary calibration",
        lambda f: (f, "--calibration", f / SINGLE),
        2,
        "cannot be read",
    ),
    (
        "calibration of something else",
        lambda f: (f, "--calibration", text_file(f, '{"text": "x"}\n[1]\n', "x.jsonl")),
        2,
        "line 2: expected a JSON object",
    ),
    ("revision of a folder", lambda f: (f, "--revision", "main"), 2, "no revisions"),
    (
        "quantised",
        lambda f: (changed_config(f, quantization_config={"quant_method": "gptq"}),),
        7,
        "quantised (gptq), but none is stored that way",
    ),
    (
        "code of its own",
        lambda f: (changed_config(f, auto_map={"AutoModelForCausalLM": "evil.Model"}),),
        2,
        "brings its own Python code",
    ),
    (
        "code of its own that is missing",
        lambda f: (
            changed_config(f, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
            "--trust-remote-code",
        ),
        6,
        "cannot build",
    ),
    ("unknown architecture", lambda f: (changed_config(f, model_type="alien"),), 6, "alien"),
    (
        "a name with terminal escapes",
        lambda f: (changed_config(f, model_type="\x1b[2J\nError: all is well"),),
        6,
        r"\x1b[2J",
    ),
    (
        "no tokenizer",
        lambda f: (without(f, "tokenizer*", "special_tokens*"),),
        7,
        "tokenizer in",
    ),
    (
        "a damaged tokenizer",
        lambda f: ([(f / "tokenizer.json").write_text("{"), f][1],),
        7,
        "tokenizer in",
    ),
    (
        "weights of another size",
        lambda f: (changed_config(f, intermediate_size=7),),
        7,
        "is stored with the shape",
    ),
    (
        "a missing weight",
        lambda f: (with_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),),
        7,
        "lacks weights the model needs, such as model.layers.1.mlp.up_proj.weight",
    ),
    (
        "not a number somewhere",
        lambda f: (
            with_tensors(f, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))),
        ),
        7,
        "model.layers.1.mlp.up_proj.weight holds values that are not finite",
    ),
    (
        "quantised gains",
        lambda f: (
            with_tensors(
                f,
                lambda t: t.update(
                    {
                        "model.layers.4.input_layernorm.weight": torch.ones(64, dtype=torch.int8),
                    }
                ),
            ),
            "--no-check",
            "--layer",
            3,
        ),
        6,
        "convert the unquantised",
    ),
]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [mistake[1:] for mistake in MISTAKES],
    ids=[mistake[0] for mistake in MISTAKES],
)
def test_mistake(
    words: Callable[[Path], tuple[Any, ...]],
    code: int,
    part: str,
    tiny_copy: Tiny,
    tmp_path: Path,
    run: Run,
) -> None:
    """One sentence, its own exit code, and nothing written."""
    outcome = run("convert", *words(tiny_copy()), "-o", tmp_path / "out", "--quiet")
    assert part in outcome.sentence()
    assert outcome.code == code
    assert outcome.stdout == ""
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_mistakes_in_a_shell(tiny: Tiny, tmp_path: Path, shell: Run) -> None:
    """The same in a process of its own, where nobody catches what we forgot."""
    words = ("convert", tiny(), "-o", tmp_path / "out", "--rate", 7)
    outcome = shell(*words)
    assert outcome.code == 2
    assert outcome.sentence().startswith("Error: --rate must lie")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("convert",),
        ("convert", "x", "--scope", "some"),
        ("convert", "x", "--fold", "origami"),
        ("convert", "x", "--rate", "much"),
        ("convert", "x", "--layers", "4,x"),
        ("convert", "x", "--layers", ""),
        ("convert", "x", "--layers", "9-3"),
        ("convert", "x", "--layers", "0-99999999999"),
        ("convert", "x", "--layers", "-1"),
        ("convert", "x", "--dtype", "int8"),
        ("convert", "x", "--no-such-option"),
        ("verify",),
        ("push", "x"),
    ],
)
def test_usage(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    """What click itself notices: its usual three lines, exit code 2."""
    outcome = run(*words)
    assert outcome.code == 2
    assert outcome.stderr.startswith("Usage: surgery ")
    assert "Error: " in outcome.stderr
    assert outcome.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "layers"),
    [("7", [7]), ("5,3", [3, 5]), ("4-6,6", [4, 5, 6]), ("2-2", [2])],
)
def test_layers(text: str, layers: list[int], tiny: Tiny, tmp_path: Path, run: Run) -> None:
    words = ("convert", tiny(), "--layers", text, "--no-check", "--dry-run", "--json")
    assert run(*words, "-o", tmp_path / "out").ok().json()["target_layers"] == layers


@pytest.mark.parametrize("command", ["verify", "inspect", "card", "reproduce", "push"])
def test_not_a_conversion(command: str, tiny: Tiny, tmp_path: Path, run: Run) -> None:
    rest = ("me/x",) if command == "push" else ()
    for folder in (tiny(), tmp_path, tmp_path / "nothing", tiny() / SINGLE):
        outcome = run(command, folder, *rest, "--quiet")
        assert outcome.code == 7
        expected = "surgery did not write it" if folder.exists() else "does not exist"
        assert expected in outcome.sentence()


def test_output_exists(output: Path, tiny: Tiny, run: Run, snapshot: Snapshot) -> None:
    before = snapshot(output)
    outcome = run("convert", tiny(), "-o", output, "--quiet")
    assert outcome.code == 2
    assert "exists already; give --overwrite" in outcome.sentence()
    assert snapshot(output) == before
    words = ("convert", tiny(), "-o", output, "--layer", 3, "--no-check", "--rate", 0.5)
    run(*words, "--overwrite", "--quiet").ok()
    assert json.loads((output / MANIFEST).read_text())["settings"]["rate"] == 0.5


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_a_plot_that_cannot_be_drawn(
    command: str, tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [tiny()] * (2 if command == "compare" else 1)
    for path in (tmp_path / "nothing" / "x.png", tmp_path / "x.docx", "x.jpg", "x", ".png", ""):
        outcome = run(command, *models, "--plot", path, "--quiet")
        assert outcome.code == 2
        outcome.sentence()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("repo", ["a/b/c", "", "/", "a b/c"])
def test_a_repository_that_is_none(repo: str, tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """Said before anything is written."""
    words = ("convert", tiny(), *("--layer", 3, "--no-check", "--quiet"), "-o", tmp_path / "out")
    outcome = run(*words, "--push-to-hub", repo)
    assert outcome.code == 2
    assert "is not a Hub repository" in outcome.sentence()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [300, 241])
def test_an_output_with_a_name_too_long(length: int, tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """A dry run says what the real one would; one character less is written."""
    words = ("convert", tiny(), *("--layer", 3, "--no-check", "--quiet"), "-o")
    for more in ([], ["--dry-run"]):
        outcome = run(*words, tmp_path / ("x" * length), *more)
        assert outcome.code == 2
        assert "is too long" in outcome.sentence()
    assert list(tmp_path.iterdir()) == []
    run(*words, tmp_path / ("x" * 240)).ok()


def test_long_errors_are_cut(tiny_copy: Tiny, run: Run) -> None:
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "x" * 100_000}))
    assert len(run("analyze", folder, "--quiet").sentence()) < 1100


def test_names_are_no_emoji(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "a:bug:b"
    told = run("convert", tiny(), "--layer", 3, "--no-check", "-o", output).ok()
    assert "a:bug:b" in told.stdout + run("inspect", output).ok().stdout
    assert "\N{BUG}" not in told.stdout + told.stderr + run("inspect", output).stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_with_few_characters(
    encoding: str, tiny: Tiny, tmp_path: Path, shell: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    shell("families", encoding=encoding).ok()
    words = ("--layer", 3, "--no-check", "-o", tmp_path / "out")
    assert "Written" in shell("convert", tiny(), *words, encoding=encoding).ok().stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", ["--help", "--version", "families", "inspect --help"])
def test_a_full_disk_behind_stdout(words: str) -> None:
    done = run_program(
        "bash", "-c", f'"{sys.executable}" -m surgery {words} > /dev/full', timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == "Error: No space left on device.\n"


def test_plot(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    run("analyze", tiny(), "--plot", tmp_path / "x.png", "--quiet").ok()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_short_contexts(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """Learned positions end somewhere; no text is longer."""
    folder = tiny("gpt2", max_position_embeddings=48)
    for fold in ("norm", "sink"):
        words = ("convert", folder, "--fold", fold, "-o", tmp_path / fold, "--quiet", *QUICK)
        run(*words, "--max-degradation", 5).ok()
        run("verify", tmp_path / fold, "--quiet").ok()


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(KeyboardInterrupt, 130, "Interrupted"), (errors.Terminated, 143, "Terminated")],
    ids=["INT", "TERM"],
)
def test_interrupted(
    error: type[BaseException],
    code: int,
    word: str,
    tiny: Tiny,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by the handlers of the two signals, of which tests/faults sends real ones."""

    def interrupt(*_args: Any) -> Any:
        raise error

    monkeypatch.setattr("surgery.outputs.folder.copy_plan", interrupt)
    words = ("convert", tiny(), "--layer", 3, "--no-check", "-o", tmp_path / "out", "--quiet")
    outcome = run(*words)
    assert outcome.code == code
    assert outcome.stderr == f"{word}; nothing was left behind.\n"
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe(finished: Path) -> None:
    command = f'"{sys.executable}" -m surgery inspect "{finished}" --json | head -n 1'
    done = run_program("bash", "-c", command, timeout=60)
    assert done.stdout == "{\n"
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["convert", "verify", "inspect"])
def test_terminal_escapes_are_neutralised(
    command: str, tiny_copy: Tiny, tmp_path: Path, run: Run
) -> None:
    """Names in a stranger's checkpoint are shown, not obeyed: neither by the terminal nor rich."""
    folder = tiny_copy()
    evil = "evil\x1b]0;owned\x07\x9b2J\u202e[bold red]name\r\n"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[evil] = torch.ones(2)

    with_tensors(folder, add)
    (folder / "pytorch_model\x1b[2J.bin").write_bytes(b"")
    output = tmp_path / "out"
    outcomes = [run("convert", folder, "--layer", 3, "--no-check", "-o", output).ok()]
    assert r"pytorch_model\x1b[2J.bin" in outcomes[0].stdout
    if command == "inspect":
        manifest = json.loads((output / MANIFEST).read_text())
        manifest["base"]["name"] = evil
        manifest["settings"]["model"] = evil
        (output / MANIFEST).write_text(json.dumps(manifest))
        outcomes.append(run("inspect", output).ok())
        assert r"evil\x1b]0;owned\x07\x9b2J\u202e[bold red]name" in outcomes[1].stdout
    if command == "verify":
        written = load_file(output / SINGLE)
        del written[evil]
        save_file(written, output / SINGLE, metadata={"format": "pt"})
        outcomes.append(run("verify", output))
        assert outcomes[1].code == 5
        assert r"\x1b]0;owned" in outcomes[1].stdout
    for outcome in outcomes:
        for text in (outcome.stdout, outcome.stderr):
            assert not any(c in text for c in "\x1b\x07\x9b\u202e\r")


# --------------------------------------------------------------------------------------------
# Emergence and quality
# --------------------------------------------------------------------------------------------


def test_no_emergence(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    folder, output = tiny(planted=False), tmp_path / "out"
    for words in (("convert", folder, "-o", output), ("analyze", folder)):
        outcome = run(*words, "--quiet")
        assert outcome.code == errors.NoEmergence.exit_code == 3
        assert "no Massive Emergence Layer found" in outcome.sentence()
        assert "--layer" in outcome.sentence()
        assert not output.exists()
    outcome = run("analyze", folder, "--json")
    assert outcome.code == 3
    assert outcome.json()["emergence"]["layer"] is None
    run("convert", folder, "--layer", 3, "-o", output, "--quiet", "--max-degradation", 9).ok()
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["emergence"]["found_by"] == "given"


def test_sink_fold_needs_a_sink(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    words = ("convert", tiny(planted=False), "--layer", 3, "--fold", "sink", *QUICK)
    outcome = run(*words, "-o", tmp_path / "out", "--quiet")
    assert outcome.code == 3
    assert "the first token is not massive" in outcome.sentence()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hurt(tiny: Tiny) -> tuple[Any, ...]:
    """Words of a conversion that makes the model worse than allowed.

    A random model has nothing to lose, so nothing at all is allowed: with the seed chosen here
    the folded model is a little worse than its base.
    """
    return ("convert", tiny("llama", seed=1), "--max-degradation", 0, "--rate", 0.5, *QUICK)


def test_quality_gate(hurt: tuple[Any, ...], tmp_path: Path, run: Run) -> None:
    outcome = run(*hurt, "-o", tmp_path / "out", "--quiet")
    assert outcome.code == errors.QualityGate.exit_code == 4
    sentence = outcome.sentence()
    for part in ("norm fold raises perplexity", "allowed +0.0%", "nothing was written", "--force"):
        assert part in sentence
    assert list(tmp_path.iterdir()) == []


def test_forced(hurt: tuple[Any, ...], tmp_path: Path, run: Run) -> None:
    run(*hurt, "--force", "-o", tmp_path / "out", "--quiet").ok()
    card = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert "exceeds the allowed rise in perplexity" in card
    assert "--force" in card
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["quality"]["forced"] is True
    run("verify", tmp_path / "out", "--quiet").ok()


def test_force_where_none_is_needed(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    words = ("convert", tiny(), "--max-degradation", 9, "--force", *QUICK)
    run(*words, "-o", tmp_path / "out", "--quiet").ok()
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["quality"]["forced"] is False
    assert "exceeds" not in (tmp_path / "out" / CARD).read_text()


# --------------------------------------------------------------------------------------------
# Looking at a conversion again
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fold", "scope"),
    [
        ("llama", "norm", "all"),
        ("gpt2", "qkv", "first"),
        ("gemma3_text", "sink", "all"),
        pytest.param("phi", "qkv", "all", marks=full),
        pytest.param("qwen3_moe", "sink", "first", marks=full),
    ],
)
def test_convert_verify_reproduce(
    family: str, fold: str, scope: str, tiny: Tiny, tmp_path: Path, run: Run, snapshot: Snapshot
) -> None:
    output = tmp_path / "out"
    words = ("convert", tiny(family, shards=2), "--fold", fold, "--scope", scope, *QUICK)
    # A sink fold of so small a model, on so few tokens, leaks more than the mask itself changes.
    forced = ("--force",) if fold == "sink" else ()
    run(*words, "-o", output, "--max-degradation", 9, *forced, "--quiet").ok()
    before = snapshot(tmp_path)
    assert run("verify", output, "--json").ok().json()["passed"] is True
    again = run("reproduce", output, "--json").ok().json()
    assert again["same"] is True
    assert {file["name"] for file in again["files"]} == {path.name for path in output.iterdir()} - {
        MANIFEST
    }
    assert all(file["recorded"] == file["repeated"] for file in again["files"])
    assert snapshot(tmp_path) == before  # the repeated checkpoint is gone again


def test_inspect(output: Path, run: Run) -> None:
    text = run("inspect", output).ok().stdout
    for part in (
        "tiny-llama",
        "surgery convert",
        "ME Layer",
        "6 of 64 per layer",
        "model.layers.4.input_layernorm.weight",
        "perplexity, base",
        "checks passed",
    ):
        assert part in text


def test_card_is_idempotent(output: Path, run: Run, snapshot: Snapshot) -> None:
    before = snapshot(output)
    for _ in range(2):
        run("card", output, "--quiet").ok()
        assert snapshot(output) == before
    run("verify", output, "--quiet").ok()


def test_card_restores_a_changed_card(output: Path, run: Run, snapshot: Snapshot) -> None:
    before = snapshot(output)
    (output / CARD).write_text((output / CARD).read_text().replace("perplexity", "excellence"))
    assert run("verify", output, "--quiet").code == 5
    run("card", output, "--quiet").ok()
    assert snapshot(output) == before
    run("verify", output, "--quiet").ok()


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x01
    path.write_bytes(raw)


def places(output: Path) -> list[tuple[str, int]]:
    """A file and the position of a byte in it: every part of a checkpoint."""
    edited = surgery.resolve(str(output)).tensors["model.layers.4.input_layernorm.weight"]
    other = surgery.resolve(str(output)).tensors["model.layers.2.self_attn.v_proj.weight"]
    return [
        (SINGLE, 3),  # the header's length
        (SINGLE, 20),  # the header
        (SINGLE, edited.begin + 5),
        (SINGLE, other.begin + 5),
        (SINGLE, -1),
        ("config.json", 40),
        ("tokenizer.json", 1000),
        ("LICENSE", 0),
        (CARD, 100),
        (FIGURE, 500),
    ]


@pytest.mark.parametrize("number", range(10))
def test_one_wrong_byte(number: int, output: Path, run: Run) -> None:
    name, position = places(output)[number]
    flip(output / name, position)
    outcome = run("verify", output, "--quiet")
    assert outcome.code in (5, 7)
    assert name in outcome.sentence() or outcome.code == 7
    # Nothing wrong is pushed either.
    outcome = run("push", output, "me/x", "--quiet")
    assert outcome.code in (5, 7)
    assert "will not be pushed" in outcome.sentence()


@pytest.mark.parametrize(
    "pattern", ['"sha256": "', '"original": "', '"dimensions": {\n  "4": [\n   ', '"tensor": "']
)
def test_one_wrong_byte_in_the_manifest(pattern: str, output: Path, run: Run) -> None:
    text = (output / MANIFEST).read_text(encoding="utf-8")
    position = text.index(pattern) + len(pattern)
    flip(output / MANIFEST, len(text[:position].encode()))
    outcome = run("verify", output, "--quiet")
    assert outcome.code in (5, 7)
    outcome.sentence()


def test_missing_and_additional_files(output: Path, run: Run) -> None:
    (output / "tokenizer.json").rename(output / "extra.json")
    outcome = run("verify", output, "--quiet")
    assert outcome.code == 5
    assert "tokenizer.json is missing" in outcome.sentence()
    (output / "extra.json").rename(output / "tokenizer.json")
    run("verify", output, "--quiet").ok()
    (output / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    outcome = run("verify", output, "--quiet")
    assert outcome.code == 5
    assert "pytorch_model.bin" in outcome.sentence()


def test_another_base(output: Path, tiny: Tiny, run: Run, tmp_path: Path) -> None:
    """Verified against the base that is named, wherever it is; against no other."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny(), moved)
    run("verify", output, "--base", moved, "--quiet").ok()
    run("reproduce", output, "--base", moved, "--quiet").ok()
    outcome = run("verify", output, "--base", tiny("llama", seed=1), "--quiet")
    assert outcome.code == 5
    outcome.sentence()
    outcome = run("reproduce", output, "--base", tiny("llama", seed=1), "--quiet")
    assert outcome.code in (4, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "moved"}


def test_base_that_is_gone(tiny_copy: Tiny, tmp_path: Path, run: Run) -> None:
    folder = tiny_copy()
    words = ("convert", folder, "--layer", 3, "--no-check", "--quiet")
    run(*words, "-o", tmp_path / "out").ok()
    shutil.rmtree(folder)
    for command in ("verify", "reproduce"):
        outcome = run(command, tmp_path / "out", "--quiet")
        assert outcome.code == 7
        assert "give it with --base" in outcome.sentence()
    run("inspect", tmp_path / "out").ok()
    run("card", tmp_path / "out").ok()


def test_reproduce_trusts_nobody_unasked(output: Path, run: Run) -> None:
    """A manifest may come from a stranger: that it asks for trust is no reason to give it."""
    manifest = json.loads((output / MANIFEST).read_text())
    manifest["settings"]["trust_remote_code"] = True
    (output / MANIFEST).write_text(json.dumps(manifest))
    outcome = run("reproduce", output, "--quiet")
    assert outcome.code == 2
    assert "give --trust-remote-code if you trust it" in outcome.sentence()


def test_reproduce_names_what_differs(output: Path, tiny: Tiny, run: Run) -> None:
    manifest = json.loads((output / MANIFEST).read_text())
    manifest["settings"]["rate"] = 0.5
    (output / MANIFEST).write_text(json.dumps(manifest))
    outcome = run("reproduce", output, "--base", tiny(), "--json")
    assert outcome.code == 5
    assert outcome.json()["same"] is False
    assert SINGLE in outcome.stderr
    assert CARD in outcome.stderr
    assert "config.json" not in outcome.stderr
