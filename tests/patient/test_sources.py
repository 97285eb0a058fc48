"""What a user may type for a model: folders, pickles, GGUF files, Hub ids, and mistakes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import BadCheckpoint, BadSettings
from surgery.files.digests import file_sha256
from surgery.files.weights import INDEX, SINGLE
from surgery.patient.cache import cache_folder
from surgery.patient.source import resolve

Tiny = Callable[..., Path]
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """These tests look into the cache of converted sources, so each has its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SURGERY_CACHE", str(folder))
    return folder


def pickled(folder: Path, *, shards: int = 1, archive: bool = True) -> dict[str, torch.Tensor]:
    """Turn a checkpoint's safetensors into pytorch_model*.bin; returns what they hold.

    Tied output embeddings are stored as torch stores them: a second name for the same storage.
    """
    tensors = load_file(folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        embedding = next(
            name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))
        )
        tensors["lm_head.weight"] = tensors[embedding]
    (folder / SINGLE).unlink()
    if shards == 1:
        torch.save(
            tensors,
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=archive,
        )
        return tensors
    names = list(tensors)
    table = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = names[shard::shards]
        torch.save(
            {name: tensors[name] for name in part},
            folder / file,
            _use_new_zipfile_serialization=archive,
        )
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


# --------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------


def test_folder(tiny: Tiny, own_cache: Path) -> None:
    checkpoint = resolve(str(tiny()))
    assert checkpoint.origin.kind == "directory"
    assert checkpoint.origin.name == "tiny-llama"
    assert checkpoint.origin.commit is None
    assert checkpoint.folder == tiny()
    assert not own_cache.exists()  # nothing to convert


def test_relative_folders(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny())
    assert resolve(".").origin.name == "tiny-llama"
    monkeypatch.chdir(tiny().parent)
    assert resolve("tiny-llama").origin.typed == "tiny-llama"
    monkeypatch.setenv("HOME", str(tiny().parent))
    assert resolve("~/tiny-llama").origin.name == "tiny-llama"


def test_folders_have_no_revisions(tiny: Tiny) -> None:
    with pytest.raises(BadSettings, match="a local folder has no revisions"):
        resolve(str(tiny()), revision="main")


def test_adapters_are_refused_by_name(tmp_path: Path) -> None:
    """With the weights an adapter has, and without."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for weights in (None, "adapter_model.bin", "adapter_model.safetensors"):
        if weights is not None:
            (folder / weights).write_bytes(b"")
        with pytest.raises(BadCheckpoint, match=r"PEFT adapter for .*; merge it"):
            resolve(str(folder))


def test_adapters_beside_a_whole_model_do_not_matter(tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    said: list[str] = []
    found = resolve(str(folder), say=said.append)
    assert found.left_out == ("adapter_config.json", "adapter_model.safetensors")
    assert ["whose adapter is no part" in sentence for sentence in said] == [True]


# --------------------------------------------------------------------------------------------
# Pickles
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_pickles_hold_what_they_held(
    family: str, shards: int, archive: bool, tiny_copy: Tiny, own_cache: Path
) -> None:
    folder = tiny_copy(family)
    expected = load_file(folder / SINGLE)
    stored = pickled(folder, shards=shards, archive=archive)
    said: list[str] = []
    checkpoint = resolve(str(folder), say=said.append)
    assert checkpoint.origin.kind == "bin"
    assert checkpoint.origin.name == f"tiny-{family}"
    assert checkpoint.folder.parent == own_cache
    assert len(checkpoint.weight_files) == shards
    assert len(said) == 1
    # Tied embeddings come once where one file holds both names, or transformers warns of it.
    known = set(expected) if shards == 1 else set(stored)
    assert set(checkpoint.tensors) == known
    for name in known:
        assert torch.from_numpy(checkpoint.read(name).copy()).equal(stored[name]), name
    assert ((checkpoint.folder / INDEX).exists()) == (shards > 1)
    for path in folder.iterdir():
        if not path.name.startswith("pytorch_model"):
            assert (checkpoint.folder / path.name).read_bytes() == path.read_bytes()
    # The second time it is there already.
    again = resolve(str(folder), say=said.append)
    assert again.folder == checkpoint.folder
    assert len(said) == 1
    assert len(list(own_cache.iterdir())) == 1


def test_pickles_keep_their_formats(tiny_copy: Tiny) -> None:
    folder = tiny_copy("llama", dtype=torch.bfloat16)
    pickled(folder)
    assert {entry.dtype for entry in resolve(str(folder)).tensors.values()} == {"BF16"}


@pytest.mark.parametrize("family", [pytest.param("qwen2", marks=pytest.mark.full), "gpt2"])
def test_pickles_convert(family: str, tiny_copy: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    """From .bin comes the same checkpoint as from safetensors, checked and verified."""
    folder = tiny_copy(family)
    pickled(folder)
    options = {"check_tokens": 200}
    result = surgery.convert(str(folder), output=tmp_path / "out", **options)
    other = surgery.convert(str(tiny(family)), output=tmp_path / "other", **options)
    assert result.verification is not None
    assert result.verification.passed
    written = (load_file(tmp_path / name / SINGLE) for name in ("out", "other"))
    one, two = written
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert result.manifest is not None
    assert result.manifest.base.kind == "bin"
    assert result.mask == other.mask
    assert not list((tmp_path / "out").glob("*.bin"))
    assert surgery.verify(tmp_path / "out").passed
    assert surgery.reproduce(tmp_path / "out").same


def test_the_cache_knows_the_side_files_too(tiny_copy: Tiny) -> None:
    """The same weights under another configuration are another source."""
    folder = tiny_copy()
    pickled(folder)
    first = resolve(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    second = resolve(str(folder))
    assert second.folder != first.folder
    assert second.config["rms_norm_eps"] == 0.5


def test_other_copies_of_the_weights_stay_out_of_the_cache(tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    pickled(folder)
    (folder / "tf_model.h5").write_bytes(b"x" * 1000)
    checkpoint = resolve(str(folder))
    assert not (checkpoint.folder / "tf_model.h5").exists()


class Evil:
    """What a hostile pickle does when it is loaded the way pickles are."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.mark.parametrize("archive", [True, False])
def test_hostile_pickle_is_refused_and_not_executed(
    archive: bool, tiny_copy: Tiny, tmp_path: Path, run: Run, own_cache: Path
) -> None:
    folder, trap = tiny_copy(), tmp_path / "trap"
    (folder / SINGLE).unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"x": Evil(trap)}, path, _use_new_zipfile_serialization=archive)
    sentence = run("convert", folder, "-o", tmp_path / "out", "--quiet").sentence()
    assert "cannot be read as plain tensors" in sentence
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    assert not own_cache.exists()
    # The trap would have worked.
    if not archive:
        torch.load(path, weights_only=False)
        assert trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x02}q\x00.",
        pickle.dumps({"x": 1}),
        b"PK\x03\x04" + bytes(100),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_damaged_pickle(
    content: bytes,
    tiny_copy: Tiny,
    own_cache: Path,
    run: Run,
    recwarn: pytest.WarningsRecorder,
) -> None:
    folder = tiny_copy()
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    outcome = run("convert", folder, "-o", own_cache / "out", "--quiet")
    assert outcome.code == 7
    outcome.sentence()
    assert not recwarn.list  # torch's remarks would stand on stderr too
    assert not own_cache.exists()


@pytest.mark.parametrize(
    "state",
    [
        [torch.ones(2)],
        {"x": 1},
        {"x": {"y": torch.ones(2)}},
        {1: torch.ones(2)},
        {"x": torch.eye(2).to_sparse()},
        torch.ones(2),
    ],
)
def test_pickles_of_something_else(state: Any, tiny_copy: Tiny, own_cache: Path) -> None:
    folder = tiny_copy()
    (folder / SINGLE).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="something other than named tensors"):
        resolve(str(folder))
    assert not own_cache.exists()


@pytest.mark.parametrize("size", [(3,), (10**13,), (2**40, 2**20)])
def test_pickles_that_grow(size: tuple[int, ...], tiny_copy: Tiny, own_cache: Path) -> None:
    """A few bytes in the file that would be terabytes in memory."""
    folder = tiny_copy()
    (folder / SINGLE).unlink()
    torch.save({"x": torch.zeros(1).expand(size)}, folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="x is larger than what is stored of it"):
        resolve(str(folder))
    assert not own_cache.exists()


def test_pickles_in_a_format_that_safetensors_lacks(tiny_copy: Tiny, own_cache: Path) -> None:
    folder = tiny_copy()
    (folder / SINGLE).unlink()
    torch.save({"x": torch.ones(2, dtype=torch.complex128)}, folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="cannot be stored as safetensors"):
        resolve(str(folder))
    assert not own_cache.exists()


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_pickles_without_a_usable_configuration(
    content: str | None, tiny_copy: Tiny, own_cache: Path
) -> None:
    folder = tiny_copy()
    pickled(folder)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        resolve(str(folder))
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written(
    tiny_copy: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_copy()
    pickled(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BadSettings, match="set SURGERY_CACHE to a folder that is"):
        resolve(str(folder))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SURGERY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "wemask-surgery"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "wemask-surgery"


def test_another_process_was_faster(
    tiny_copy: Tiny, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two conversions of one source at once: the first result stays, the second is dropped."""
    folder = tiny_copy()
    pickled(folder)
    expected = resolve(str(folder)).folder
    other = own_cache / "kept"
    shutil.move(expected, other)
    rename = os.rename

    def late(source: Any, target: Any) -> None:
        shutil.copytree(other, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert resolve(str(folder)).folder == expected
    assert {path.name for path in own_cache.iterdir()} == {"kept", expected.name}


# --------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "./nothing",
        "/nothing/here",
        "~/nothing",
        "~nobody-of-that-name/x",
        "a/b/c",
        "a//b",
        "-x/y",
        "user/",
        "/name",
        "user/na me",
        "user/name@",
        "us\x1ber/name",
        "x" * 5000,
        "https://huggingface.co/Qwen/Qwen3-4B",
    ],
)
def test_what_cannot_be_a_model(name: str, run: Run, tmp_path: Path) -> None:
    """No network is asked."""
    for command in ("convert", "analyze"):
        words = ("-o", tmp_path / "out") if command == "convert" else ()
        outcome = run(command, *words, "--quiet", "--", name)
        assert outcome.code == 7
        assert "nor the id of a model on the Hub" in outcome.sentence()
        assert "\x1b" not in outcome.stderr


def test_two_revisions() -> None:
    with pytest.raises(BadSettings, match="names a revision and so does"):
        resolve("user/name@v1", revision="v2")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("model.safetensors", "weights.bin", "README"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(BadCheckpoint, match=r"give a checkpoint folder or a \.gguf file"):
            resolve(str(tmp_path / name))


def test_a_gguf_file_that_is_none(tmp_path: Path, own_cache: Path, run: Run) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    outcome = run("convert", path, "-o", tmp_path / "out", "--quiet")
    assert outcome.code == 6
    assert "is GGUF version 0" in outcome.sentence()
    assert not own_cache.exists()


def test_offline(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = run("convert", "nobody/nothing", "-o", tmp_path / "out", "--quiet")
    assert outcome.code == 7
    assert "not in the local cache" in outcome.sentence()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub at an address where nobody listens."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))


@pytest.mark.usefixtures("no_network")
def test_no_network(run: Run, tmp_path: Path) -> None:
    for command in ("convert", "analyze"):
        words = ("-o", tmp_path / "out") if command == "convert" else ()
        outcome = run(command, "nobody/nothing", *words, "--quiet")
        assert outcome.code == 7
        assert "the Hub cannot be reached" in outcome.sentence()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A Hub that answers everything with the one value in this list."""
    import huggingface_hub

    answer: list[Any] = [None]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw = json.dumps(answer[0]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_notForYou")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint=url))
    yield answer
    server.shutdown()
    server.server_close()


FILES = [{"rfilename": "config.json"}, {"rfilename": SINGLE}]


@pytest.mark.parametrize(
    "answer",
    [
        *([], {}, None, "x", 1),
        {"id": "a/b", "sha": None, "siblings": FILES},
        {"id": "a/b", "sha": 1, "siblings": FILES},
        {"id": "a/b", "sha": "1" * 40, "siblings": [1]},
        {"id": "a/b", "sha": "1" * 40, "siblings": [{"rfilename": None}]},
    ],
)
def test_a_hub_that_answers_something_else(
    answer: Any, mirror: list[Any], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("convert", tiny(), "--layer", 3, "--no-check", "--quiet", "-o", out).ok()
    mirror[0] = answer
    for words in (
        ("analyze", "a/b"),
        ("convert", "a/b", "-o", tmp_path / "none"),
        ("convert", "a/b", "--layer", 3, "--remote", "--push-to-hub", "c/d"),
        ("push", out, "c/d"),
    ):
        outcome = run(*words, "--quiet")
        assert "hf_notForYou" not in outcome.sentence()
    assert not (tmp_path / "none").exists()


PROXIES = ("::", "socks5://127.0.0.1:9", "http://hf_notForYou:x@[")


@pytest.mark.parametrize(
    ("proxy", "in_a_shell"),
    [
        *((proxy, False) for proxy in PROXIES),
        *(pytest.param(proxy, True, marks=pytest.mark.full) for proxy in PROXIES),
    ],
)
def test_a_proxy_that_is_none(
    proxy: str,
    in_a_shell: bool,
    tiny: Tiny,
    run: Run,
    shell: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    run("convert", tiny(), "--layer", 3, "--no-check", "--quiet", "-o", out).ok()
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_notForYou")
    close_session()  # which was made with the proxies of its time
    try:
        for words in (("analyze", "a/b"), ("push", out, "c/d")):
            told = (shell if in_a_shell else run)(*words, "--quiet")
            assert "hf_notForYou" not in told.sentence()
    finally:
        close_session()


def close_session() -> None:
    """End the connections of huggingface_hub; the next ones read the environment again."""
    import huggingface_hub

    end = getattr(huggingface_hub, "close_session", None) or huggingface_hub.reset_sessions
    end()


@pytest.mark.usefixtures("no_network")
def test_no_network_but_a_cached_model(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    """What was fetched before is used, as when offline on purpose."""
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / "models--someone--tiny"
    commit = "0123456789" * 4
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(tiny(), cached / "snapshots" / commit)
    try:
        words = ("convert", "someone/tiny", "--layer", 3, "--no-check", "--quiet")
        run(*words, "-o", tmp_path / "out").ok()
    finally:
        shutil.rmtree(cached)
    base = json.loads((tmp_path / "out" / "surgery.json").read_text())["base"]
    assert (base["kind"], base["name"], base["commit"]) == ("hub", "someone/tiny", commit)


@pytest.mark.usefixtures("no_network")
def test_pushing_without_a_network(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    run("convert", tiny(), "--layer", 3, "--no-check", "--quiet", "-o", tmp_path / "out").ok()
    sentence = run("push", tmp_path / "out", "someone/tiny", "--quiet").sentence()
    assert "Uploading to someone/tiny failed" in sentence
    assert "hf_test" not in sentence


def test_file_sha256(tmp_path: Path) -> None:
    import hashlib

    for size in (0, 1, 2**20, 2**20 + 1):
        raw = os.urandom(size)
        (tmp_path / "x").write_bytes(raw)
        assert file_sha256(tmp_path / "x") == hashlib.sha256(raw).hexdigest()
