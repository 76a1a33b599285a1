"""A Hub in a thread: the few addresses that huggingface_hub asks when it downloads and when it commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 5000
"""From so many bytes on, a file has the hash of a large one: SHA-256 instead of git's SHA-1."""


class Hub:
    """Repositories, and what was asked for.

    Attributes:
        repos: name → commits, each (its hash, files by name), oldest first.
        private: name → whether its creator wanted it private.
        gated: repositories whose files nobody may read.
        damaged: names of files that are sent with one bit changed.
        refuses: answer to every commit: a status and a text, or None.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.damaged: set[str] = set()
        self.refuses: tuple[int, str] | None = None
        self.asked: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((sha, {**(commits[-1][1] if commits else {}), **files}))
        return sha

    def upload(self, repo: str, folder: Path) -> str:
        return self.commit(repo, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})

    def files_sent(self) -> list[str]:
        return [path.rpartition("/")[2] for path in self.asked if path.startswith("GET /") and "/resolve/" in path]

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos[repo] or [("0" * 40, {})]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


def file_hash(content: bytes) -> str:
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.0"  # no connection outlives an answer, nor so the server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            repo, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else ""
        if repo not in self.hub.repos:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        found = self.hub.at(repo, revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = found
        if parts[0] == "api":
            return self._json({"id": repo, "sha": sha, "siblings": [_sibling(n, c) for n, c in files.items()]})
        if repo in self.hub.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted.", {"X-Repo-Commit": sha})
        if parts[4] not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        content = files[parts[4]]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file_hash(content)}"'}
        if len(content) >= LARGE:
            headers |= {"X-Linked-Etag": f'"{file_hash(content)}"', "X-Linked-Size": str(len(content))}
        if parts[4] in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(200, content, headers)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4])
        address = f"http://{self.headers['Host']}"
        if path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif self.headers.get("Authorization") != "Bearer hf_writes":
            self._error(401, "", "Invalid user token.")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo in self.hub.repos:
                return self._json({"error": "You already created this model repo", "url": f"{address}/{repo}"}, 409)
            self.hub.repos[repo] = []
            self.hub.private[repo] = wanted.get("private") or wanted.get("visibility") == "private"
            self._json({"url": f"{address}/{repo}", "id": repo, "name": repo})
        elif parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.hub.refuses:
            self._error(self.hub.refuses[0], "", self.hub.refuses[1])
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
            sha = self.hub.commit(repo, files)
            self._json({"success": True, "commitOid": sha, "commitUrl": f"{address}/{repo}/commit/{sha}"})

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, text: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": text, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if len(content) >= LARGE:
        entry["lfs"] = {"sha256": file_hash(content), "size": len(content), "pointerSize": 130}
    else:
        entry["blobId"] = file_hash(content)
    return entry


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of ``hub`` while it answers."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
