"""What SECURITY.md promises and no other test shows."""

from __future__ import annotations

import base64
import json
import logging
import os
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_models
from hub_server import HubServer
from script import run_script, start
from shared import Outcome, Run, Tiny, use_hub

import surgery
from surgery.commands import _COMMANDS
from surgery.files.text import LARGEST_TEXT

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from test_merging import a_recipe

CANARY = "hf_canary_do_not_tell_0123456789"
SWEEP = ("--rates", "0.1", "--scopes", "first", "--folds", "norm", "--selects", "weight")
SWEEP += ("--layer", "3", "--check-tokens", "128")
QUICK = ("--layer", "3", "--no-check", "--quiet")


def test_remote_code_runs_only_when_asked_for(tiny_copy: Tiny, tmp_path: Path, run: Run) -> None:
    folder, trap = tiny_copy(), tmp_path / "trap"
    (folder / "modeling_evil.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    out = ("-o", tmp_path / "out")
    for command in (
        ("analyze", folder),
        ("analyze", folder, "--stream"),
        ("analyze", folder, "--report", tmp_path / "report"),
        ("convert", folder, *out),
        ("sweep", folder, *SWEEP, *out),
        ("compare", folder, folder, *out),
        ("finetune", a_recipe(tmp_path, folder, layer=3), *out),
    ):
        sentence = run(*command, "--quiet").sentence()
        assert "--trust-remote-code" in sentence
        assert not trap.exists()
    # The trap would have worked.
    run("analyze", folder, "--quiet", "--trust-remote-code")
    assert trap.exists()


def test_templates_of_a_model_are_never_rendered(tiny_copy: Tiny, tmp_path: Path, run: Run) -> None:
    """A hostile chat template and a card full of Jinja: carried and quoted, not obeyed."""
    folder, trap = tiny_copy(), tmp_path / "trap"
    call = "cycler.__init__.__globals__.os.system('touch " + str(trap) + "')"
    (folder / "chat_template.jinja").write_text("{{ " + call + " }}")
    card = "---\nlicense: '{{ " + call.replace("'", "''") + " }}'\n---\n{{ " + call + " }}\n"
    (folder / "README.md").write_text(card)
    run("convert", folder, "--layer", "3", "--check-tokens", "256", "-o", tmp_path / "out").ok()
    run("card", tmp_path / "out").ok()
    assert not trap.exists()
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert written == (folder / "chat_template.jinja").read_text()


def test_a_manifest_that_unpacks_without_end(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """A hundred kilobytes of text that would become a hundred megabytes."""
    surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "out")
    path = tmp_path / "out" / "surgery.json"
    manifest = json.loads(path.read_text())
    packed = base64.b64encode(zlib.compress(bytes(LARGEST_TEXT + 1)))
    manifest["replaced"] = {"README.md": packed.decode()}
    path.write_text(json.dumps(manifest))
    for words in (("inspect",), ("verify",), ("revert", "-o", tmp_path / "base")):
        sentence = run(words[0], tmp_path / "out", *words[1:]).sentence()
        assert "larger than any such file" in sentence
    assert not (tmp_path / "base").exists()


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def test_no_escape_sequence_reaches_the_terminal(tiny_copy: Tiny, tmp_path: Path, run: Run) -> None:
    """From file names, configuration values, card text and error messages."""
    folder = tiny_copy()
    (folder / f"notes{ESCAPES}.bin").write_bytes(b"x")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [f"Llama{ESCAPES}"]
    (folder / "README.md").write_text(f"---\nlicense: other\nlicense_name: a{ESCAPES}b\n---\n")
    outcomes = [run("convert", folder, *QUICK[:-1], "-o", tmp_path / "out")]
    outcomes.append(run("inspect", tmp_path / "out"))
    config["model_type"] = f"llama{ESCAPES}"
    (folder / "config.json").write_text(json.dumps(config))
    outcomes.append(run("analyze", folder))
    outcomes.append(run("convert", folder, "-o", tmp_path / "other"))
    assert [outcome.code == 0 for outcome in outcomes] == [True, True, False, False]
    for outcome in outcomes:
        assert not set("\x1b\x07\x9b") & set(outcome.stdout + outcome.stderr)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_the_users(mask: int, tiny: Tiny, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        surgery.convert(str(tiny()), layer=3, check=False, output=tmp_path / "out")
    finally:
        os.umask(before)
    check_permissions(tmp_path / "out", mask)


def check_permissions(folder: Path, mask: int) -> None:
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 1
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & mask == 0, (path, oct(mode))
        assert not mode & 0o7000
        assert path.is_dir() or not mode & 0o111


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.full)])
def test_permissions_of_all_that_is_written(
    drawn: bool, tiny: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports, studies, trainings and results are as private as the user wants them.

    Figures are files without a picture in a quick run, because drawing a report takes long.
    """
    if not drawn:
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig",
            lambda _figure, path, **_options: open(path, "wb").close(),
        )
    source, work = tiny(layers=3, layer=1), tmp_path / "work"
    recipe = a_recipe(tmp_path, source)
    before = os.umask(0o077)
    try:
        work.mkdir()
        quick = ("--layer", "1", "--quiet", "--check-tokens", "128")
        sink = ("--fold", "sink", "--calibration-tokens", "256", "--force")
        run("convert", source, *quick, *sink, "--as", "adapter", "-o", work / "adapter").ok()
        run("convert", source, *quick, *sink, "-o", work / "sink").ok()
        run("revert", work / "sink", "-o", work / "base").ok()
        run("sweep", source, *SWEEP, *quick, "-o", work / "sweep").ok()
        run("finetune", recipe, "-o", work / "trained").ok()
        run("analyze", tiny(), "--quiet", "--report", work / "report").ok()
        run("analyze", tiny(), "--quiet", "--plot", work / "plot.png").ok()
        results = work / "compared.json"
        run("compare", source, work / "sink", "--check-tokens", "64", "-q", "-o", results).ok()
    finally:
        os.umask(before)
    check_permissions(work, 0o077)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "merges.txt", "surgery.json"])
def test_a_device_is_not_read(name: str, tiny_copy: Tiny, tmp_path: Path, run: Run) -> None:
    """Such as one with zeros without end."""
    folder = tiny_copy()
    (folder / name).unlink(missing_ok=True)
    try:
        os.mknod(folder / name, stat.S_IFCHR | 0o644, os.makedev(1, 5))
    except OSError:
        pytest.skip("making a device needs root")
    for words in (("analyze", folder), ("convert", folder, *QUICK, "-o", tmp_path / "out")):
        assert name in run(*words).sentence()
    if name == "surgery.json":
        for command in ("inspect", "verify", "card"):
            assert name in run(command, folder).sentence()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def endless(tmp_path: Path) -> list[Path]:
    """What has no end when it is read: a pipe into which nobody writes, and a device."""
    os.mkfifo(tmp_path / "pipe")
    return [tmp_path / "pipe", Path("/dev/zero")]


def test_texts_and_recipes_are_read_from_files_alone(
    endless: list[Path], tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    out = ("-o", tmp_path / "out")
    for path in endless:
        for words in (
            ("convert", tiny(), *QUICK, "--select", "activation", "--calibration", path, *out),
            ("compare", tiny(), tiny(), "--text", path, "-q"),
            ("finetune", path, *out),
        ):
            assert f"{path} cannot be read: it is no file" in run(*words).sentence()
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_names_what_has_no_end(
    endless: list[Path], tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "out"
    run("convert", tiny(), *QUICK, "--select", "activation", "-o", output).ok()
    manifest = json.loads((output / "surgery.json").read_text())
    for named in (*map(str, endless), "\0"):
        manifest["settings"]["calibration"] = named
        (output / "surgery.json").write_text(json.dumps(manifest))
        assert "cannot be read" in run("reproduce", output, "--base", tiny()).sentence()


def test_a_text_without_measure(tmp_path: Path, tiny: Tiny, run: Run) -> None:
    with open(tmp_path / "long.txt", "wb") as file:
        file.truncate(2**30)
    told = run("compare", tiny(), tiny(), "--text", tmp_path / "long.txt", "-q").sentence()
    assert "larger than 64 MiB" in told


@contextmanager
def arguments_seen(folder: Path) -> Iterator[set[str]]:
    """The arguments of every process that works in a folder, looked at again and again."""
    watcher = start(
        *(sys.executable, "-c", _WATCHER, folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    seen: set[str] = set()
    try:
        yield seen
    finally:
        output, _ = watcher.communicate("")
        seen.update(output.splitlines())


_WATCHER = """
import glob, sys, threading, os
seen, end = set(), threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
while not end.wait(0.02):
    for path in glob.glob("/proc/[0-9]*"):
        try:
            if os.readlink(path + "/cwd") == sys.argv[1]:
                raw = open(path + "/cmdline", "rb").read()
                seen.add(raw.replace(b"\\0", b" ").decode(errors="replace"))
        except OSError:
            pass
print("\\n".join(line.replace("\\n", " ") for line in seen))
"""


@contextmanager
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Also what loggers keep from the root's handlers, as those of transformers do."""
    apart = [
        logger
        for logger in map(logging.getLogger, logging.root.manager.loggerDict)
        if not logger.propagate
    ]
    for logger in apart:
        logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        for logger in apart:
            logger.removeHandler(caplog.handler)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
@pytest.mark.parametrize(
    "processes", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_the_token_is_told_to_nobody(
    processes: bool,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every command that speaks to the Hub, succeeding and failing, with a token to betray.

    Two of them in a process of their own by default, all in a full run.
    """
    source = tiny_models.save("llama", tmp_path / "tiny")
    work = tmp_path / "work"
    work.mkdir()
    texts: list[str] = []
    called: set[str] = set()
    apart: set[str] = set()
    recipe = a_recipe(tmp_path, "a/model", layer=3, push="tester/trained")

    def call(*words: object, code: int = 0, process: bool = processes) -> None:
        if process:
            done = run_script(*words, cwd=work, env={"OMP_NUM_THREADS": "1"})
            outcome = Outcome(done.returncode, done.stdout, done.stderr)
            apart.add(str(words[0]))
        else:
            outcome = run(*words)
        assert outcome.code == code, (words, outcome.stderr)
        assert "Traceback" not in outcome.stderr
        called.add(str(words[0]))
        texts.extend((outcome.stdout, outcome.stderr))

    with (
        HubServer(tmp_path / "server", token=CANARY) as hub,
        everything_logged(caplog),
        arguments_seen(work) as arguments,
    ):
        use_hub(hub, monkeypatch, work / "home")
        monkeypatch.chdir(work)
        hub.add_repo("a/model", source, private=True)
        call("analyze", "a/model", "--json")
        call("convert", "a/model", "--layer", "3", "--no-check", "-o", "out")
        call("push", "out", "tester/model", "--json", process=True)
        call("card", "out")
        call("inspect", "out", "--json")
        call("reproduce", "out")
        call("verify", "out", "--json")
        call("revert", "out", "-o", "reverted")
        call("families", "--json")
        call("compare", "a/model", "out", "--check-tokens", "64", "-o", "compared.json")
        call("sweep", "a/model", *SWEEP, "-o", "swept")
        call("finetune", recipe, "-o", "trained")
        remote = ("--layer", "3", "--no-check", "--push-to-hub", "t/m", "--remote")
        call("convert", "a/model", *remote, process=True)
        call("analyze", "a/nothing", code=7)
        hub.fail(r".*", 500, times=200)
        call("push", "out", "tester/again", code=1)
        time.sleep(0.1)
    assert called == set(_COMMANDS)
    ran = [line.partition(" -m surgery ")[2].split() for line in arguments]
    seen = {words[0] for words in ran if words}
    # A command may be too quick to be seen; those that take the token about take seconds.
    about = {"analyze", "convert", "push", "reproduce", "sweep", "finetune"}
    assert about & apart <= seen <= called
    assert about & apart >= {"convert", "push"}
    caught = capfd.readouterr()
    for text in [*texts, *arguments, caplog.text, caught.out, caught.err]:
        assert CANARY not in text
    for path in work.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_a_download_that_is_not_what_the_hub_states(
    name: str, tmp_path: Path, tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that changed on the way or in the cache, where no header shows it."""
    with HubServer(tmp_path / "server", token=CANARY) as hub:
        hub.add_repo("a/model", tiny())
        path = hub.files("a/model")[name]
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.unlink()  # it may be linked to the source
        path.write_bytes(raw)
        use_hub(hub, monkeypatch, tmp_path / "home")
        done = run("convert", "a/model", *QUICK, "-o", tmp_path / "out")
    assert done.code == 7, done.stderr
    assert "damaged on its way from the Hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
