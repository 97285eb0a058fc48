"""The Hub stand-in, exercised through the installed huggingface_hub."""

from __future__ import annotations

import inspect
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from script import run as run_program

REPO = "tester/model"
WEIGHTS = os.urandom(3 << 20)


def use(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.patches().items():
        monkeypatch.setattr(name, value, raising=False)


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server, with nothing in reach of the user's own token and cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(tmp_path / "hub") as server:
        use(server, monkeypatch)
        yield server


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi(endpoint=server.url, token=server.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Model\n",
        "config.json": b"{}\n",
        "empty.txt": b"",
        "model.safetensors": WEIGHTS,
        "nested/deep/notes.txt": b"notes",
        "nested/naïve name#1.txt": b"odd",
    }
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def stored(server: HubServer, repo_id: str = REPO, revision: str = "main") -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in server.files(repo_id, revision).items()}


def test_upload_and_download(server: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    assert api.whoami()["name"] == "tester"
    url = api.create_repo(REPO, private=True)
    assert (url.repo_id, server.repo(REPO).private) == (REPO, True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, private=True, exist_ok=True).repo_id == REPO

    first = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First")
    assert first.repo_url.repo_id == REPO
    gitattributes = stored(server)[".gitattributes"]
    assert stored(server) == {**contents(folder), ".gitattributes": gitattributes}
    assert server.bytes_received > len(WEIGHTS)

    local = api.snapshot_download(REPO, cache_dir=tmp_path / "cache")
    assert contents(Path(local)) == stored(server)
    assert server.bytes_sent > len(WEIGHTS)
    assert Path(local).name == first.oid

    received = server.bytes_received
    (folder / "config.json").unlink()
    (folder / "new.txt").write_text("new")
    api.upload_folder(
        repo_id=REPO,
        folder_path=folder,
        commit_message="Second",
        commit_description="Details",
        delete_patterns="*",
    )
    assert server.bytes_received - received < 100_000  # the weights are not sent again
    assert stored(server) == {**contents(folder), ".gitattributes": gitattributes}
    commits = server.repo(REPO).commits
    assert [c.title for c in commits] == ["initial commit", "First", "Second"]
    assert [c.parent for c in commits] == [None, commits[0].sha, first.oid]
    assert (commits[2].description, commits[2].pr) == ("Details", None)

    assert "config.json" in api.list_repo_files(REPO, revision=first.oid)
    local = api.snapshot_download(REPO, local_dir=tmp_path / "local")
    assert contents(Path(local)) == stored(server)


def test_unchanged_files_make_no_commit(server: HubServer, api: HfApi, folder: Path) -> None:
    sha = server.add_repo(REPO, folder)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == sha


def test_multipart_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(part_size=1_000_000) as server:
        use(server, monkeypatch)
        api = HfApi(endpoint=server.url, token=server.token)
        server.create_repo(REPO, private=True)
        operation = CommitOperationAdd("model.safetensors", WEIGHTS)
        api.create_commit(REPO, [operation], commit_message="Add")
        puts = [r for r in server.requests if r.method == "PUT"]
        assert len(puts) == 4
        assert not any(r.authorization for r in puts)
        assert stored(server)["model.safetensors"] == WEIGHTS


def test_commits_and_revisions(server: HubServer, api: HfApi, folder: Path) -> None:
    parent = server.add_repo(REPO, folder)
    operations = [
        CommitOperationAdd("added.txt", b"added"),
        CommitOperationDelete("nested/"),
        CommitOperationDelete("empty.txt"),
    ]
    pull = api.create_commit(REPO, operations, commit_message="Proposal", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    commit = server.repo(REPO).at("refs/pr/1")
    assert commit
    assert (commit.sha, commit.parent, commit.pr) == (pull.oid, parent, 1)
    expected = {"README.md", "added.txt", "config.json", "model.safetensors"}
    assert set(api.list_repo_files(REPO, revision="refs/pr/1")) == expected
    assert server.repo(REPO).branches["main"] == parent
    assert api.upload_file(
        path_or_fileobj=b"more", path_in_repo="more.txt", repo_id=REPO, revision="refs/pr/1"
    )
    assert stored(server, revision="refs/pr/1")["more.txt"] == b"more"

    api.create_branch(REPO, branch="dev", exist_ok=True)
    api.create_branch(REPO, branch="dev", exist_ok=True)
    api.delete_file("config.json", REPO, revision="dev")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "dev"}
    assert refs.pull_requests
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    assert {ref.target_commit for ref in refs.branches if ref.name == "main"} == {parent}

    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [operations[2]], commit_message="Late", parent_commit="0" * 40)
    with pytest.raises(EntryNotFoundError):
        api.delete_file("absent.txt", REPO)
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_files(REPO, revision="absent")


def test_datasets(server: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    repo_id = api.create_repo("data", private=True, repo_type="dataset").repo_id
    assert repo_id == "tester/data"
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset")
    assert (commit.repo_url.repo_type, commit.repo_url.repo_id) == ("dataset", repo_id)
    local = api.snapshot_download(repo_id, repo_type="dataset", cache_dir=tmp_path / "cache")
    assert contents(Path(local)) == stored(server, f"datasets/{repo_id}")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo_id)


def test_gitignore(server: HubServer, api: HfApi) -> None:
    server.create_repo(REPO, private=False)
    rules = b"# logs\n*.log\n!keep.log\n/build/\ndocs/*.tmp\n"
    names = ["a.log", "x/b.log", "x/keep.log", "build/c", "x/build/c", "docs/d.tmp"]
    operations = [CommitOperationAdd(name, b"x") for name in names]
    operations.append(CommitOperationAdd(".gitignore", rules))
    api.create_commit(REPO, operations, commit_message="Ignore")
    kept = {".gitattributes", ".gitignore", "x/keep.log", "x/build/c"}
    assert set(server.files(REPO)) == kept


def test_listings(server: HubServer, api: HfApi, folder: Path) -> None:
    first = server.add_repo(REPO, folder)
    (folder / "config.json").write_text('{"changed": true}')
    second = server.add_repo(REPO, folder)
    tree = {item.path: item for item in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert set(tree) == {*contents(folder), "nested", "nested/deep"}
    assert tree["config.json"].last_commit.oid == second
    assert tree["nested"].last_commit.oid == first
    assert tree["model.safetensors"].lfs.size == len(WEIGHTS)
    nested = api.list_repo_tree(REPO, "nested")
    assert {item.path for item in nested} == {"nested/deep", "nested/naïve name#1.txt"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    found = api.get_paths_info(REPO, ["nested", "README.md", "absent"])
    assert {item.path for item in found} == {"nested", "README.md"}
    info = api.model_info(REPO, revision=first, files_metadata=True)
    assert (info.sha, info.private) == (first, False)
    sizes = {s.rfilename: (s.size, s.lfs is not None) for s in info.siblings or []}
    assert sizes["model.safetensors"] == (len(WEIGHTS), True)
    assert sizes["empty.txt"] == (0, False)


def test_ranges(server: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    server.add_repo(REPO, folder, private=True)
    fs = HfFileSystem(endpoint=server.url, token=server.token, skip_instance_cache=True)
    assert f"{REPO}/nested" in fs.ls(REPO, detail=False)
    with fs.open(f"{REPO}/model.safetensors", block_size=4096) as file:
        file.seek(1_000_000)
        assert file.read(1000) == WEIGHTS[1_000_000:1_001_000]
    assert server.bytes_sent < 100_000
    assert fs.cat_file(f"{REPO}/model.safetensors", start=-10) == WEIGHTS[-10:]
    assert fs.cat_file(f"{REPO}/README.md") == contents(folder)["README.md"]
    fs.get_file(f"{REPO}/model.safetensors", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == WEIGHTS

    url = f"{server.url}/{REPO}/resolve/main/model.safetensors"
    headers = {"Authorization": f"Bearer {server.token}", "Range": "bytes=-5"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        size = len(WEIGHTS)
        assert (answer.status, answer.read()) == (206, WEIGHTS[-5:])
        assert answer.headers["Content-Range"] == f"bytes {size - 5}-{size - 1}/{size}"
        assert answer.headers["X-Linked-Size"] == str(size)
    headers["Range"] = f"bytes={size}-"
    with pytest.raises(HTTPError, match="416") as caught:
        urllib.request.urlopen(urllib.request.Request(url, headers=headers))
    with caught.value as answer:
        assert answer.headers["Content-Range"] == f"bytes */{size}"


def test_tokens(server: HubServer, folder: Path, tmp_path: Path) -> None:
    server.add_repo("tester/private", folder, private=True)
    server.add_repo("tester/public", folder)
    wrong = HfApi(endpoint=server.url, token="hf_wrong")
    anonymous = HfApi(endpoint=server.url, token=False)
    right = HfApi(endpoint=server.url, token=server.token)
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.model_info("tester/public")
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.create_repo("tester/other")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        anonymous.hf_hub_download("tester/private", "config.json", cache_dir=tmp_path / "cache")
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.upload_file(
            path_or_fileobj=b"", path_in_repo="file", repo_id="tester/public", commit_message="No"
        )
    with pytest.raises(RepositoryNotFoundError, match="404"):
        right.model_info("tester/absent")
    assert anonymous.model_info("tester/public").id == "tester/public"
    assert right.model_info("tester/private").private
    assert len(server.repo("tester/public").commits) == 2
    assert {r.authorization for r in server.requests if "public" in r.path} == {True, False}
    assert server.token not in repr(server.requests)


def test_copies(server: HubServer, api: HfApi, folder: Path) -> None:
    server.add_repo(REPO, folder)
    copies = [
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("config.json", "copy.json"),
    ]
    api.create_commit(REPO, copies, commit_message="Copy")
    assert stored(server)["copy.safetensors"] == WEIGHTS
    assert stored(server)["copy.json"] == contents(folder)["config.json"]


@pytest.mark.skipif(
    "src_repo_id" not in inspect.signature(CommitOperationCopy).parameters,
    reason="this huggingface_hub copies only inside a repository",
)
def test_copies_between_repositories(server: HubServer, api: HfApi, folder: Path) -> None:
    server.add_repo("tester/source", folder)
    server.create_repo(REPO, private=True)
    source = {"src_repo_id": "tester/source", "src_repo_type": "model"}
    copies = [
        CommitOperationCopy("model.safetensors", "copy.safetensors", **source),
        CommitOperationCopy("README.md", "README.md", **source),
    ]
    api.create_commit(REPO, copies, commit_message="Copy")
    assert stored(server)["copy.safetensors"] == WEIGHTS
    assert server.bytes_received < 100_000
    assert server.bytes_sent < 100_000


def test_faults(server: HubServer, api: HfApi, folder: Path) -> None:
    server.create_repo(REPO, private=False)
    server.fail(r"PUT /lfs/", None)
    server.fail(r"GET .*/resolve/.*/config\.json", 503, times=2)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert stored(server)["model.safetensors"] == WEIGHTS
    assert sum(r.method == "PUT" for r in server.requests) == 2
    url = f"{server.url}/{REPO}/resolve/main/config.json"
    for _ in range(2):
        with pytest.raises(HTTPError, match="503") as caught:
            urllib.request.urlopen(url)
        caught.value.close()
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == contents(folder)["config.json"]


def test_subprocess(server: HubServer, folder: Path, tmp_path: Path) -> None:
    script = (
        "from huggingface_hub import create_repo, upload_folder\n"
        f"create_repo({REPO!r})\n"
        f"upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})\n"
    )
    env = {**server.env(), "HF_HOME": str(tmp_path / "home")}
    run_program(sys.executable, "-c", script, env=env, check=True)
    assert stored(server)["model.safetensors"] == WEIGHTS
