"""A loopback stand-in for the Hugging Face Hub, for tests without a network.

`HubServer` speaks the part of the Hub's HTTP API that `huggingface_hub` (0.36 and 2.x) uses to
create, read and write repositories: point `HF_ENDPOINT` or `HfApi(endpoint=...)` at `server.url`.
File contents live on disk and are streamed; only commit metadata is held in memory. Everything
works on models, and on datasets and spaces under the keys "datasets/..." and "spaces/...".

Rules that match the real Hub and are easy to trip over:

- A new repository starts with one commit that holds only `.gitattributes`.
- A wrong token is refused everywhere, even where no token is needed. Without a token, a private
  repository and a missing one both answer 401.
- A commit may only refer to LFS objects uploaded (or duplicated) to the same repository.

There is no Xet storage. Downloads need nothing special for that, but huggingface_hub 2.x uploads
through Xet whenever `hf_xet` is installed, without asking the server. `HubServer.env` has the
`HF_HUB_DISABLE_XET=1` that prevents it in a subprocess, and `HubServer.patches` its equivalent
inside a process. The latter are also what huggingface_hub 0.36 needs in order to commit through
`HfApi(endpoint=...)`: it takes the URLs in answers apart by its own endpoint constant.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

CHUNK = 1 << 20
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
LFS_THRESHOLD = 10_000_000
GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)


class Request(NamedTuple):
    """One request the server got; `path` has its query, and only the token's presence is kept."""

    method: str
    path: str
    authorization: bool


@dataclass(frozen=True)
class Entry:
    """A file in a commit: its content's SHA-256 and size, and its git blob (LFS pointer) id."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def lfs_info(self, key: str) -> dict[str, Any]:
        """The `lfs` member of a JSON answer, empty for a regular file."""
        if not self.lfs:
            return {}
        pointer_size = len(_lfs_pointer(self.sha256, self.size))
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": pointer_size}}


@dataclass(frozen=True)
class Commit:
    """A commit; `pr` is the number of the pull request it was made on, if any."""

    sha: str
    title: str
    description: str
    parent: str | None
    pr: int | None
    date: str
    files: dict[str, Entry]


@dataclass
class Repo:
    """A repository: commits oldest first, and the head of each branch and `refs/pr/N`."""

    key: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a pull request ref or a commit id names."""
        sha = self.branches.get(revision, revision)
        return next((c for c in self.commits if c.sha == sha), None)

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The newest commit up to `commit` that changed a file or a folder."""
        while commit.parent and (parent := self.at(commit.parent)):
            if _under(parent.files, path) != _under(commit.files, path):
                break
            commit = parent
        return commit


@dataclass
class _Upload:
    """An LFS object on its way in, through a URL that needs no token."""

    repo: Repo
    oid: str
    size: int
    part_size: int
    path: Path


class _ApiError(Exception):
    """An error answer: status, message, the Hub's error code, and more headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        self.headers.update({k.replace("_", "-"): v for k, v in headers.items()})


class HubServer:
    """The server, as a context manager.

    `root` is where contents are kept (default: a temporary folder), `token` the one token that is
    accepted. With `part_size`, larger LFS files are uploaded in parts of that many bytes.
    """

    user = "tester"

    def __init__(
        self,
        root: str | Path | None = None,
        token: str = "hf_canary_0123456789",
        part_size: int | None = None,
    ) -> None:
        self.token = token
        self.part_size = part_size
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.bytes_sent = 0
        self.bytes_received = 0
        self.lock = threading.RLock()
        self.uploads: dict[str, _Upload] = {}
        self._faults: list[tuple[re.Pattern[str], int]] = []
        self._temporary = root is None
        self._root = Path(root or tempfile.mkdtemp(prefix="hub-server-"))
        for folder in ("objects", "incoming"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        if self._temporary:
            shutil.rmtree(self._root, ignore_errors=True)

    def env(self) -> dict[str, str]:
        """Environment variables that make a subprocess use this server, with its token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def patches(self) -> dict[str, Any]:
        """What to set to use this server inside a process that imported huggingface_hub before.

        The keys are dotted names, for `monkeypatch.setattr(name, value, raising=False)`: not every
        version has all of them.
        """
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        return {
            "huggingface_hub.constants.ENDPOINT": self.url,
            "huggingface_hub.constants.HF_HUB_DISABLE_XET": True,
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": template,
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE": template,
            "huggingface_hub.hf_api.api.endpoint": self.url,
        }

    def fail(self, pattern: str, status: int | None, times: int = 1) -> None:
        """Make the next `times` requests whose "METHOD /path?query" matches answer `status`.

        With None, the connection is closed without an answer.
        """
        self._faults += [(re.compile(pattern), status or 0)] * times

    def repo(self, repo_id: str) -> Repo:
        return self.repos[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Path]:
        """Where the content of each file of a revision is stored."""
        commit = self.repos[repo_id].at(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return {path: self.object_path(entry.sha256) for path, entry in commit.files.items()}

    def add_repo(
        self, repo_id: str, folder: str | Path, private: bool = False, revision: str = "main"
    ) -> str:
        """Make the files in `folder` the next commit of a branch; returns the commit id.

        A missing repository or branch is created. LFS files are hard-linked where possible.
        """
        folder = Path(folder)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            lfs = _is_lfs(name, path.stat().st_size)
            incoming = self.incoming_path()
            try:
                (os.link if lfs else shutil.copyfile)(path.resolve(), incoming)
            except OSError:
                shutil.copyfile(path, incoming)
            files[name] = self.entry(self.store(incoming), lfs)
        with self.lock:
            repo = self.repos.get(repo_id) or self.create_repo(repo_id, private)
            repo.lfs.update(entry.sha256 for entry in files.values() if entry.lfs)
            parent = repo.branches.get(revision, repo.branches["main"])
            return self.commit(repo, revision, parent, files, "Add files").sha

    def create_repo(self, key: str, private: bool) -> Repo:
        """Create a repository with its initial commit."""
        attributes = self.entry(self.store_bytes(GITATTRIBUTES.encode()), lfs=False)
        repo = self.repos[key] = Repo(key, private)
        self.commit(repo, "main", None, {".gitattributes": attributes}, "initial commit")
        return repo

    def commit(
        self,
        repo: Repo,
        branch: str,
        parent: str | None,
        files: dict[str, Entry],
        title: str,
        description: str = "",
    ) -> Commit:
        """Add a commit and move `branch` to it."""
        match = re.fullmatch(r"refs/pr/(\d+)", branch)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        tree = sorted((path, entry.oid) for path, entry in files.items())
        identity = repr((repo.key, len(repo.commits), date, parent, title, tree))
        sha = hashlib.sha1(identity.encode()).hexdigest()
        pr = int(match[1]) if match else None
        commit = Commit(sha, title, description, parent, pr, date, files)
        repo.commits.append(commit)
        repo.branches[branch] = sha
        return commit

    def incoming_path(self) -> Path:
        return self._root / "incoming" / secrets.token_hex(16)

    def object_path(self, sha256: str) -> Path:
        return self._root / "objects" / sha256

    def store(self, incoming: Path) -> str:
        """Move a file into the store; returns its SHA-256."""
        digest = hashlib.sha256()
        with open(incoming, "rb") as stream:
            while data := stream.read(CHUNK):
                digest.update(data)
        os.replace(incoming, self.object_path(digest.hexdigest()))
        return digest.hexdigest()

    def store_bytes(self, data: bytes) -> str:
        incoming = self.incoming_path()
        incoming.write_bytes(data)
        return self.store(incoming)

    def entry(self, sha256: str, lfs: bool) -> Entry:
        """Describe stored content as a file of a commit."""
        path = self.object_path(sha256)
        size = path.stat().st_size
        blob = _lfs_pointer(sha256, size) if lfs else path.read_bytes()
        return Entry(sha256, size, hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(), lfs)

    def count(self, sent: int = 0, received: int = 0) -> None:
        """Count bytes of request and answer bodies."""
        with self.lock:
            self.bytes_sent += sent
            self.bytes_received += received

    def take_fault(self, request: str) -> int | None:
        """Use up a fault meant for this request: its status, 0 to close the connection."""
        with self.lock:
            fault = next((f for f in self._faults if f[0].search(request)), None)
            if fault is None:
                return None
            self._faults.remove(fault)
            return fault[1]


class _Server(ThreadingHTTPServer):
    hub: HubServer
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what a handler raised, unless the client just went away."""
        with contextlib.suppress(ConnectionError):
            raise
        super().handle_error(request, client_address)


class _Body(io.RawIOBase):
    """A request's body, sized or chunked."""

    def __init__(
        self, stream: io.BufferedIOBase, length: int, chunked: bool, hub: HubServer
    ) -> None:
        self._stream, self._left, self._chunked, self._hub = stream, length, chunked, hub

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._chunked and not self._left:
            self._left = int(self._stream.readline().split(b";")[0], 16)
            if not self._left:
                self._chunked = False
                self._stream.readline()
        data = self._stream.read(min(len(buffer), self._left))
        if self._left and not data:
            raise ConnectionError("the client closed the connection inside a body")
        self._left -= len(data)
        if self._chunked and not self._left:
            self._stream.readline()
        self._hub.count(received=len(data))
        buffer[: len(data)] = data
        return len(data)


class _Handler(BaseHTTPRequestHandler):
    """Routes and answers requests; `on_*` methods get the URL's parts unquoted."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_request(self) -> None:
        self.hub = self.server.hub
        length = int(self.headers.get("Content-Length", 0))
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.body = io.BufferedReader(_Body(self.rfile, length, chunked, self.hub), CHUNK)
        authorization = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, self.path, authorization is not None))
        fault = self.hub.take_fault(f"{self.command} {self.path}")
        if fault == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if fault:
                raise _ApiError(fault, "Injected fault")
            self.authorized = authorization == f"Bearer {self.hub.token}"
            if authorization and not self.authorized:
                raise _ApiError(401, "Invalid credentials in Authorization header")
            self.route()
        except _ApiError as error:
            self.reply({"error": str(error)}, error.status, error.headers)

    def log_message(self, *args: object) -> None:
        """Print nothing; `HubServer.requests` is the record."""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

    def route(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        for methods, pattern, handler in _ROUTES:
            if self.command in methods and (match := pattern.fullmatch(path)):
                groups = {k: unquote(v or "") for k, v in match.groupdict().items()}
                return getattr(self, handler)(**groups)
        raise _ApiError(404, f"No such endpoint: {self.command} {path}")

    # Answers and checks

    def start_reply(self, status: int, length: int, headers: dict[str, str]) -> None:
        while self.body.read(CHUNK):
            pass  # an answer before the end of the body could get lost
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self.start_reply(status, len(content), headers)
        if self.command != "HEAD":
            self.send(content)

    def send(self, data: bytes) -> None:
        self.hub.count(sent=len(data))
        self.wfile.write(data)

    def json_body(self) -> Any:
        return json.loads(self.body.read())

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def require_token(self) -> None:
        if not self.authorized:
            raise _ApiError(401, "Invalid username or password.")

    def find_repo(self, kind: str, name: str, write: bool = False) -> Repo:
        if write:
            self.require_token()
        repo = self.hub.repos.get(_key(kind, name))
        if repo is None or (repo.private and not self.authorized):
            if self.authorized:
                raise _ApiError(404, "Repository not found", "RepoNotFound")
            raise _ApiError(401, "Invalid username or password.", "RepoNotFound")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise _ApiError(404, f"Invalid rev id: {revision!a}", "RevisionNotFound")
        return commit

    # Account and repositories

    def on_whoami(self) -> None:
        self.require_token()
        access = {"displayName": "test", "role": "write"}
        auth = {"type": "access_token", "accessToken": access}
        name = self.hub.user
        self.reply({"type": "user", "id": "0", "name": name, "orgs": [], "auth": auth})

    def on_create(self) -> None:
        self.require_token()
        data = self.json_body()
        name = f"{data.get('organization') or self.hub.user}/{data['name']}"
        key = _key(f"{data.get('type') or 'model'}s", name)
        private = data.get("private") or data.get("visibility", "public") != "public"
        answer = {"url": f"{self.hub.url}/{key}", "name": name}
        with self.hub.lock:
            if key in self.hub.repos:
                return self.reply({"error": "You already created this repo", **answer}, 409)
            self.hub.create_repo(key, private)
        self.reply(answer)

    def on_validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def on_branch(self, kind: str, name: str, rev: str) -> None:
        repo = self.find_repo(kind, name, write=True)
        if rev.startswith("refs/"):
            raise _ApiError(400, f"Invalid reference for a branch: {rev!a}")
        start = self.find_commit(repo, self.json_body().get("startingPoint", ""))
        with self.hub.lock:
            if rev in repo.branches:
                raise _ApiError(409, f"Reference already exists: refs/heads/{rev!a}")
            repo.branches[rev] = start.sha
        self.reply({})

    # Reading

    def on_info(self, kind: str, name: str, rev: str) -> None:
        repo = self.find_repo(kind, name)
        commit = self.find_commit(repo, rev)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if self.flag("blobs"):
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]]
                sibling.update(size=entry.size, blobId=entry.oid, **entry.lfs_info("sha256"))
        info = {
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repo.commits[0].date,
            "private": repo.private,
            "gated": False,
            "tags": [],
            "siblings": siblings,
        }
        self.reply(info)

    def on_refs(self, kind: str, name: str) -> None:
        repo = self.find_repo(kind, name)
        refs: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        if self.flag("include_prs"):
            refs["pullRequests"] = []
        for ref, sha in repo.branches.items():
            if not ref.startswith("refs/pr/"):
                full = f"refs/heads/{ref}"
                refs["branches"].append({"name": ref, "ref": full, "targetCommit": sha})
            elif "pullRequests" in refs:
                refs["pullRequests"].append({"name": ref, "ref": ref, "targetCommit": sha})
        self.reply(refs)

    def describe(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
        """A file or a folder, as in the answers of `tree` and `paths-info`."""
        if entry := commit.files.get(path):
            item = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            item.update(entry.lfs_info("oid"))
        else:
            tree = repr(sorted(_under(commit.files, path).items()))
            oid = hashlib.sha1(tree.encode()).hexdigest()
            item = {"type": "directory", "oid": oid, "size": 0, "path": path}
        if expand:
            last = repo.last_change(commit, path)
            item["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        return item

    def on_tree(self, kind: str, name: str, rev: str, path: str) -> None:
        repo = self.find_repo(kind, name)
        commit = self.find_commit(repo, rev)
        prefix = f"{path}/" if path else ""
        paths: set[str] = set()
        for file in commit.files:
            if file.startswith(prefix):
                steps = file[len(prefix) :].split("/")
                depth = len(steps) if self.flag("recursive") else 1
                paths.update(prefix + "/".join(steps[: n + 1]) for n in range(depth))
        if path and not paths:
            raise _ApiError(404, f"{path!a} does not exist", "EntryNotFound")
        expand = self.flag("expand")
        self.reply([self.describe(repo, commit, path, expand) for path in sorted(paths)])

    def on_paths_info(self, kind: str, name: str, rev: str) -> None:
        repo = self.find_repo(kind, name)
        commit = self.find_commit(repo, rev)
        form = parse_qs(self.body.read().decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        items = []
        for path in form.get("paths", []):
            if _under(commit.files, path):
                item = self.describe(repo, commit, path, expand)
                if "lfs" in item and not expand:
                    # Copies between repositories insist on a Xet hash. Nothing reads a file by
                    # the one given here, while one in `tree` would make clients try.
                    item["xetHash"] = item["lfs"]["oid"]
                items.append(item)
        self.reply(items)

    def on_resolve(self, kind: str, name: str, rev: str, path: str) -> None:
        repo = self.find_repo(kind, name)
        commit = self.find_commit(repo, rev)
        entry = commit.files.get(path)
        if entry is None:
            raise _ApiError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.split('/')[-1])}",
            "ETag": f'"{entry.etag}"',
            "X-Repo-Commit": commit.sha,
            "Accept-Ranges": "bytes",
        }
        if entry.lfs:
            headers["X-Linked-Size"] = str(entry.size)
            headers["X-Linked-Etag"] = f'"{entry.etag}"'
        status, start, end = 200, 0, entry.size
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match and (match[1] or match[2]):
            status = 206
            if match[1]:
                start = int(match[1])
                end = min(entry.size, int(match[2]) + 1) if match[2] else entry.size
            else:
                start = max(0, entry.size - int(match[2]))
            if start >= end:
                whole = f"bytes */{entry.size}"
                raise _ApiError(416, "Range not satisfiable", Content_Range=whole)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size}"
        self.start_reply(status, end - start, headers)
        if self.command == "GET":
            with open(self.hub.object_path(entry.sha256), "rb") as stream:
                stream.seek(start)
                while data := stream.read(min(CHUNK, end - start)):
                    self.send(data)
                    start += len(data)

    # Writing

    def on_preupload(self, kind: str, name: str, rev: str) -> None:
        repo = self.find_repo(kind, name, write=True)
        commit = self.find_commit(repo, rev)
        data = self.json_body()
        ignore = data.get("gitIgnore")
        if ignore is None and (entry := commit.files.get(".gitignore")):
            ignore = self.hub.object_path(entry.sha256).read_text(encoding="utf-8")
        files = []
        for item in data["files"]:
            mode = "lfs" if _is_lfs(item["path"], item["size"]) else "regular"
            answer = {"path": item["path"], "uploadMode": mode}
            answer["shouldIgnore"] = _is_ignored(item["path"], ignore or "")
            if entry := commit.files.get(item["path"]):
                answer["oid"] = entry.etag
            files.append(answer)
        self.reply({"files": files})

    def on_lfs_batch(self, kind: str, name: str) -> None:
        repo = self.find_repo(kind, name, write=True)
        part_size = self.hub.part_size
        objects = []
        for item in self.json_body()["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repo.lfs:
                upload_id = secrets.token_urlsafe(16)
                url = f"{self.hub.url}/lfs/{upload_id}"
                upload: dict[str, Any] = {"href": f"{url}/1"}
                if part_size and size > part_size:
                    parts = range(1, -(-size // part_size) + 1)
                    header = {str(part): f"{url}/{part}" for part in parts}
                    upload = {
                        "href": f"{url}/complete",
                        "header": {"chunk_size": str(part_size), **header},
                    }
                verify = f"{self.hub.url}/{repo.key}.git/info/lfs/objects/verify"
                answer["actions"] = {"upload": upload, "verify": {"href": verify}}
                incoming = self.hub.incoming_path()
                self.hub.uploads[upload_id] = _Upload(repo, oid, size, part_size or size, incoming)
            objects.append(answer)
        self.reply({"transfer": "multipart" if part_size else "basic", "objects": objects})

    def find_upload(self, upload_id: str) -> _Upload:
        if upload := self.hub.uploads.get(upload_id):
            return upload
        raise _ApiError(403, "Unknown upload")

    def on_lfs_put(self, upload_id: str, part: str) -> None:
        upload = self.find_upload(upload_id)
        descriptor = os.open(upload.path, os.O_WRONLY | os.O_CREAT, 0o644)  # keeps other parts
        with open(descriptor, "wb") as stream:
            stream.seek((int(part) - 1) * upload.part_size)
            shutil.copyfileobj(self.body, stream, CHUNK)
        if upload.size <= upload.part_size:
            self.finish_upload(upload)
        self.reply({}, headers={"ETag": f'"{part}"'})

    def on_lfs_complete(self, upload_id: str) -> None:
        self.finish_upload(self.find_upload(upload_id))
        self.reply({})

    def finish_upload(self, upload: _Upload) -> None:
        size = upload.path.stat().st_size
        if self.hub.store(upload.path) != upload.oid or size != upload.size:
            raise _ApiError(400, "The uploaded content does not match its announced id")
        upload.repo.lfs.add(upload.oid)

    def on_lfs_verify(self, kind: str, name: str) -> None:
        repo = self.find_repo(kind, name, write=True)
        if self.json_body()["oid"] not in repo.lfs:
            raise _ApiError(404, "The object was not uploaded")
        self.reply({})

    def on_lfs_duplicate(self, kind: str, name: str) -> None:
        source = self.find_repo(kind, name)
        data = self.json_body()
        target = self.find_repo(data["target"]["type"] + "s", data["target"]["name"], write=True)
        failed = []
        for item in data["files"]:
            if item["sha256"] in source.lfs:
                target.lfs.add(item["sha256"])
            else:
                failed.append({"sha256": item["sha256"], "error": "No such object"})
        self.reply({"failed": failed})

    def on_commit(self, kind: str, name: str, rev: str) -> None:
        repo = self.find_repo(kind, name, write=True)
        header: dict[str, str] = {}
        operations: list[tuple[str, Entry | None]] = []  # None deletes; folders end in "/"
        for line in self.body:
            item = json.loads(line)
            key, value = item["key"], item["value"]
            path = value.get("path", "")
            if {"..", ".git"} & set(path.split("/")):
                raise _ApiError(400, f"Invalid path: {path!a}")
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                operations.append((path, self.hub.entry(self.hub.store_bytes(content), lfs=False)))
            elif key == "lfsFile":
                if value["oid"] not in repo.lfs:
                    message = "LFS pointer pointed to a file that does not exist"
                    raise _ApiError(400, f"Your push was rejected because an {message}")
                operations.append((path, self.hub.entry(value["oid"], lfs=True)))
            elif key == "deletedFile":
                operations.append((path, None))
            elif key == "deletedFolder":
                operations.append((path.rstrip("/") + "/", None))
            else:
                raise _ApiError(400, f"Unknown operation: {key!a}")
        with self.hub.lock:
            base = self.find_commit(repo, rev)
            if header.get("parentCommit", base.sha) != base.sha:
                raise _ApiError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for path, entry in operations:
                if entry:
                    files[path] = entry
                    continue
                gone = _under(files, path.rstrip("/"))
                if not gone or (path in files) == path.endswith("/"):
                    message = f"A file with this name doesn't exist: {path!a}"
                    raise _ApiError(404, message, "EntryNotFound")
                for gone_path in gone:
                    del files[gone_path]
            branch, answer = rev, {}
            if self.flag("create_pr"):
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.branches)
                branch = f"refs/pr/{number}"
                pull_request = f"{self.hub.url}/{repo.key}/discussions/{number}"
                answer["pullRequestUrl"] = pull_request
            elif rev not in repo.branches:
                raise _ApiError(400, f"Not a branch: {rev!a}")
            summary, description = header.get("summary", ""), header.get("description", "")
            commit = self.hub.commit(repo, branch, base.sha, files, summary, description)
        answer["commitOid"] = commit.sha
        answer["commitUrl"] = f"{self.hub.url}/{repo.key}/commit/{commit.sha}"
        self.reply({"success": True, **answer})


_NAME = r"(?P<name>[^/]+(?:/[^/]+)??)"
_API = r"/api/(?P<kind>models|datasets|spaces)/" + _NAME
_GIT = r"/(?:(?P<kind>datasets|spaces)/)?" + _NAME
_REV = r"(?P<rev>refs/[^/]+/[^/]+|[^/]+)"
_UPLOAD = r"/lfs/(?P<upload_id>[^/]+)"
_ROUTES = [
    (methods.split(), re.compile(pattern), handler)
    for methods, pattern, handler in (
        ("GET", r"/api/whoami-v2", "on_whoami"),
        ("POST", r"/api/repos/create", "on_create"),
        ("POST", r"/api/validate-yaml", "on_validate_yaml"),
        ("POST", rf"{_API}/branch/{_REV}", "on_branch"),
        ("GET", rf"{_API}/refs", "on_refs"),
        ("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.*))?", "on_tree"),
        ("POST", rf"{_API}/paths-info/{_REV}", "on_paths_info"),
        ("POST", rf"{_API}/preupload/{_REV}", "on_preupload"),
        ("POST", rf"{_API}/commit/{_REV}", "on_commit"),
        ("POST", rf"{_API}/lfs-files/duplicate", "on_lfs_duplicate"),
        ("GET", rf"{_API}(?:/revision/{_REV})?", "on_info"),
        ("POST", rf"{_GIT}\.git/info/lfs/objects/batch", "on_lfs_batch"),
        ("POST", rf"{_GIT}\.git/info/lfs/objects/verify", "on_lfs_verify"),
        ("PUT", rf"{_UPLOAD}/(?P<part>\d+)", "on_lfs_put"),
        ("POST", rf"{_UPLOAD}/complete", "on_lfs_complete"),
        ("GET HEAD", rf"{_GIT}/resolve/{_REV}/(?P<path>.+)", "on_resolve"),
    )
]


def _key(kind: str, name: str) -> str:
    return name if kind in ("", "models") else f"{kind}/{name}"


def _under(files: dict[str, Entry], path: str) -> dict[str, Entry]:
    """The file at `path`, or the files in that folder."""
    return {p: e for p, e in files.items() if p == path or p.startswith(f"{path}/")}


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD


def _is_ignored(path: str, gitignore: str) -> bool:
    """Whether .gitignore rules exclude a path."""
    steps = path.split("/")
    ignored = False
    for rule in gitignore.splitlines():
        pattern = rule.strip().removeprefix("!").rstrip("/")
        if not pattern or pattern.startswith("#"):
            continue
        if "/" in pattern:
            pattern = pattern.removeprefix("/")
            names = ["/".join(steps[: n + 1]) for n in range(len(steps))]
        else:
            names = steps
        if any(fnmatchcase(name, pattern) for name in names):
            ignored = not rule.startswith("!")
    return ignored


def _lfs_pointer(sha256: str, size: int) -> bytes:
    """The content of the git blob that stands for an LFS file."""
    version = "version https://git-lfs.github.com/spec/v1"
    return f"{version}\noid sha256:{sha256}\nsize {size}\n".encode()
