"""llama.cpp's own chat template engine, the one that users of ``llama-server`` and its relatives run.

llama-cpp-python renders templates with Jinja2, as transformers does, so it proves nothing about llama.cpp's engine. That
is reached through its HTTP server: the ``llama-server`` binary of ``llama_cpp_path``, LLAMA_CPP_PATH or PATH when there
is one, else the server inside the ``xllamacpp`` wheel. Both listen on 127.0.0.1 on a free port, inside a worker that is
killed with everything it started.

A fair comparison needs (tools/server/README.md and common/chat.cpp of llama.cpp): an assistant message at the end is
not continued (``--no-prefill-assistant``); variables are given to both sides (``chat_template_kwargs``); the server takes a
leading BOS off the rendered text when the tokenizer adds one, so ids are made with ``add_special``.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantool.config.schema import Config
from quantool.errors import DependencyError, QuantizationError
from quantool.plugins.contract import Case
from quantool.plugins.keys import Depends
from quantool.runtime.limits import BYTES, SECONDS, limit
from quantool.runtime.process import call, tail
from quantool.runtime.worker import PR_SET_PDEATHSIG, Report
from quantool.runtime.workspace import Stage
from quantool.validation._chat.conversations import Conversation
from quantool.validation._engines.crash import WorkerError, crash
from quantool.validation._engines.vocabulary import UnloadableError, gguf_key

START_SECONDS = (
    600.0  # a large file on a slow disk, other work on every core; one that dies is noticed at once
)
ANSWER_SECONDS = 600.0  # the processor time is what bounds a template; on a busy machine that takes a while
VERSION_SECONDS = 120.0
START_LIMITS = (60, 8 << 30)
"""Processor time and memory of a start, in which the server tries the template; weights are mapped and do not count."""
LATER_SECONDS = 3600  # of processor time, for what follows the last template
HOST = "127.0.0.1"
LISTENING = re.compile(rb"listening on (http://[0-9.]+:[0-9]+)")
TOO_OLD = b"invalid argument"  # common/arg.cpp on an option that it does not know
BINARY = "llama-server"
SHOWN = 80  # bytes of an answer that is none


def find_binary(config: Config) -> Path | None:
    """llama-server of ``llama_cpp_path`` or LLAMA_CPP_PATH (``build/bin``, ``bin`` or the folder itself), or of PATH."""
    configured = [
        config.quantization_config or {},
        *(entry.quantization_config for entry in config.quantizations),
    ]
    named = [options.get("llama_cpp_path") for options in configured] + [os.environ.get("LLAMA_CPP_PATH")]
    for root in named:
        if isinstance(root, str) and root:
            for folder in ("build/bin", "bin", "."):
                candidate = Path(root) / folder / BINARY
                if os.access(candidate, os.X_OK):
                    return candidate.resolve()
    found = shutil.which(BINARY)
    return Path(found) if found else None


def server(config: Config) -> Iterator[tuple[str, str | None]]:
    """The external server, when there is one, as what keeps findings knows it again: by size and time."""
    if (binary := find_binary(config)) is not None:
        status = binary.stat()
        yield BINARY, f"{status.st_size} {status.st_mtime_ns}"


SERVER = Depends(libraries=("xllamacpp",), inputs=(server,))
"""What a rendered chat depends on beside the file."""


def render(
    case: Case, conversations: Sequence[Conversation], stage: str = "rendered-server"
) -> dict[str, Any]:
    """What llama.cpp's server makes of ``conversations`` with the case's GGUF or one of the same keys; kept as ``stage``.

    Raises UnloadableError.
    Returns ``engine`` (which server), ``template`` and ``caps`` as it reports them, and ``answers``: for each
    conversation ``text``, ``ids`` and ``nfc_ids`` (of the text in Unicode's NFC), or ``error``.
    """
    binary = find_binary(case.config)
    log = case.workspace.logs / f"server-{case.name.replace('/', '-')}.log"
    request = {
        "model": str(case.artifact.resolve()),
        "binary": str(binary) if binary is not None else None,
        "bodies": [_body(conversation) for conversation in conversations],
    }
    kept = Stage(stage, gguf_key(case, SERVER, request["bodies"]))
    try:
        return case.workspace.together(
            [kept], lambda _: [call(answer, request, log=log, failure=WorkerError)]
        )[0]
    except WorkerError as error:
        raise UnloadableError(crash(error, "llama.cpp's server"), case) from error
    except QuantizationError as error:
        last = tail(log).splitlines()
        errors = [line.strip() for line in last if " E " in line] or last
        raise UnloadableError("\n".join([error.message, *errors]), case) from error


def _body(conversation: Conversation) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": list(conversation.messages),
        "add_generation_prompt": conversation.generation_prompt,
        "chat_template_kwargs": conversation.settings,
    }
    if conversation.continued:
        body["continue_final_message"] = True
    if conversation.tools:
        body["tools"] = list(conversation.tools)
    return body


def answer(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Worker: start a server on ``model``, render every one of ``bodies`` and tokenize what came out."""
    start = _serve_binary(request) if request["binary"] else _serve_wheel(request)
    with start as (address, process):
        properties = _post(address, "/props", None)
        answers = []
        for done, body in enumerate(request["bodies"]):
            limit(process)
            try:
                answers.append(_render(address, body))
            except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
                last = body["messages"][-1]
                raise QuantizationError(
                    f"llama.cpp's server broke off at a chat that ends with {last}: {error}; it has {SECONDS} s of "
                    f"processor time and {BYTES >> 30} GB of memory for one"
                ) from error
            report(done + 1, len(request["bodies"]))
        limit(process, LATER_SECONDS)
    return {
        "engine": f"{BINARY if request['binary'] else 'xllamacpp'} {properties.get('build_info', '')}".strip(),
        "template": properties.get("chat_template"),
        "caps": properties.get("chat_template_caps", {}),
        "answers": answers,
    }


def _render(address: str, body: dict[str, Any]) -> dict[str, Any]:
    rendered = _post(address, "/apply-template", body)
    if "prompt" not in rendered:
        return {"error": _reason(rendered)}
    text = rendered["prompt"]
    normalized = unicodedata.normalize("NFC", text)
    ids = _tokenize(address, text)
    return {
        "text": text,
        "ids": ids,
        "nfc_ids": ids if normalized == text else _tokenize(address, normalized),
    }


def _tokenize(address: str, text: str) -> list[int]:
    body = {"content": text, "add_special": True, "parse_special": True}
    ids: list[int] = _post(address, "/tokenize", body)["tokens"]
    return ids


def _reason(answered: dict[str, Any]) -> str:
    error = answered.get("error", answered)
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _post(address: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """The JSON answer of the server, also of a refusal (status 4xx or 5xx)."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})  # noqa: S310
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=ANSWER_SECONDS) as response:
            raw = response.read()
    except urllib.error.HTTPError as error:
        with error:
            raw = error.read()
    try:
        answered = json.loads(raw)
    except ValueError as error:
        raise QuantizationError(f"llama.cpp's server answers {raw[:SHOWN]!r} to {path}: no JSON") from error
    if not isinstance(answered, dict):
        raise QuantizationError(f"llama.cpp's server answers {raw[:SHOWN]!r} to {path}: no object")
    return answered


@contextlib.contextmanager
def _serve_wheel(request: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The server of the xllamacpp wheel, in this process; its address, and 0 for this process."""
    try:
        import xllamacpp  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DependencyError(
            "no llama.cpp server to render chat templates with",
            hint=f"pip install xllamacpp, or put {BINARY} on PATH",
        ) from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["model"]
    parameters.hostnames = [HOST]
    parameters.port = 0
    parameters.n_ctx = 512
    parameters.n_batch = 512
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.prefill_assistant = False
    parameters.no_extra_bufts = True
    parameters.fit_params = False
    parameters.offline = True
    parameters.ui = False
    limit(0, *START_LIMITS)
    try:
        server = xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise QuantizationError(f"llama.cpp's server does not start with this file: {error}") from error
    yield str(server.listening_address), 0


@contextlib.contextmanager
def _serve_binary(request: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """A llama-server child of this worker, which dies with it; its address and process.

    It chooses its port itself and says which, so no other program can take it in between. What it says goes to this
    worker's log, also when it dies.
    """
    _require_working(request["binary"])
    arguments = f"-c 512 -np 1 -ngl 0 --no-warmup --offline --no-ui --no-repack --no-prefill-assistant --jinja --host {HOST}"
    with tempfile.NamedTemporaryFile() as output:
        child = subprocess.Popen(
            [request["binary"], "-m", request["model"], "--port", "0", *arguments.split()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        limit(child.pid, *START_LIMITS)
        try:
            yield _await(child, Path(output.name)), child.pid
        finally:
            child.kill()
            child.wait()
            print(Path(output.name).read_text(encoding="utf-8", errors="replace"), flush=True)  # noqa: T201 - to the log


def _require_working(binary: str) -> None:
    """Raise DependencyError for a server that does not even say its version: no file is to blame for that."""
    hint = "mend it or take it off PATH: the server of the xllamacpp wheel is used then"
    try:
        done = subprocess.run(
            [binary, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=VERSION_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DependencyError(f"{binary} does not run: {error}", hint=hint) from error
    if done.returncode or "version" not in done.stdout + done.stderr:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it says nothing"]
        raise DependencyError(
            f"{binary} --version ends with exit code {done.returncode}: {last[0]}", hint=hint
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _await(child: subprocess.Popen[bytes], log: Path) -> str:
    """The server's address, once it says where it listens and answers /health with ok."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        ended, output = child.poll(), log.read_bytes()
        if ended is not None:
            if TOO_OLD in output:
                raise DependencyError(
                    f"{child.args[0]!r} lacks an option that quantool needs: "  # type: ignore[index]
                    + output.decode("utf-8", "replace").strip().splitlines()[0],
                    hint="take a newer llama.cpp, or take it off PATH: the server of the xllamacpp wheel is used then",
                )
            raise QuantizationError(f"llama.cpp's server does not start with this file (exit code {ended})")
        if (found := LISTENING.search(output)) is not None:
            address = found[1].decode()
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError, QuantizationError):
                if _post(address, "/health", None).get("status") == "ok":
                    return address
        time.sleep(0.05)
    raise DependencyError(
        f"llama.cpp's server was not ready after {START_SECONDS:.0f} s; what it said is in the log"
    )
