"""A Hub on 127.0.0.1, with as much of the protocol as huggingface_hub needs to create, commit and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "writeaccess" * 3

_REPO = r"(?P<prefix>datasets/)?(?P<id>[^/]+/[^/]+)"
_API = r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)"


@dataclass
class Hub:
    """The server's content. ``repos``: ("model", "user/name") -> path -> content; of a branch, "user/name@branch"."""

    endpoint: str = ""
    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    #: Users whose repositories the token may not write to.
    closed: set[str] = field(default_factory=set)
    #: Repositories that only users with granted access can see.
    gated: set[str] = field(default_factory=set)
    #: If set, the HTTP status that it answers to every request.
    broken: int | None = None

    def sha(self, key: tuple[str, str]) -> str:
        """Return the commit id of a repository's head, which changes with its files."""
        return hashlib.sha1(repr(sorted(self.repos[key].items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.hub.broken is not None:
            self.answer({"error": "out of order"}, self.hub.broken)
            return
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                groups = found.groupdict()
                kind = groups.pop("type", None) or ("dataset" if groups.pop("prefix", None) else "model")
                repo = (kind, groups.pop("id")) if "id" in groups else None
                if self.command in ("POST", "PUT") and not self._may_write(repo):
                    self.answer({"error": "You don't have the rights"}, 403)
                elif action is not _Handler.create and repo is not None and repo not in self.hub.repos:
                    self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                elif repo is not None and repo[1] in self.hub.gated:
                    self.answer({"error": "Access to this is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
                else:
                    repo = repo and self._at(repo, groups.get("revision"))
                    action(self, *([repo] if repo else []), **groups)
                return
        self.answer({"error": f"{self.command} {path}: this hub does not know it"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _at(self, repo: tuple[str, str], revision: str | None) -> tuple[str, str]:
        """Return the key of a branch, by its name or the commit id of its head; that of the repository for others."""
        branches = [key for key in self.hub.repos if key[0] == repo[0] and key[1].startswith(f"{repo[1]}@")]
        return next((b for b in branches if revision in (b[1].partition("@")[2], self.hub.sha(b))), repo)

    def _may_write(self, repo: tuple[str, str] | None) -> bool:
        if self.path.startswith(("/api/validate-yaml", "/lfs/")):
            return True
        owner = repo[1].partition("/")[0] if repo else json.loads(self.body).get("organization")
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" and owner not in self.hub.closed

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = asked.get("type") or "model", f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if repo[0] == 'dataset' else ''}{repo[1]}"
        exists = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {".gitattributes": b""})
        self.answer({"url": url}, 409 if exists else 200)

    def branch(self, repo: tuple[str, str], name: str) -> None:
        branch = repo[0], f"{repo[1]}@{name}"
        exists = branch in self.hub.repos
        self.hub.repos.setdefault(branch, dict(self.hub.repos[repo]))
        self.answer({}, 409 if exists else 200)

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def info(self, repo: tuple[str, str], revision: str | None = None) -> None:
        siblings = [{"rfilename": path} for path in self.hub.repos[repo]]
        self.answer({"id": repo[1], "modelId": repo[1], "sha": self.hub.sha(repo), "siblings": siblings, "tags": []})

    def tree(self, repo: tuple[str, str], revision: str, folder: str | None = None) -> None:
        files = {path: content for path, content in self.hub.repos[repo].items() if path.startswith(folder or "")}
        self.answer([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()])

    def preupload(self, repo: tuple[str, str], revision: str) -> None:
        large = (".safetensors", ".zst")
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, repo: tuple[str, str]) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{o['oid']}", "header": {}}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.answer({})

    def commit(self, repo: tuple[str, str], revision: str) -> None:
        files = dict(self.hub.repos[repo])
        message = ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "deletedFile":
                    del files[value["path"]]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.repos[repo] = files
        self.hub.commits.append((repo[1], message))
        sha = self.hub.sha(repo)
        self.answer({"commitUrl": f"{self.hub.endpoint}/{repo[1]}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo: tuple[str, str], revision: str, path: str) -> None:
        files, sha = self.hub.repos[repo], self.hub.sha(repo)
        if path not in files:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self.answer(files[path], 200, {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": sha})


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), rf"{_API}/branch/(?P<name>[^/]+)", _Handler.branch),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), _API, _Handler.info),
    (("GET",), rf"{_API}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("POST",), rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (("POST",), rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub for the duration of the context."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
