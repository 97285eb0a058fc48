"""Publishing without the download: what changed is sent, the rest copied on the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hub_server import HubServer

from surgery.files.checkpoint import Origin, open_checkpoint
from surgery.files.ranges import LocalFiles
from surgery.patient.remote import KeptRanges

Run = Callable[..., Any]
ARGS = ["convert", "some/model", "--push-to-hub", "me/masked", "--remote"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save(
        "llama", tmp_path_factory.mktemp("hub") / "model", layer=3, layers=14, shards=6
    )
    (folder / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n# the base's own\n")
    (folder / "images").mkdir()
    (folder / "images" / "logo.png").write_bytes(b"a picture")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n![logo](images/logo.png)\n")
    return folder


def shard_of(source: Path) -> str:
    """The file that a norm fold after layer 3 changes."""
    base = open_checkpoint(source, Origin("directory", "base", "base"))
    return base.tensors["model.layers.4.input_layernorm.weight"].file


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfFileSystem

    with HubServer(tmp_path / "server") as server:
        server.add_repo("some/model", source)
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        for name, value in server.patches().items():
            monkeypatch.setattr(name, value, raising=False)
        HfFileSystem.clear_instance_cache()
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield server


def fetch(hub: HubServer, repo: str, folder: Path) -> Path:
    for name, path in hub.files(repo).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return folder


def same_as_ordinary(hub: HubServer, run: Run, tmp_path: Path) -> Path:
    """The published files are those of an ordinary conversion; returns that one's folder."""
    out = tmp_path / "out"
    run("convert", "some/model", "--layer", 3, "--no-check", "-o", out, "--quiet").ok()
    served = hub.files("me/masked")
    # The repository's own stays: the base's does not decide what is a large file there.
    assert "the base's own" not in served.pop(".gitattributes").read_text()
    ordinary = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert set(served) == set(ordinary)
    for name, path in ordinary.items():
        if name not in ("README.md", "surgery.json"):
            assert served[name].read_bytes() == path.read_bytes(), name
    return out


def test_only_what_changed_travels(hub: HubServer, source: Path, run: Run, tmp_path: Path) -> None:
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shard = (source / shard_of(source)).stat().st_size
    sent, received = hub.bytes_sent, hub.bytes_received
    told = run(*ARGS, "--layer", 3, "--json").ok().json()
    small = 120_000  # tokenizer, headers, listings, card, manifest
    assert hub.bytes_received - received < shard + small
    assert hub.bytes_sent - sent < shard + 2 * small
    assert told["bytes_total"] == weights
    assert shard < told["bytes_sent"] < shard + small
    assert shard < told["bytes_read"] < shard + 2 * small
    assert told["pushed"]["private"]
    assert not list((tmp_path / "work").iterdir())
    out = same_as_ordinary(hub, run, tmp_path)
    again = tmp_path / "again"
    fetch(hub, "me/masked", again)
    published = json.loads((again / "surgery.json").read_text())
    ordinary = json.loads((out / "surgery.json").read_text())
    for key in ("base", "dimensions", "edits", "replaced"):
        assert published[key] == ordinary[key], key
    hashes = [{f["name"]: f["sha256"] for f in m["files"]} for m in (published, ordinary)]
    for name in set(hashes[1]) - {"README.md"}:
        assert hashes[0][name] == hashes[1][name], name
    # What was published proves itself, and goes back.
    run("verify", again).ok()
    run("revert", again, "-o", tmp_path / "back").ok()
    for path in (*source.glob("*.safetensors"), source / "images" / "logo.png"):
        path = path.relative_to(source)
        assert (tmp_path / "back" / path).read_bytes() == (source / path).read_bytes()


def test_a_base_that_is_a_conversion(
    hub: HubServer, tiny: Callable[..., Path], run: Run, snapshot: Any, tmp_path: Path
) -> None:
    """Its card, manifest and figures come back; what is left out is in the plan and on record."""
    first = tmp_path / "first"
    quick = ("--fold", "qkv", "--undo-file", "--no-check", "--quiet")
    run("convert", tiny("llama"), "--layer", 3, *quick, "-o", first).ok()
    for name in ("surgery_layers.png", "surgery_loss.png"):
        (first / name).write_bytes(name.encode())
    hub.add_repo("some/conversion", first)
    published = ("--push-to-hub", "me/twice", "--remote")
    done = run("convert", "some/conversion", "--layer", 3, *published).ok()
    assert "it undoes the base's own conversion" in done.stdout
    again = fetch(hub, "me/twice", tmp_path / "again")
    told = run("revert", again, "-o", tmp_path / "back", "--json").ok().json()
    assert told["not_carried"] == ["undo/surgery_undo.safetensors"]
    expected = snapshot(first)
    del expected["undo"], expected["undo/surgery_undo.safetensors"]
    assert snapshot(tmp_path / "back") == expected


def test_located_on_the_way_and_stale_files_removed(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (old / "notes.txt").write_text("mine")
    hub.add_repo("me/masked", old)
    done = run(*ARGS).ok()
    assert "the quality gate did not run" in " ".join(done.stdout.split())
    served = hub.files("me/masked")
    assert "model-00009-of-00009.safetensors" not in served
    assert "pytorch_model.bin" not in served
    assert "notes.txt" in served
    manifest = json.loads(served["surgery.json"].read_text())
    assert manifest["emergence"]["layer"] == 3
    assert "surgery_layers.png" in served


def test_a_dry_run_sends_nothing(hub: HubServer, source: Path, run: Run, tmp_path: Path) -> None:
    done = run(*ARGS, "--layer", 3, "--dry-run").ok()
    assert "nothing was sent" in done.stdout
    assert f"{shard_of(source)} (" in done.stdout
    told = run(*ARGS, "--layer", 3, "--dry-run", "--json").ok().json()
    assert told["pushed"] is None
    assert told["bytes_sent"] == 0
    assert told["bytes_read"] < (source / shard_of(source)).stat().st_size
    assert list(told["plan"]["sent"]) == [shard_of(source)]
    base = hub.repo("some/model").commits[-1].sha
    assert told["plan"] == {
        "source": f"some/model@{base}",
        "repository": "me/masked",
        "tensors_total": len(open_checkpoint(source, Origin("directory", "base", "base")).tensors),
        "tensors_edited": [
            {
                "tensor": "model.layers.4.input_layernorm.weight",
                "layer": 4,
                "kind": "gain",
                "dtype": "F32",
                "shape": [64],
                "file": shard_of(source),
                "dimensions": 6,
            }
        ],
        "sent": told["plan"]["sent"],
        "copied": told["plan"]["copied"],
        "left_out": [".gitattributes", "pytorch_model.bin"],
    }
    assert not any(request.method == "POST" for request in hub.requests)
    assert not list((tmp_path / "work").iterdir())
    plan = run(*ARGS, "--layer", 3, "--json").ok().json()["plan"]
    assert plan == told["plan"]
    assert plan["left_out"] == [".gitattributes", "pytorch_model.bin"]
    generated = {"README.md", "surgery.json", ".gitattributes"}
    assert {*plan["sent"], *plan["copied"]} == set(hub.files("me/masked")) - generated


def test_ranges_are_read_once(tmp_path: Path) -> None:
    """Whatever is asked for, in whatever order: the same bytes, each fetched once."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4)
    fetched: list[tuple[int, int]] = []

    class Counted(LocalFiles):
        def read_many(self, ranges: Any) -> list[bytes]:
            fetched.extend(wanted[1:] for wanted in ranges)
            return super().read_many(ranges)

    kept = KeptRanges(Counted(tmp_path), tmp_path / "kept")
    random = np.random.default_rng(0)
    for _ in range(200):
        begin, end = sorted(int(place) for place in random.integers(0, 1025, 2))
        expected = (tmp_path / "file").read_bytes()[begin:end]
        assert kept.read("file", begin, end) == expected
    assert kept.size("file") == 1024
    assert sum(end - begin for begin, end in fetched) <= 1024


def test_the_ordinary_way_where_copying_is_refused(
    hub: HubServer, run: Run, tmp_path: Path
) -> None:
    hub.fail(r"POST .*/lfs-files/duplicate", 403)
    done = run(*ARGS, "--layer", 3, "--force", "--check-tokens", 256).ok()
    assert "uploading everything instead" in " ".join(done.stderr.split())
    same_as_ordinary(hub, run, tmp_path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--fold", "sink"], "leave it out"),
        (["--select", "activation"], "leave it out"),
        (["-o", "out"], "writes nothing here"),
    ],
)
def test_what_needs_the_whole_model(hub: HubServer, run: Run, more: list[str], words: str) -> None:
    done = run(*ARGS, *more)
    assert done.code == 2
    assert words in " ".join(done.stderr.split())
    assert not any(request.method == "POST" for request in hub.requests)


def test_only_models_on_the_hub(hub: HubServer, source: Path, run: Run) -> None:
    assert "for models on the Hub" in run("convert", source, *ARGS[2:]).sentence()


def test_nothing_is_committed_on_damage(hub: HubServer, source: Path, run: Run) -> None:
    """A shard that does not arrive as its hash announces."""
    stored = hub.files("some/model")[shard_of(source)]
    raw = bytearray(stored.read_bytes())
    raw[-3] ^= 1
    stored.unlink()  # a link to the source
    stored.write_bytes(bytes(raw))
    done = run(*ARGS, "--layer", 3, "--quiet")
    assert done.code == 7
    assert "another sha256" in done.stderr
    assert "me/masked" not in hub.repos
