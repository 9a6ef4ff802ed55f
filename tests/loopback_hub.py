"""A small Hub on loopback for tests: what huggingface_hub asks when it reads a model repository.

``Hub`` holds repositories in memory, notes every request and has faults on order. The routes are a table; the write
side is ``pushing.py``. Answers follow huggingface_hub 1.33 (``_snapshot_download.py``, ``file_download.py``).
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

DRIP = 0.1  # s between two bytes
LFS_ENDS = (".safetensors", ".bin", ".gguf", ".model")


@dataclass
class Repository:
    """One model repository: the files of its newest commit, and of the commits before."""

    files: dict[str, bytes]
    commit: str = "1" * 40
    branches: set[str] = field(default_factory=lambda: {"main"})
    """Names of the newest commit."""
    heads: dict[str, str] = field(default_factory=dict)
    """Commits of further branches and of pull requests, ``refs/pr/1``."""
    tags: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Pull requests, as listings have them."""
    gated: bool = False
    """Its listing is public, its files need the token."""
    broken: int = 0
    """Status that every request for it gets, when not 0."""
    private: bool = False
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def holds(self, revision: str) -> bool:
        known = (self.commit, *self.branches, *self.heads, *self.tags, *self.history)
        return revision in known

    def at(self, revision: str) -> dict[str, bytes]:
        """The files of a revision that it holds."""
        commit = self.commit_of(revision)
        return self.files if commit == self.commit else self.history[commit]

    def commit_of(self, revision: str) -> str:
        for names in (self.heads, self.tags):
            if revision in names:
                return names[revision]
        return revision if revision in self.history else self.commit

    def advance(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make ``files`` the newest commit of a branch."""
        parent = self.commit_of(branch)
        listing = "".join(f"{name} {_git_id(content)}\n" for name, content in sorted(files.items()))
        new = hashlib.sha1((parent + branch + listing).encode()).hexdigest()  # noqa: S324
        self.history |= {self.commit: self.files, new: files}
        if branch in self.branches:
            self.files, self.commit = files, new
        else:
            self.heads[branch] = new
        return new


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    range: str | None
    token: str | None
    body: bytes = b""
    query: str = ""


@dataclass
class Fault:
    """What goes wrong the next ``times`` that a request ``METHOD /path`` matches ``on``.

    ``refuse`` answers with ``status``; ``drop`` closes the connection in the middle of the request's body, ``lose``
    after the request was carried out; ``flip`` carries it out with another last byte, ``garble`` answers with one.
    ``odd`` answers with status 200 and ``text``, ``silence`` never; ``cut`` ends in the middle of the answer, ``drip``
    sends it byte after byte. Whether these four carry out what was asked is ``carried``.
    """

    on: str
    kind: Literal["refuse", "drop", "lose", "flip", "garble", "none", "odd", "silence", "cut", "drip"] = (
        "refuse"
    )
    status: int = 500
    text: str = ""
    times: int = 1
    skip: int = 0
    """How many matching requests go well before."""
    fired: int = 0
    carried: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    """Of a refusal."""
    before: Callable[[], None] = lambda: None
    """Called first, when the request arrived."""
    after: Callable[[], None] = lambda: None
    """Called when it was carried out and is not answered yet."""


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def reply(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: str) -> Answer:
    return Answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})


Route = Callable[["Hub", re.Match[str], Asked], Answer]


class Hub:
    """Repositories by id; ``url`` is the endpoint while ``serving``."""

    def __init__(self, token: str = "hf_secret_of_the_test") -> None:  # noqa: S107
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        self.token = token
        self.url = ""
        self.routes = list(ROUTES)
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.given_up = 0
        """Answers that came byte after byte until the client left."""
        self.closing = threading.Event()
        """Set when the Hub closes; ends its silences."""

    def due(self, request: str) -> Fault | None:
        """The first fault on order for a request; counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.on, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    fault.fired += 1
                    return fault
        return None

    def sent(self, method: str, pattern: str = "") -> list[Asked]:
        """Requests that arrived whole."""
        return [asked for asked in self.asked if asked.method == method and re.search(pattern, asked.path)]

    def downloads(self, end: str = "") -> list[str]:
        """File names that were fetched whole or in part, ending in ``end``."""
        return [
            a.path.partition("/resolve/")[2].partition("/")[2] for a in self.asked if self._is_get(a, end)
        ]

    @staticmethod
    def _is_get(asked: Asked, end: str) -> bool:
        return asked.method == "GET" and "/resolve/" in asked.path and asked.path.endswith(end)

    def answer(self, asked: Asked, fault: Fault) -> Answer:
        if fault.kind == "refuse":
            return Answer(fault.status, b"", {"X-Error-Message": fault.text, **fault.headers})
        if fault.kind in ("odd", "silence", "cut", "drip"):
            answer = self.carry_out(asked) if fault.carried else Answer(200, b"{}")
            return replace(answer, status=200, body=fault.text.encode()) if fault.kind == "odd" else answer
        answer = self.carry_out(replace(asked, body=_other(asked.body)) if fault.kind == "flip" else asked)
        return replace(answer, body=_other(answer.body)) if fault.kind == "garble" else answer

    def carry_out(self, asked: Asked) -> Answer:
        for method, pattern, route in self.routes:
            if asked.method in method and (match := re.fullmatch(pattern, asked.path)):
                return route(self, match, asked)
        return refusal(404, "NotFound")

    def find(self, match: re.Match[str]) -> Repository | Answer:
        """The repository a route is about, or what to answer instead."""
        repository = self.repositories.get(match["id"])
        if repository is None:
            return refusal(401, "RepoNotFound")
        if repository.broken:
            return Answer(repository.broken)
        revision = match.groupdict().get("revision")
        if revision is not None and not repository.holds(revision):
            return refusal(404, "RevisionNotFound")
        return repository


def model_info(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    revision = match.groupdict().get("revision") or found.commit
    siblings = [{"rfilename": name} for name in found.at(revision)]
    info = {"_id": "0", "id": match["id"], "modelId": match["id"], "siblings": siblings}
    info |= {"sha": found.commit_of(revision), "private": found.private}
    return reply({**info, "gated": "auto" if found.gated else False, "tags": [], "downloads": 0})


def tree(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    return reply([entry(name, content) for name, content in found.at(match["revision"]).items()])


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as listings have it."""
    listed: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
    if name.endswith(LFS_ENDS):
        listed["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return listed


def resolve(hub: Hub, match: re.Match[str], asked: Asked) -> Answer:
    found = hub.find(match)
    if isinstance(found, Answer):
        return found
    if found.gated and asked.token != hub.token:
        return refusal(403 if asked.token else 401, "GatedRepo")
    content = found.at(match["revision"]).get(match["path"])
    if content is None:
        return refusal(404, "EntryNotFound")
    headers = {"ETag": f'"{_git_id(content)}"', "Accept-Ranges": "bytes"}
    headers["X-Repo-Commit"] = found.commit_of(match["revision"])
    if match["path"].endswith(LFS_ENDS):
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
    asked_range = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.range or "")
    if asked_range is None:
        return Answer(200, content, headers)
    start, end = int(asked_range[1]), int(asked_range[2] or len(content) - 1)
    part = content[start : end + 1]
    headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    return Answer(206, part, headers)


ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Route]] = [
    (("GET",), rf"/api/models/{ID}/revision/{REVISION}", model_info),
    (("GET",), rf"/api/models/{ID}/tree/{REVISION}", tree),
    (("GET",), rf"/api/models/{ID}", model_info),
    (("GET", "HEAD"), rf"/{ID}/resolve/{REVISION}/(?P<path>.+)", resolve),
]


def _other(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` from a thread on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms between its header and its body

        def _answer(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path = unquote(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length") or 0)
            fault = hub.due(f"{self.command} {path}") or Fault("", "none")
            body = self.rfile.read(length // 2 if fault.kind == "drop" else length)
            fault.before()
            if fault.kind == "drop":
                self._hang_up()
                return
            query = urlsplit(self.path).query
            asked = Asked(self.command, path, self.headers.get("Range"), token, body, query)
            hub.asked.append(asked)
            answer = hub.answer(asked, fault)
            fault.after()
            if fault.kind == "lose":
                self._hang_up()
                return
            if fault.kind == "silence":
                hub.closing.wait()
                self._hang_up()
                return
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault.kind == "cut":
                self.wfile.write(answer.body[: len(answer.body) // 2])
                self._hang_up()
            elif fault.kind == "drip":
                self._drip(answer.body)
            else:
                self.wfile.write(answer.body)

        def _drip(self, body: bytes) -> None:
            for number in range(len(body)):
                if hub.closing.wait(DRIP):
                    return
                try:
                    self.wfile.write(body[number : number + 1])
                except OSError:  # the client has had enough
                    hub.given_up += 1
                    self.close_connection = True
                    return

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing: ``hub.asked`` has it."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that left is no error; else the test's output shows it."""
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
