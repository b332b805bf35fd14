"""A Hub of datasets on this machine, for the real clients: what `datasets` and `huggingface_hub` ask for, in memory."""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import pytest
from huggingface_hub import HfFileSystem, close_session


class DatasetHub:
    """Repositories of datasets with commits, branches and tags, read-only for clients.

    `requests` lists "METHOD path" of everything asked for; `gated` and `private` are ids that nobody may read.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}  # files of each commit
        self.refs: dict[str, dict[str, dict[str, str]]] = {}  # id -> "branches" and "tags" -> name -> commit
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                length = int(self.headers.get("Content-Length") or 0)
                hub.answer(self, self.rfile.read(length))

            do_HEAD = do_POST = do_GET

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def publish(self, repo: str, files: dict[str, bytes], *, tag: str | None = None) -> str:
        """Add a commit with these files to main; returns it."""
        content = [(path, hashlib.sha256(body).hexdigest()) for path, body in sorted(files.items())]
        commit = hashlib.sha1(repr((repo, tag, content)).encode()).hexdigest()
        self.commits[commit] = files
        refs = self.refs.setdefault(repo, dict(branches={}, tags={}))
        refs["branches"]["main"] = commit
        if tag:
            refs["tags"][tag] = commit
        return commit

    def stop(self) -> None:
        """Nobody answers any more."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[api:]
        if parts[0] != "datasets" or len(parts) < 3:
            return self._send(request, 404, code="EntryNotFound")
        repo, rest = "/".join(parts[1:3]), parts[3:]
        if repo not in self.refs or repo in self.private:
            return self._send(request, 401, code="RepoNotFound", message="Invalid username or password.")
        if repo in self.gated and not (api and rest[:1] in ([], ["revision"], ["refs"])):
            message = f"Access to dataset {repo} is restricted. You must be authenticated to access it."
            return self._send(request, 401, code="GatedRepo", message=message)
        if rest == ["refs"]:
            return self._send(request, 200, self._list_refs(repo))
        kind, revision, path = (rest or ["revision"])[0], (rest[1:2] or ["main"])[0], "/".join(rest[2:])
        commit = self._commit(repo, revision)
        if commit is None:
            return self._send(request, 404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        files = self.commits[commit]
        if kind == "revision":
            siblings = [dict(rfilename=name) for name in files]
            info = dict(id=repo, sha=commit, private=False, gated=repo in self.gated, tags=[], siblings=siblings)
            return self._send(request, 200, info)
        if kind == "tree":
            rows = [row for row in _rows(files) if not path or row["path"].startswith(path + "/")]
            if path and not rows:
                return self._send(request, 404, code="EntryNotFound")
            recursive = "recursive=true" in request.path.lower()
            depth = path.count("/") + 1 if path else 0
            rows = [row for row in rows if recursive or row["path"].count("/") == depth]
            return self._send(request, 200, rows)
        if kind == "paths-info":
            asked = json.loads(body)["paths"]
            return self._send(request, 200, [row for row in _rows(files) if row["path"] in asked])
        if kind == "resolve" and path in files:
            return self._send_file(request, commit, files[path])
        return self._send(request, 404, code="EntryNotFound", commit=commit)

    def _commit(self, repo: str, revision: str) -> str | None:
        named = {name: commit for kind in self.refs[repo].values() for name, commit in kind.items()}
        return named.get(revision) or (revision if revision in self.commits else None)

    def _list_refs(self, repo: str) -> dict:
        answer = dict(converts=[], pullRequests=[])
        for kind, folder in (("branches", "heads"), ("tags", "tags")):
            answer[kind] = [
                dict(name=name, ref=f"refs/{folder}/{name}", targetCommit=commit)
                for name, commit in self.refs[repo][kind].items()
            ]
        return answer

    def _send(self, request, status: int, answer: object = None, *, code="", message="", commit="") -> None:
        body = b"" if answer is None else json.dumps(answer).encode()
        headers = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": message}
        self._finish(request, status, headers | {"X-Repo-Commit": commit}, body)

    def _send_file(self, request, commit: str, body: bytes) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, wanted = 200, request.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(body) - 1), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(body)}"
            status, body = 206, body[int(first) : end + 1]
        self._finish(request, status, headers, body)

    def _finish(self, request, status: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response(status)
        for name, value in headers.items():
            if value:
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


class WritableHub(DatasetHub):
    """A Hub to which one user, "me", can upload; small files only, which travel in the commit itself."""

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        parts = path.split("/")
        if path == "api/whoami-v2":
            user = dict(type="user", name="me", orgs=[], auth=dict(accessToken=dict(role="write")))
            return self._send(request, 200, user)
        if path == "api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization', 'me')}/{wanted['name']}"
            if repo not in self.refs:
                self.publish(repo, {})
                self.created = wanted
            return self._send(request, 200, dict(url=f"{self.url}/datasets/{repo}", name=repo, id=repo))
        if path == "api/validate-yaml":
            return self._send(request, 200, dict(errors=[], warnings=[]))
        if parts[:2] == ["api", "datasets"] and parts[4:5] == ["preupload"]:
            files = [dict(file, uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]]
            return self._send(request, 200, dict(files=files))
        if parts[:2] == ["api", "datasets"] and parts[4:5] == ["commit"]:
            repo = "/".join(parts[2:4])
            commit = self.publish(repo, self._changed(repo, body))
            answer = dict(commitUrl=f"{self.url}/datasets/{repo}/commit/{commit}", commitOid=commit)
            return self._send(request, 200, answer)
        return super().answer(request, body)

    def _changed(self, repo: str, body: bytes) -> dict[str, bytes]:
        """Files of main after a commit, whose lines are its operations."""
        files = dict(self.commits[self.refs[repo]["branches"]["main"]])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        return files


def _rows(files: dict[str, bytes]) -> list[dict]:
    """What the Hub tells about files and the folders that they are in."""
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    rows = [dict(type="directory", path=name, size=0, oid=hashlib.sha1(name.encode()).hexdigest()) for name in folders]
    for name, body in files.items():
        rows.append(dict(type="file", path=name, size=len(body), oid=hashlib.sha1(body).hexdigest()))
    return sorted(rows, key=lambda row: row["path"])


def connect(monkeypatch: pytest.MonkeyPatch, hub: DatasetHub, cache: Path) -> None:
    """Let the clients in this process know this Hub alone, with a new cache; nothing else can be reached."""
    reach = socket.socket.connect

    def on_this_machine(self, address):
        assert address[0] == "127.0.0.1", f"tried to connect to {address}"
        return reach(self, address)

    monkeypatch.setattr(socket.socket, "connect", on_this_machine)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecretsecretsecret")
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
