"""How a worker's process comes to be: a new interpreter, or a fork of one that has the libraries imported already."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, get_args

from quantool.runtime import gpus
from quantool.runtime.worker import Preload

VOLATILE = ("PYTEST_CURRENT_TEST", "COLUMNS", "LINES", gpus.VISIBLE)
"""Environment variables that no library reads while it is imported: they may change between two workers."""
PATIENCE = 0.5
"""Seconds that servers have to end by themselves."""
SERVERS: tuple[Preload, ...] = get_args(Preload)[1:]
_TURN = threading.Lock()
"""Held while a server is started or asked: several threads may start workers."""


class Spawned:
    """A new interpreter."""

    def __init__(self, target: str, log: IO[bytes], events: int, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quantool.runtime.worker", target, str(events), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(events,),
            env=environment,
            start_new_session=True,
        )
        if self._process.stdin is None:  # Popen was given PIPE
            raise AssertionError
        self.stdin: IO[bytes] = self._process.stdin

    def wait(self) -> int:
        """Wait for its end, and kill what it has left behind."""
        os.waitid(
            os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT
        )  # unreaped: its group keeps its number
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """Kill it with all that it started, and reap it."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Forked:
    """A fork of a server that has ``libraries`` imported."""

    def __init__(
        self, target: str, log: IO[bytes], events: int, environment: dict[str, str], libraries: Preload
    ) -> None:
        self._control, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(write_end, "wb")
        self._words = b""
        try:
            message = {"kind": "work", "target": target}
            with _TURN:
                self._servers = _Servers.of(environment)
                self._servers.ask(libraries, message, [theirs.fileno(), log.fileno(), read_end, events])
        finally:
            theirs.close()
            os.close(read_end)
        settings = {"environment": environment, "directory": str(Path.cwd())}
        with contextlib.suppress(BrokenPipeError):  # a server that died at once: ``wait`` says so
            self.stdin.write(json.dumps(settings).encode() + b"\n")

    def wait(self) -> int | None:
        """Wait for its end, after which its server has killed what it left behind; None when the server died before."""
        with contextlib.suppress(ConnectionResetError):
            while words := self._control.recv(64):
                self._words += words
        self._control.close()
        code = self._words.removeprefix(b"started")
        if not self._words:
            self._servers.end()
            return None
        return int(code) if code else -signal.SIGKILL  # killed together with its server

    def kill(self) -> None:
        """Kill it with all that it started; a server that is still importing goes with it."""
        if self._control.fileno() < 0:
            return
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            self._words += self._control.recv(64, socket.MSG_DONTWAIT)
        if self._words:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
            self.wait()
        else:
            self._control.close()
            self._servers.end()


def start(
    target: str, log: IO[bytes], events: int, environment: dict[str, str], libraries: Preload
) -> Spawned | Forked:
    """Start the worker ``target``, which prints to ``log`` and answers on ``events``, with ``libraries`` imported."""
    if libraries == "nothing":
        return Spawned(target, log, events, environment)
    return Forked(target, log, events, environment, libraries)


class _Servers:
    """The fork servers of this process for one environment; the first is its child, each further one forked from the last."""

    current: _Servers | None = None

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.owner = environment, os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "quantool.runtime.fork_server",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        self.sockets = {SERVERS[0]: ours}

    @classmethod
    def of(cls, environment: dict[str, str]) -> _Servers:
        """Those that were started with this environment: libraries read it when they are imported."""
        lasting = {name: value for name, value in environment.items() if name not in VOLATILE}
        known = cls.current
        if known is not None and (known.environment != lasting or known.owner != os.getpid()):
            known.end()
        if cls.current is None:
            cls.current = cls(lasting)
        return cls.current

    def ask(self, libraries: Preload, message: dict[str, str], descriptors: list[int]) -> None:
        """Send a message to the server with ``libraries``, which is started if need be; its log is ``descriptors[1]``."""
        for before, needed in itertools.pairwise(SERVERS[: SERVERS.index(libraries) + 1]):
            if needed not in self.sockets:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self.sockets[needed] = ours
                with theirs:
                    order = {"kind": "serve", "libraries": needed}
                    self._send(before, order, [theirs.fileno(), descriptors[1]])
        self._send(libraries, message, descriptors)

    def _send(self, libraries: Preload, message: dict[str, str], descriptors: list[int]) -> None:
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # dead: who waits for the worker sees it
            socket.send_fds(self.sockets[libraries], [json.dumps(message).encode()], descriptors)

    def end(self) -> None:
        """End the servers, and with them all of their workers."""
        type(self).current = None
        for end in self.sockets.values():
            end.close()
        if self.owner == os.getpid():
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # in the middle of an import
                self.process.kill()
                self.process.wait()


def prepare(environment: dict[str, str]) -> None:
    """Start the server for ``environment`` in this thread: it dies with the thread that started it."""
    if can_fork():
        with _TURN:
            _Servers.of(environment)


@atexit.register
def end() -> None:
    """End the servers, and with them all forked workers."""
    if _Servers.current is not None:
        _Servers.current.end()


def can_fork() -> bool:
    """Whether workers are forked: elsewhere than on Linux system libraries do not survive it."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")
