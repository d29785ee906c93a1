"""A stand-in for the Hub's HTTP API on loopback, for the real client of ``huggingface_hub``.

It serves repositories from memory: information, trees, files with their commit and ETag (whole or by range), private and
gated ones, uploads as commits. It can break off in the middle of a file, and counts what it was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback0123456789secret"

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|refs|preupload|commit|branch)(?:/(?P<rest>.+))?)?"
)


@dataclass
class Repo:
    """A repository: each commit's files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        held = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        commit = hashlib.sha1(repr([len(self.commits), sorted(held.items())]).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = held, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class HubServer:
    """``with HubServer() as hub: hub.add("me/it", folder)``, and ``HF_ENDPOINT`` at ``hub.url``."""

    repos: dict[str, Repo] = field(default_factory=dict)
    break_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which its next download breaks off, once."""
    asked: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path, *, under: str = "", **options: Any) -> str:
        """Commit a folder's files to a repository; returns the commit."""
        repo = self.repos.setdefault(name, Repo(**options))
        files = {
            f"{under}{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return repo.commit(files)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked[f"POST {path}"] += 1
        if not self._known():
            return self._error(401, "Unauthorized")
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        match = _API.fullmatch(path)
        repo = self.hub.repos.get(match["repo"]) if match else None
        if repo is None:
            return self._error(404, "RepoNotFound")
        if match["what"] == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(content)["files"]
            ]
            return self._json({"files": files})
        if match["what"] == "branch":
            repo.branches[match["rest"]] = repo.branches["main"]
            return self._json({}, 201)
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        files = {
            each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"
        }
        commit = repo.commit(files, match["rest"])
        return self._json(
            {"commitUrl": f"{self.hub.url}/{match['repo']}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private))
        self.hub.repos[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _known(self) -> bool:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent:
            self.hub.tokens.add(sent)
        return sent == TOKEN

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked[f"{self.command} {path}"] += 1
        known = self._known()
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "orgs": []}) if known else self._error(401, "")
        match = _RESOLVE.fullmatch(path) or _API.fullmatch(path)
        repo = self.hub.repos.get(match["repo"]) if match else None
        if repo is None or (repo.private and not known):
            return self._error(404 if known else 401, "RepoNotFound")
        if match.re is _API and match["what"] == "refs":
            told = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repo.branches.items()
            ]
            return self._json({"branches": told, "tags": [], "converts": []})
        revision, _, inner = ((match["revision"] if match.re is _RESOLVE else match["rest"]) or "main").partition("/")
        commit = repo.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if match.re is _RESOLVE:
            return self._file(repo, commit, match["file"], known, body=body)
        if match["what"] == "tree":
            held = [_entry(name, data) for name, data in repo.commits[commit].items() if name.startswith(inner)]
            return self._json(held) if held else self._error(404, "EntryNotFound")
        files = [{"rfilename": name, "size": len(data)} for name, data in repo.commits[commit].items()]
        about = {
            "id": match["repo"],
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
        }
        return self._json({**about, "siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def _file(self, repo: Repo, commit: str, name: str, known: bool, *, body: bool) -> None:
        if repo.gated and not known:
            return self._error(403, "GatedRepo")
        data = repo.commits[commit].get(name)
        if data is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        asked = self.headers.get("Range")
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if asked:
            self.hub.ranges.append(f"{name} {asked}")
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            stop = self.hub.break_after.pop(name, None)
            self.wfile.write(data[start : None if stop is None else start + stop])
            if stop is not None:
                self.wfile.flush()
                self.close_connection = True
        return None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
