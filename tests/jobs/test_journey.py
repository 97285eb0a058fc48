"""The whole journey as typed, against a loopback server that speaks the Hub's HTTP API."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from hub_server import HubServer
from script import run as run_program
from script import run_script
from shared import Run, use_hub

from surgery.files.checkpoint import Origin, open_checkpoint

CANARY = "hf_canary_0123456789"
STOCK = """
import json, sys
sys.modules["surgery"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(input_ids=torch.tensor([[0, 5, 6, 7]])).logits
print(json.dumps({"finite": bool(torch.isfinite(logits).all()), "class": type(model).__name__}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 whose massive activation emerges at layer 6, as in Qwen3-4B."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen3-4B"
    return tiny_models.save("qwen3", folder, layer=6, layers=12, shards=2)


@pytest.fixture
def hub(source: Path, tmp_path: Path):
    with HubServer(tmp_path / "server", token=CANARY) as server:
        server.add_repo("Qwen/Qwen3-4B", source)
        yield server


@pytest.fixture
def env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return {**hub.env(), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": CANARY}


@pytest.fixture
def here(hub: HubServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Commands in this process, in the temporary folder, with the server for a Hub."""
    use_hub(hub, monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return run


def no_canary(*texts: str, folder: Path) -> None:
    assert all(CANARY not in text for text in texts)
    for path in folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.full)], ids=["quick", "thorough"]
)
def test_as_typed(
    thorough: bool,
    hub: HubServer,
    env: dict[str, str],
    source: Path,
    tmp_path: Path,
    here: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a process of its own; what is published is loaded in one where there is no surgery.

    In a quick run it is loaded in this process.
    """
    work = tmp_path / "work"
    work.mkdir()
    done = run_script(
        *["convert", "Qwen/Qwen3-4B", "--rate", "0.1", "--scope", "first"],
        *["--push-to-hub", "me/Qwen3-4B-WeMask"],
        # A random model has no perplexity to lose; the gate is tested elsewhere.
        *["--max-degradation", "1000"],
        cwd=work,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    (output,) = work.iterdir()
    assert output.name == "Qwen3-4B-wemask-norm-first-0.1"
    base = open_checkpoint(source, Origin("directory", "base", "base"))
    made = open_checkpoint(output, Origin("directory", "made", "made"))
    changed = [
        name for name in base.tensors if base.read(name).tobytes() != made.read(name).tobytes()
    ]
    assert changed == ["model.layers.7.input_layernorm.weight"]
    assert int((made.read(changed[0]) == 0).sum()) == 6
    repo = hub.repo("me/Qwen3-4B-WeMask")
    assert repo.private
    served = hub.files("me/Qwen3-4B-WeMask")
    for path in output.rglob("*"):
        if path.is_file():
            name = path.relative_to(output).as_posix()
            assert served[name].read_bytes() == path.read_bytes(), name
    manifest = json.loads((output / "surgery.json").read_text())
    assert manifest["emergence"]["layer"] == 6
    assert manifest["base"]["name"] == "Qwen/Qwen3-4B"
    assert manifest["base"]["commit"] == hub.repo("Qwen/Qwen3-4B").commits[-1].sha
    card = (output / "README.md").read_text()
    assert "base_model: Qwen/Qwen3-4B" in card
    assert 'from_pretrained("me/Qwen3-4B-WeMask")' in card
    assert "model-index" not in card
    assert "license: apache-2.0" in card
    no_canary(done.stdout, done.stderr, folder=work)
    loaded = stock_of(thorough, "me/Qwen3-4B-WeMask", env, tmp_path / "elsewhere", monkeypatch)
    assert loaded == {"finite": True, "class": "Qwen3ForCausalLM"}
    for command in ("verify", "reproduce") if thorough else ("verify",):
        again = here(command, output).ok()
        no_canary(again.stdout, again.stderr, folder=work)


def stock_of(
    apart: bool, model: str, env: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """What `STOCK` prints of a model on the Hub, in a process of its own or in this one."""
    if apart:
        done = run_program(sys.executable, "-c", STOCK, model, env={**env, "HF_HOME": str(home)})
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        said = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
            patch.setattr(sys, "argv", ["-c", model])
            patch.setitem(sys.modules, "surgery", None)
            exec(compile(STOCK, "stock.py", "exec"), {"__name__": "__main__"})
        printed = said.getvalue()
    found: dict[str, object] = json.loads(printed.splitlines()[-1])
    return found


def test_revisions_and_the_offline_cache(
    hub: HubServer,
    env: dict[str, str],
    tmp_path: Path,
    here: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sha = hub.repo("Qwen/Qwen3-4B").commits[-1].sha
    quick = ["--layer", "6", "--no-check", "--quiet"]
    here("convert", "Qwen/Qwen3-4B", *quick, "-o", "a").ok()
    asked = len(hub.requests)
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    cached = run_script(
        "convert", f"Qwen/Qwen3-4B@{sha}", *quick, "-o", "c", cwd=tmp_path, env=offline
    )
    assert cached.returncode == 0, cached.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here("convert", "Qwen/Qwen3-4B", *quick, "-o", "b").ok()
    for output in ("b", "c"):
        for path in (tmp_path / "a").glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / output / path.name).read_bytes()
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("Qwen/Qwen3-5B", "neither a local folder nor a model on the Hub"),
        ("Qwen/Qwen3-4B@nowhere", "no revision 'nowhere'"),
        ("not/a/model", "neither an existing folder or file nor the id"),
    ],
)
def test_what_the_hub_lacks(model: str, words: str, tmp_path: Path, here: Run) -> None:
    done = here("convert", model, "-o", "out")
    assert done.code == 7
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert words in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_push(
    hub: HubServer, source: Path, tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public on request, branches, pull requests, stale shards removed, tampering refused."""
    here("convert", source, "--layer", "6", "--no-check", "--quiet", "-o", "out").ok()
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (stale / "notes.txt").write_text("mine")
    hub.add_repo("tester/model", stale)
    public = here("push", "out", "tester/public", "--public").ok()
    assert not hub.repo("tester/public").private
    again = here("push", "out", "tester/model", "-m", "second").ok()
    served = hub.files("tester/model")
    assert "model-00009-of-00009.safetensors" not in served
    assert "notes.txt" in served
    assert hub.repo("tester/model").commits[-1].title == "second"
    branch = here("push", "out", "tester/new", "--revision", "wip").ok()
    assert "surgery.json" in hub.files("tester/new", "wip")
    assert "surgery.json" not in hub.files("tester/new", "main")
    request = here("push", "out", "tester/new", "--create-pr", "--json").ok()
    assert request.json()["pull_request"]
    assert "surgery.json" not in hub.files("tester/new", "main")
    for done in (public, again, branch, request):
        no_canary(done.stdout, done.stderr, folder=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        refused = here("push", "out", "tester/other")
    assert refused.code == 1
    assert "log" in refused.stderr
    assert "Traceback" not in refused.stderr
    weights = min((tmp_path / "out").glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    tampered = here("push", "out", "tester/model")
    assert tampered.code == 5
    assert "sha256" in tampered.stderr


def test_a_failing_download_leaves_nothing(hub: HubServer, tmp_path: Path, here: Run) -> None:
    hub.fail(r"(GET|HEAD) .*model-00002-of-0000.\.safetensors", 404, times=50)
    done = here("convert", "Qwen/Qwen3-4B", "-o", "out")
    assert done.code == 7
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_planted_gain_is_what_the_paper_selects(source: Path) -> None:
    """The mask of the journey is the top-k of the gains, checked without our own code."""
    base = open_checkpoint(source, Origin("directory", "base", "base"))
    gain = np.abs(base.read("model.layers.7.input_layernorm.weight").astype(np.float64))
    assert len(np.unique(gain)) == len(gain)
