"""A server on this machine that speaks the few endpoints of the Hub that an upload and a download use.

It is a double, not the Hub: it knows one user, one token, and keeps the files of every branch in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "the-token-of-me"


class Repository:
    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.messages: list[str] = []

    def sha(self, branch: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        return next((name for name in self.branches if revision in (name, self.sha(name))), None)


class HubServer:
    """Attributes: repositories by id; requests, as (method, path); fail, paths where the connection ends midway."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """A new Hub at the same address."""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}
        self.fail: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, which is written in two parts, waits for 40 ms

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path).strip("/")
        length = int(self.headers.get("Content-Length") or 0)
        self.hub.requests.append((self.command, path))
        is_cut_off = any(part in path for part in self.hub.fail)
        self.body = self.rfile.read(length // 2 if is_cut_off else length)
        if is_cut_off:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        needs_token = self.command == "POST" or path.startswith("api/whoami")
        if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}" and "lfs/" not in path:
            return self.answer({"error": "Invalid user token."}, 401)
        if path == "api/whoami-v2":
            return self.answer({"name": "me", "type": "user"})
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self.create(json.loads(self.body))
        if path.startswith("lfs/"):
            self.hub.large[path.removeprefix("lfs/")] = self.body
            return self.answer({})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(self.body))
        # Of the address as it came: "refs%2Fpr%2F1" is one part.
        parts = [unquote(part) for part in url.path.strip("/").removeprefix("api/models/").split("/")]
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.repository("/".join(parts[:2]), repository, parts[2:], parse_qs(url.query))

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = Repository(asked.get("private") is True or asked.get("visibility") == "private")
        self.answer({"url": f"{self.hub.url}/{name}"})

    def batch(self, asked: dict[str, Any]) -> None:
        for entry in asked["objects"]:
            entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.answer({"transfer": "basic", "objects": asked["objects"]})

    def repository(self, name: str, repository: Repository, rest: list[str], query: dict[str, list[str]]) -> None:
        kind = rest[0] if rest else "revision"
        if kind == "preupload":
            asked = json.loads(self.body)["files"]
            for one in asked:
                is_large = one["path"].endswith(".safetensors")
                one |= {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            return self.answer({"files": asked})
        if kind == "branch":
            if rest[1] in repository.branches:
                return self.answer({"error": "Reference already exists"}, 409)
            repository.branches[rest[1]] = dict(repository.branches["main"])
            return self.answer({})
        branch = repository.find(rest[1] if len(rest) > 1 else "main")
        if branch is None:
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.branches[branch]
        if kind == "commit":
            return self.commit(name, repository, branch, is_pull_request=query.get("create_pr") == ["1"])
        if kind == "resolve":
            return self.file(files.get("/".join(rest[2:])), repository.sha(branch))
        if kind == "tree":  # no repository of ours has folders
            listed = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
            return self.answer(listed if not rest[2:] else {}, 404 if rest[2:] else 200)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        for one in siblings:
            data = files[one["rfilename"]]
            if "blobs" in query and one["rfilename"].endswith(".safetensors"):
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        about = {"id": name, "sha": repository.sha(branch), "private": repository.private}
        return self.answer({**about, "siblings": siblings})

    def commit(self, name: str, repository: Repository, branch: str, *, is_pull_request: bool) -> None:
        target = "refs/pr/1" if is_pull_request else branch
        files = dict(repository.branches[branch])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
                if value.get("parentCommit") not in (None, repository.sha(branch)):
                    return self.answer({"error": "A commit has happened since."}, 412)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[target] = files
        sha, url = repository.sha(target), f"{self.hub.url}/{name}"
        answer = {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "success": True}
        return self.answer({**answer, **({"pullRequestUrl": f"{url}/discussions/1"} if is_pull_request else {})})

    def file(self, data: bytes | None, sha: str) -> None:
        if data is None:
            return self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        etag = hashlib.sha256(data).hexdigest()
        self.send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"})

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """The double, listening on a free port of this machine until the block ends."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
