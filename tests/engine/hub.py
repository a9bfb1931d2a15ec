"""A stand-in for the model hub on this machine, for ``huggingface_hub``, which sees HF_ENDPOINT.

It holds repositories with branches, and answers as the real one does: files with their commit and
etag, the list of a branch's files, and the errors of a missing or gated model. It keeps each call.
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

MEMBER = "hf_member"
"""The token of an account that may read every model."""

STRANGER = "hf_stranger"
"""The token of an account that has not accepted the licence of the gated models."""

_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?"
)


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the hub: the folder of each branch. A gated one asks for ``MEMBER``."""

    branches: Mapping[str, Path]
    gated: bool = False

    def commit(self, branch: str) -> str:
        """The branch's commit, 40 hexadecimal digits that follow from its files."""
        files = "".join(f"{f}:{_digest(f)}" for f in self.files(branch).values())
        return hashlib.sha1(files.encode()).hexdigest()

    def branch_of(self, revision: str) -> str | None:
        """The branch of that name or commit."""
        return next((b for b in self.branches if revision in (b, self.commit(b))), None)

    def files(self, branch: str) -> dict[str, Path]:
        """Each file of a branch by its path in the repository."""
        folder = self.branches[branch]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): file for file in files}


@dataclass(slots=True)
class Hub:
    """The running hub. ``calls`` are (method, path, token) of each call so far.

    As long as ``released`` is not set, the file that ``hold`` named is sent by half.
    """

    url: str
    repositories: Mapping[str, Repository]
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    held: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def hold(self, path: str) -> None:
        """Send only half of the file ``path`` of a repository until ``released`` is set."""
        self.held = path
        self.released.clear()

    def downloads(self, suffix: str = ".safetensors") -> list[str]:
        """The paths in the repository of the files that were sent, with that suffix."""
        matches = [_FILE.fullmatch(path) for method, path, _ in self.calls if method == "GET"]
        return sorted(m["path"] for m in matches if m is not None and m["path"].endswith(suffix))


@contextmanager
def running_hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """A hub with ``repositories`` by their ids, such as ``owner/name``, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def silent_hub() -> Iterator[str]:
    """The address of a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def unreachable_hub() -> str:
    """An address that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


class _Refusal(Exception):
    """What the hub answers in place of a file: ``code`` is its own name for the error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # A test reads ``Hub.calls``.

    def _answer(self, *, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.calls.append((self.command, path, token))
        try:
            status, content, headers = 200, *self._found(hub, path, token)
        except _Refusal as refusal:
            status, content = refusal.status, json.dumps({"error": str(refusal)}).encode()
            headers = {"X-Error-Message": str(refusal), "Content-Type": "application/json"}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and hub.held and path.endswith(hub.held):
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.wfile.flush()
            hub.released.wait()
            content = content[half:]
        if body:
            self.wfile.write(content)

    def _found(self, hub: Hub, path: str, token: str) -> tuple[bytes, dict[str, str]]:
        match = _FILE.fullmatch(path) or _API.fullmatch(path)
        if match is None:
            raise _Refusal(404, "Sorry, we can't find the page you are looking for.")
        named = match.groupdict()
        name, revision = named["repo"], named["revision"] or "main"
        repository = _readable(hub, name, token)
        branch = repository.branch_of(revision)
        if branch is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = repository.commit(branch)
        files = repository.files(branch)
        if "path" in named:
            if named["path"] not in files:
                raise _Refusal(404, "Entry not found", "EntryNotFound")
            file = files[named["path"]]
            return file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_digest(file)}"'}
        found: Any
        if named["kind"] == "tree":
            found = [
                {"type": "file", "path": p, "size": f.stat().st_size, "oid": _digest(f)}
                for p, f in files.items()
            ]
        else:
            siblings = [{"rfilename": p, "size": f.stat().st_size} for p, f in files.items()]
            found = {"id": name, "sha": commit, "siblings": siblings}
        return json.dumps(found).encode(), {"Content-Type": "application/json"}


def _readable(hub: Hub, name: str, token: str) -> Repository:
    """The repository if the owner of ``token`` may read it."""
    if token not in ("", MEMBER, STRANGER):
        raise _Refusal(401, "Invalid credentials in Authorization header")
    repository = hub.repositories.get(name)
    if repository is None:
        # Without a token, the hub does not reveal which models exist.
        raise _Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
    if repository.gated and token != MEMBER:
        status, why = (403, "you are not in the authorized list") if token else (401, "log in")
        raise _Refusal(status, f"Access to model {name} is restricted: {why}", "GatedRepo")
    return repository


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
