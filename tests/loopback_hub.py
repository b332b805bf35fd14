"""A Hub of models and datasets on this machine, in memory, for the real clients: huggingface_hub, datasets and timm."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
import yaml
from huggingface_hub import HfFileSystem, close_session

USER = "me"  # the only one; other namespaces exist through `LoopbackHub.publish` alone
WRITE_TOKEN = "hf_secretsecretsecretsecretsecretsecret"
READ_TOKEN = "hf_readreadreadreadreadreadreadreadread"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read"}


class Fault(NamedTuple):
    """What goes wrong with one answer; `cut` and `flip` are for its body, after the request has had its effect."""

    status: int = 0  # this one instead, and nothing is done
    cut: int | None = None  # bytes after which the connection ends
    flip: int | None = None  # index of the byte that arrives with all bits wrong


class Answer(NamedTuple):
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})
    status: int = 200


class Refused(Exception):
    """An answer that the clients turn into one of their errors, by its `code`."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.answer = _json(dict(error=message), status, headers)


class Commit(NamedTuple):
    id: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository; who may not read a `private` one does not learn of it, nor get the files of a `gated` one."""

    kind: str  # models or datasets
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)  # of all branches, oldest first
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def find(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag or an id names."""
        named = self.branches.get(revision) or self.tags.get(revision) or revision
        if named not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[named]

    def commit(self, files: dict[str, bytes], title: str, branch: str = "main") -> str:
        """Put a commit with these files, and no others, onto a branch; returns its id."""
        content = sorted((path, git_blob(path, body)) for path, body in files.items())
        commit = hashlib.sha1(repr((self.path, self.branches.get(branch), title, content)).encode()).hexdigest()
        self.commits[commit] = Commit(commit, title, files)
        self.branches[branch] = commit
        return commit


class Request(BaseHTTPRequestHandler):
    """A client's connection, and what it asks for now: `parts` of the path, `query`, `body` and its token's `role`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits for the client to confirm the headers

    def setup(self) -> None:
        super().setup()
        self.hub: LoopbackHub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        fault = (self.hub.fault and self.hub.fault(self.command, self.path)) or Fault()
        try:
            if fault.status:
                raise Refused(fault.status, message="a fault that the test asked for")
            self.parse()
            with self.hub.lock:
                answer = self.hub.answer(self)
        except Refused as refused:
            answer = refused.answer
        self.send(answer, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def parse(self) -> None:
        url = urlsplit(self.path)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = parse_qs(url.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ROLES:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.role = ROLES.get(token, "")

    def send(self, answer: Answer, fault: Fault) -> None:
        body = bytearray(answer.body)
        if fault.flip is not None:
            body[fault.flip] ^= 255
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: fault.cut])
            self.close_connection |= fault.cut is not None

    def log_message(self, *args) -> None:
        pass


class LoopbackHub:
    """Repositories that their user can write and others can read, at `url`.

    `requests` lists "METHOD path" of everything asked for. Before each answer `fault` is called with these two; it
    may return what goes wrong, or wait.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}  # kind and id
        self.objects: dict[str, bytes] = {}  # what LFS keeps, by its SHA-256
        self.requests: list[str] = []
        self.fault: Callable[[str, str], Fault | None] | None = None
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        self.port = 0  # any
        self.start()

    def start(self) -> None:
        """Answer, after `stop` at the same address as before it."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Request)
        self.server.hub = self
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Nobody answers any more, and open connections end."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def repo(self, repo_id: str, repo_type: str = "dataset") -> Repo:
        return self.repos[f"{repo_type}s", repo_id]

    def publish(
        self, repo_id: str, files: dict[str, bytes], *, tag: str | None = None, repo_type: str = "dataset"
    ) -> str:
        """Add a commit with these files, and no others, to the main branch of a repository; returns its id."""
        kind = f"{repo_type}s"
        repo = self.repos.setdefault((kind, repo_id), Repo(kind, repo_id))
        commit = repo.commit(files, "publish")
        if tag:
            repo.tags[tag] = commit
        return commit

    def answer(self, request: Request) -> Answer:
        match [request.command, *request.parts]:
            case ["GET", "api", "whoami-v2"]:
                return _whoami(request)
            case ["POST", "api", "validate-yaml"]:
                return _validated(json.loads(request.body)["content"])
            case ["POST", "api", "repos", "create"]:
                return self._create(request)
            case ["PUT", "lfs-objects", sha256]:
                return self._store(sha256, request.body)
            case [_, "api", ("models" | "datasets") as kind, owner, name, *asked]:
                return self._answer_api(self._readable(kind, f"{owner}/{name}", request), asked, request)
            case [_, "datasets", owner, name, *asked] if asked:
                return self._answer_files("datasets", f"{owner}/{name}", asked, request)
            case [_, owner, name, *asked]:
                return self._answer_files("models", f"{owner}/{name}", asked, request)
        raise Refused(404, message="Sorry, we can't find the page you are looking for.")

    def _answer_api(self, repo: Repo, asked: list[str], request: Request) -> Answer:
        match [request.command, *asked]:
            case ["GET"] | ["GET", "revision", _]:
                return _info(repo, repo.find(*asked[1:]), "blobs" in request.query)
            case ["GET", "refs"]:
                return _refs(repo)
            case ["GET", "tree", revision, *folder]:
                _check_open(repo, request)
                return _tree(repo.find(revision), "/".join(folder), request.query)
            case ["POST", "paths-info", revision]:
                _check_open(repo, request)
                wanted = parse_qs(request.body.decode())["paths"]
                return _json([row for row in _rows(repo.find(revision)) if row["path"] in wanted])
        _check_writable(repo.id, request)
        match [request.command, *asked]:
            case ["POST", "preupload", revision]:
                return _preupload(repo.find(revision), request)
            case ["POST", "commit", branch] if "create_pr" not in request.query:
                return self._commit(repo, branch, request)
            case ["POST", "branch", name]:
                start = json.loads(request.body).get("startingPoint", "main")
                return _name_commit(repo.branches, name, repo.find(start))
            case ["POST", "tag", revision]:
                return _name_commit(repo.tags, json.loads(request.body)["tag"], repo.find(revision))
            case ["DELETE", "tag", name]:
                if repo.tags.pop(name, None) is None:
                    raise Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
                return Answer()
        raise Refused(404, message="Sorry, we can't find the page you are looking for.")

    def _answer_files(self, kind: str, repo_id: str, asked: list[str], request: Request) -> Answer:
        repo = self._readable(kind, repo_id.removesuffix(".git"), request)
        match [request.command, *asked]:
            case ["GET" | "HEAD", "resolve", revision, *path]:
                _check_open(repo, request)
                return _download(repo.find(revision), "/".join(path), request.headers.get("Range"))
            case ["POST", "info", "lfs", "objects", "batch"]:
                _check_writable(repo.id, request)
                return self._batch(repo, json.loads(request.body)["objects"])
            case ["POST", "info", "lfs", "verify"]:
                wanted = json.loads(request.body)
                if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
                    raise Refused(422, message="The object did not arrive.")
                return Answer()
        raise Refused(404, "EntryNotFound", "Entry not found")

    def _readable(self, kind: str, repo_id: str, request: Request) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo and (not repo.private or _may_enter(repo, request)):
            return repo
        raise Refused(404 if request.role else 401, "RepoNotFound", "Repository not found")

    def _create(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        repo_type, repo_id = wanted.get("type", "model"), f"{wanted.get('organization') or USER}/{wanted['name']}"
        _check_writable(repo_id, request)
        repo = Repo(f"{repo_type}s", repo_id)
        answer = dict(url=f"{self.url}/{repo.path}", name=repo_id, id=repo_id)
        if (repo.kind, repo_id) in self.repos:
            return _json(answer | dict(error=f"You already created this {repo_type} repo"), 409)
        repo.private = wanted.get("private") or wanted.get("visibility") == "private"  # huggingface_hub 1 and 2
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.repos[repo.kind, repo_id] = repo
        return _json(answer)

    def _batch(self, repo: Repo, objects: list[dict]) -> Answer:
        """Where to upload objects, and where to ask whether they have arrived; nowhere those that are here."""
        rows = [dict(oid=wanted["oid"], size=wanted["size"]) for wanted in objects]
        for row in rows:
            if row["oid"] not in self.objects:
                upload, verify = f"{self.url}/lfs-objects/{row['oid']}", f"{self.url}/{repo.path}.git/info/lfs/verify"
                row["actions"] = dict(upload=dict(href=upload), verify=dict(href=verify))
        return _json(dict(transfer="basic", objects=rows))

    def _store(self, sha256: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refused(400, message="The content is not what was announced.")
        self.objects[sha256] = body
        return Answer()

    def _commit(self, repo: Repo, branch: str, request: Request) -> Answer:
        if branch not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        head = repo.find(branch)
        if header["value"].get("parentCommit", head.id) != head.id:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._change(files, operation["key"], operation["value"])
        commit = repo.commit(files, header["value"]["summary"], branch)
        return _json(dict(success=True, commitUrl=f"{self.url}/{repo.path}/commit/{commit}", commitOid=commit))

    def _change(self, files: dict[str, bytes], operation: str, value: dict) -> None:
        path = value["path"]
        match operation:
            case "file":
                files[path] = base64.b64decode(value["content"])
            case "lfsFile" if value["oid"] in self.objects:
                files[path] = self.objects[value["oid"]]
            case "deletedFile" if path in files:
                del files[path]
            case "deletedFolder" if _inside(path.rstrip("/"), files):
                for name in _inside(path.rstrip("/"), files):
                    del files[name]
            case _:
                raise Refused(400, message=f"{operation} {path}: not possible here")


def kept_by_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith((".safetensors", ".parquet")) or size > 1_000_000)


def lfs_pointer(body: bytes) -> bytes:
    sha256 = hashlib.sha256(body).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(body)}\n".encode()


def git_blob(path: str, body: bytes) -> str:
    """What git calls the file, or the pointer that it keeps instead."""
    content = lfs_pointer(body) if kept_by_lfs(path, len(body)) else body
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, body: bytes) -> str:
    """What tells whether a file has changed."""
    return hashlib.sha256(body).hexdigest() if kept_by_lfs(path, len(body)) else git_blob(path, body)


def _json(answer: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(json.dumps(answer).encode(), {"Content-Type": "application/json"} | (headers or {}), status)


def _may_enter(repo: Repo, request: Request) -> bool:
    return bool(request.role) and repo.id.startswith(USER + "/")


def _check_open(repo: Repo, request: Request) -> None:
    if repo.gated and not _may_enter(repo, request):
        message = f"Access to {repo.kind[:-1]} {repo.id} is restricted: you are not in the authorized list."
        raise Refused(403 if request.role else 401, "GatedRepo", message)


def _validated(card: str) -> Answer:
    """What the Hub says of a card's metadata; of all its rules, that of licences."""
    metadata = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    if metadata.get("license", "mit") in ("apache-2.0", "mit", "cc-by-nc-4.0", "other"):
        return _json(dict(errors=[], warnings=[]))
    return _json(dict(errors=[dict(message='"license" must be one of [apache-2.0, mit, ...]')], warnings=[]), 400)


def _check_writable(repo_id: str, request: Request) -> None:
    if not request.role:
        raise Refused(401, message="Invalid username or password.")
    if request.role != "write":
        raise Refused(403, message="you must use a write token to upload to a repository.")
    if not repo_id.startswith(USER + "/"):
        raise Refused(403, message=f'You don\'t have the rights to write under the namespace "{repo_id.split("/")[0]}"')


def _whoami(request: Request) -> Answer:
    if not request.role:
        raise Refused(401, message="Invalid username or password.")
    return _json(dict(type="user", name=USER, orgs=[], auth=dict(accessToken=dict(role=request.role))))


def _info(repo: Repo, commit: Commit, blobs: bool) -> Answer:
    siblings = [_row(*file) if blobs else dict(rfilename=file[0]) for file in commit.files.items()]
    gated = "manual" if repo.gated else False
    author = repo.id.split("/")[0]
    info = dict(id=repo.id, author=author, sha=commit.id, private=repo.private, gated=gated, tags=[], siblings=siblings)
    return _json(info)


def _refs(repo: Repo) -> Answer:
    kinds = dict(branches=("heads", repo.branches), tags=("tags", repo.tags))
    answer = {
        kind: [dict(name=name, ref=f"refs/{folder}/{name}", targetCommit=commit) for name, commit in refs.items()]
        for kind, (folder, refs) in kinds.items()
    }
    return _json(answer | dict(converts=[], pullRequests=[]))


def _name_commit(refs: dict[str, str], name: str, commit: Commit) -> Answer:
    if name in refs:
        raise Refused(409, message=f"Reference {name} exists already")
    refs[name] = commit.id
    return Answer()


def _inside(folder: str, paths: dict) -> list[str]:
    return [path for path in paths if path.startswith(f"{folder}/")]


def _row(path: str, body: bytes) -> dict:
    """What the Hub tells about a file, with the keys of a tree and those of a repository's `siblings`."""
    size, blob = len(body), git_blob(path, body)
    row = dict(type="file", path=path, rfilename=path, size=size, oid=blob, blobId=blob)
    if kept_by_lfs(path, size):
        row["lfs"] = dict(size=size, oid=etag(path, body), sha256=etag(path, body), pointerSize=len(lfs_pointer(body)))
    return row


def _rows(commit: Commit) -> list[dict]:
    """Files and the folders that they are in."""
    folders = {str(parent) for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
    rows = [dict(type="directory", path=path, size=0, oid=git_blob("", path.encode())) for path in folders]
    return sorted(rows + [_row(*file) for file in commit.files.items()], key=lambda row: row["path"])


def _tree(commit: Commit, folder: str, query: dict[str, list[str]]) -> Answer:
    rows = [row for row in _rows(commit) if not folder or row["path"].startswith(f"{folder}/")]
    if folder and not rows:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist", commit.id)
    recursive = query.get("recursive", [""])[0].lower() == "true"
    depth = len(PurePosixPath(folder).parts)
    return _json([row for row in rows if recursive or row["path"].count("/") == depth])


def _preupload(commit: Commit, request: Request) -> Answer:
    rows = []
    for wanted in json.loads(request.body)["files"]:
        path, mode = wanted["path"], "lfs" if kept_by_lfs(wanted["path"], wanted["size"]) else "regular"
        rows.append(dict(path=path, uploadMode=mode, shouldIgnore=False))
        if path in commit.files:
            rows[-1]["oid"] = etag(path, commit.files[path])
    return _json(dict(files=rows))


def _download(commit: Commit, path: str, wanted: str | None) -> Answer:
    if path not in commit.files:
        raise Refused(404, "EntryNotFound", "Entry not found", commit.id)
    body = commit.files[path]
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{etag(path, body)}"', "Accept-Ranges": "bytes"}
    if kept_by_lfs(path, len(body)):
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(body))}
    if not wanted:
        return Answer(body, headers)
    first, last = wanted.removeprefix("bytes=").split("-")
    part = body[int(first) : int(last or len(body)) + 1]
    headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
    return Answer(part, headers, 206)


def connect(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, cache: Path) -> None:
    """Let the clients in this process know this Hub alone, with a new cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants = dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_CACHE=str(cache / "hub"))
    constants |= dict(HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True)
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    settings = dict(HF_ENDPOINT=hub.url, HUB_DATASETS_URL=hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    settings |= dict(HF_DATASETS_CACHE=cache / "datasets", DOWNLOADED_DATASETS_PATH=cache / "datasets" / "downloads")
    settings |= dict(HF_UPDATE_DOWNLOAD_COUNTS=False)
    for name, value in settings.items():
        monkeypatch.setattr(datasets.config, name, value)
    go_online(monkeypatch)


def go_online(monkeypatch: pytest.MonkeyPatch, online: bool = True) -> None:
    """As without or with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not online)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", not online)
    HfFileSystem.clear_instance_cache()
    close_session()


def environment(hub: LoopbackHub, cache: Path) -> dict[str, str]:
    """Variables that let another process know this Hub alone, with a cache of its own."""
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    switches = dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_UPDATE_DOWNLOAD_COUNTS="0")
    switches |= dict(HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    caches = dict(HF_HOME=str(cache), HF_HUB_CACHE=str(cache / "hub"), HF_DATASETS_CACHE=str(cache / "datasets"))
    return dict(HF_ENDPOINT=hub.url, HF_TOKEN=WRITE_TOKEN) | caches | switches | nowhere
