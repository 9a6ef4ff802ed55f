"""The card's ``vllm serve``, run on a GPU as it stands there; its request with a tool has to be answered with a parsed call.

    python tests/serve_hopper.py FOLDER [--card README.md] [--port 8123] [-- further arguments of vllm serve]

FOLDER is a packed artifact (with README.md), or a checkpoint or artifact beside a card given by ``--card``. The command is
cut out of the card and changed in one place: the repository's name becomes the folder. Prints a line of JSON with the
command, the call and the seconds until the server answered; exits with 1 when no call was parsed, with vLLM's last lines.
Needs Python and vLLM alone (``PYTHONPATH`` as in shared/vllm_on_hopper).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 420.0
"""Seconds until the server must answer: loading, compiling and CUDA graphs."""
LINES = 40
VLLM = [sys.executable, "-c", "from vllm.entrypoints.cli.main import main; main()"]
"""``vllm`` where no script of that name was installed."""


def card_commands(card: str) -> tuple[list[str], dict[str, Any]]:
    """Arguments of the card's ``vllm serve`` (the model first) and the body of its request with a tool."""
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL)]
    serve = next((shlex.split(block)[2:] for block in blocks if block.startswith("vllm serve ")), None)
    curl = next((shlex.split(block) for block in blocks if block.startswith("curl ")), None)
    if serve is None or curl is None:
        raise SystemExit("the card has no `vllm serve` or no request with a tool")
    return serve, json.loads(curl[curl.index("-d") + 1])


def post(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """What a server of this machine answers; no proxy is asked."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
        text = response.read()
    answer: dict[str, Any] = json.loads(text) if text else {}
    return answer


def wait(server: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers; SystemExit when it ended or never does."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with {server.returncode}")
        try:
            post(url, None)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
        else:
            return
    raise SystemExit(f"vLLM does not answer within {PATIENCE:.0f} s")


def serve(folder: Path, card: Path, port: int, further: list[str]) -> dict[str, Any]:
    """Run the card's command on ``folder`` and send its request; the model's name stays the card's."""
    (name, *arguments), body = card_commands(card.read_text(encoding="utf-8"))
    command = [
        *VLLM,
        "serve",
        str(folder),
        *arguments,
        "--served-model-name",
        name,
        "--port",
        str(port),
        *further,
    ]
    print(shlex.join(["vllm", *command[len(VLLM) :]]), file=sys.stderr, flush=True)
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait(server, f"http://127.0.0.1:{port}/health")
            ready = time.monotonic() - started
            answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body | {"temperature": 0})
        except BaseException:
            log.seek(0)
            print(*log.read().decode(errors="replace").splitlines()[-LINES:], sep="\n", file=sys.stderr)
            raise
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
    return {
        "command": shlex.join(["vllm", "serve", name, *arguments]),
        "ready_after": round(ready, 1),
        "message": answer["choices"][0]["message"],
    }


def main() -> None:
    """Run, print, and judge by the parsed call."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--card", type=Path)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("further", nargs="*")
    arguments = parser.parse_args()
    card = arguments.card or arguments.folder / "README.md"
    result = serve(arguments.folder, card, arguments.port, arguments.further)
    print(json.dumps(result), flush=True)
    calls = result["message"].get("tool_calls") or []
    if not calls or not isinstance(json.loads(calls[0]["function"]["arguments"]), dict):
        raise SystemExit("no tool call was parsed")


if __name__ == "__main__":
    main()
