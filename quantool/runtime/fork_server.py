"""The process that workers are forked from, so that their libraries are imported once a run.

``python -m quantool.runtime.fork_server SOCKET_FD PARENT_PID`` answers the messages of ``quantool.runtime.children``. It
has quantool's own modules; a server with torch is forked from it, one with transformers from that, and so on: what a worker
does not need, it does not get. A server computes nothing, so that no thread pool and no CUDA context exist when it forks:
children of a process that has them hang or fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass

from quantool.runtime import worker

IMPORTS = {
    "quantool": ("pydantic", "quantool.records", "quantool.plugins.contract", "numpy", "jinja2"),
    "torch": ("torch",),
    "transformers": (
        "transformers.models.auto.tokenization_auto",
        "transformers.models.auto.modeling_auto",
        "transformers.tokenization_utils_tokenizers",
        "transformers.generation.utils",
    ),
    "llmcompressor": (
        "llmcompressor",
        "llmcompressor.modifiers.gptq",
        "llmcompressor.modifiers.quantization",
        "llmcompressor.modifiers.transform",
        "compressed_tensors",
    ),
}
"""By ``worker.Preload``, what a server imports beside what the one before it has."""
LEFT_OUT = "sklearn"
"""Transformers imports it whenever it is installed, for one function of assisted decoding: 1.5 s with pandas, and threads."""
MESSAGE_BYTES = 4096
CUDA_NOT_INITIALIZED = 3  # cuda.h: CUDA_ERROR_NOT_INITIALIZED


class ForkError(Exception):
    """A server has become unfit to fork workers."""


@dataclass(frozen=True)
class _Descendant:
    """A child of this server."""

    pid: int
    watch: int
    """Descriptor that becomes readable when the child ends (pidfd)."""
    control: socket.socket | None
    """Its closing by the other side is the order to kill the worker; its end is announced there. None for a server."""


@dataclass(frozen=True)
class _Order:
    """What a process that was just forked has to do: work, or serve with further ``libraries``."""

    target: str
    libraries: str
    events: int
    requests: socket.socket | None = None


class _ForkServer:
    """Forks on demand, buries the dead, and ends with the process that asks."""

    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests
        self.children: dict[int, _Descendant] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(requests, selectors.EVENT_READ, None)

    def serve(self) -> _Order | None:
        """Answer until a forked child has something to do (its order, in the child), or nobody is left to ask (None)."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.requests:
                    message, descriptors, *_ = socket.recv_fds(self.requests, MESSAGE_BYTES, 4)
                    if not message:
                        self._end()
                        return None
                    if (order := self._fork(json.loads(message), descriptors)) is not None:
                        return order
                elif (child := self.children.get(key.data)) is not None:  # may have been buried just now
                    if key.fileobj == child.watch:
                        self._bury(child)
                    else:
                        self.selector.unregister(key.fileobj)
                        _kill(child.pid)

    def _fork(self, message: dict[str, str], descriptors: list[int]) -> _Order | None:
        """Import what is needed, fork, and return the child's order in the child."""
        log = descriptors[1]
        _print_to(log)
        if message["kind"] == "work":
            _import_own(message["target"])
        gc.collect()
        gc.freeze()  # collecting garbage in a child would copy every page
        server = os.getpid()
        pid = os.fork()
        if not pid:
            self._forget()
            worker.die_with_parent(server)
            return _begin(message, descriptors)
        _print_to(None)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        watch, first = os.pidfd_open(pid), socket.socket(fileno=descriptors[0])
        control = None
        if message["kind"] == "work":
            control = first
            self.selector.register(control, selectors.EVENT_READ, pid)
        else:
            first.close()
        self.children[pid] = _Descendant(pid, watch, control)
        self.selector.register(watch, selectors.EVENT_READ, pid)
        return None

    def _bury(self, child: _Descendant) -> None:
        """Kill what a dead child has started (unreaped, its group keeps its number), reap it, announce how it ended."""
        _kill(child.pid)
        _, status = os.waitpid(child.pid, 0)
        self.selector.unregister(child.watch)
        os.close(child.watch)
        del self.children[child.pid]
        if child.control is not None:
            with contextlib.suppress(KeyError):  # unregistered when the order to kill came
                self.selector.unregister(child.control)
            with contextlib.suppress(BrokenPipeError):
                child.control.send(str(os.waitstatus_to_exitcode(status)).encode())
            child.control.close()

    def _end(self) -> None:
        """Kill the workers, and wait for the servers forked from this one: who asked is gone for them, too."""
        for child in self.children.values():
            if child.control is not None:
                _kill(child.pid)
            os.waitpid(child.pid, 0)

    def _forget(self) -> None:
        """Close, in a child, all that is the server's."""
        self.selector.close()
        self.requests.close()
        for child in self.children.values():
            os.close(child.watch)
            if child.control is not None:
                child.control.close()


def _begin(message: dict[str, str], descriptors: list[int]) -> _Order:
    """In a child: take the descriptors that were sent along."""
    os.setsid()
    if message["kind"] == "serve":
        _print_to(descriptors[1])
        os.close(descriptors[1])
        return _Order("", message["libraries"], -1, socket.socket(fileno=descriptors[0]))
    control, log, stdin, events = descriptors
    with socket.socket(fileno=control) as announced, contextlib.suppress(BrokenPipeError):
        announced.send(b"started")  # before any event of the worker's
    os.close(log)
    os.dup2(stdin, 0)
    os.close(stdin)
    os.set_inheritable(events, False)
    return _Order(message["target"], "", events)


def _import_own(target: str) -> None:
    """Import the module of a worker of quantool's; one of a plug-in may import anything, which is for its process alone."""
    module = target.partition(":")[0]
    if module.startswith("quantool."):
        with contextlib.suppress(ModuleNotFoundError):  # the worker says it
            importlib.import_module(module)


def _import(libraries: str) -> None:
    """Import ``libraries``; whatever that raises ends this server, and workers start as new interpreters instead."""
    before = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch asks for GPUs without starting CUDA then
    hidden = libraries == "transformers" and LEFT_OUT not in sys.modules
    if hidden:
        sys.modules.update({LEFT_OUT: None})  # type: ignore[dict-item] # how importlib marks what is not to be had
    for module in IMPORTS[libraries]:
        importlib.import_module(module)
    if hidden:
        del sys.modules[LEFT_OUT]
    if before is None:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
    if _cuda_started():
        raise ForkError(
            f"importing {libraries} has started CUDA, which no child could use: this server forks nothing"
        )


def _cuda_started() -> bool:
    """Whether CUDA's driver is in use in this process (``cuInit`` was called)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return int(driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p()))) != CUDA_NOT_INITIALIZED


def _kill(pid: int) -> None:
    """Kill a child and its group; it may not have made one yet."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _print_to(log: int | None) -> None:
    """Let standard output and error go to a descriptor, or nowhere."""
    target = os.open(os.devnull, os.O_WRONLY) if log is None else log
    os.dup2(target, 1)
    os.dup2(target, 2)
    if log is None:
        os.close(target)


def _first_order(requests: socket.socket) -> _Order:
    """Serve, with more and more libraries in ever further forks, until a forked worker has its order."""
    order = _Order("", "quantool", -1, requests)
    while order.requests is not None:
        _import(order.libraries)
        _print_to(None)
        received = _ForkServer(order.requests).serve()
        if received is None:
            os._exit(0)  # tearing down a hundred libraries would take half a second
        order = received
    return order


def main() -> None:
    """Serve; in a forked worker: work and end as a process of its own would."""
    worker.die_with_parent(int(sys.argv[2]))
    order = _first_order(socket.socket(fileno=int(sys.argv[1])))
    sys.argv[1:] = [
        order.target,
        str(order.events),
        str(os.getppid()),
    ]  # as a worker that was not forked has them
    settings = json.loads(sys.stdin.buffer.readline())
    os.environ.clear()
    os.environ.update(settings["environment"])
    os.chdir(settings["directory"])
    worker.work(order.target, order.events, json.load(sys.stdin.buffer))
    worker.leave()


if __name__ == "__main__":
    main()
