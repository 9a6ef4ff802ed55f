"""The card's commands and snippets, run as they stand there."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import making
import pytest
import tampering

from quantool.card.how_to_run import usage
from quantool.records import Finding, Report, Verdict
from quantool.runtime import process
from tests.loopback_hub import ID, Answer, Asked, Hub, Repository, reply, serving
from tests.serve_hopper import card_commands

SERVED_WITH = " \\\n  --max-model-len 2048 \\\n  --enable-auto-tool-choice \\\n  --tool-call-parser hermes\n"
"""The tiny chat model's template asks for calls as Hermes has them."""
SGLANG = " \\\n  --model-path us/tiny-FP8 \\\n  --context-length 2048 \\\n  --tool-call-parser qwen25\n"
SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
REPO = "us/tiny-chat-GGUF"


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> making.Made:
    """Q4_K_M of the tiny chat model where a test runs an engine, otherwise a record of it."""
    if request.node.get_closest_marker("e2e"):
        with making.own_cache():
            return making.made("tiny-chat")
    request.getfixturevalue("plugin")
    return making.recorded(tmp_path / "out")


def told(made: making.Made, repo_id: str | None = REPO, **changes: Any) -> str:
    outputs = [output.model_copy(update={"repo_id": repo_id} | changes) for output in made.plan.outputs]
    reports = [
        Report(artifact=artifact, reference="bf16", findings=(), seconds=1.0) for artifact in made.artifacts
    ]
    return usage(made.plan, outputs, reports, SAMPLING)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.e2e
def test_the_snippet_of_llama_cpp_python_runs(made: making.Made) -> None:
    snippet = next(block for block in blocks(told(made), "python") if "llama_cpp" in block)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=made.folder,
        capture_output=True,
        text=True,
        check=False,
        env=process.environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.e2e
@pytest.mark.parametrize("chat", [True, False])
def test_the_snippet_of_transformers_runs(made: making.Made, chat: bool) -> None:
    with making.own_cache():
        folder, output = tampering.fp8_of("tiny-chat")
    plan = made.plan
    facts = plan.source.facts if chat else plan.source.facts.model_copy(update={"chat_template": None})
    source = plan.source.model_copy(update={"facts": facts})
    text = usage(plan.model_copy(update={"source": source}), [output], [], SAMPLING if chat else {})
    snippet = next(block for block in blocks(text, "python") if "transformers" in block)
    done = subprocess.run(
        [sys.executable, "-c", snippet.replace(f'"{output.repo}"', f'"{folder}"')],
        capture_output=True, text=True, check=False, env=process.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


SERVER = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.hostnames, parameters.port = sys.argv[1], ["127.0.0.1"], 0
parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.offline = 512, 1, False, True
parameters.fit_params = False
server = xllamacpp.Server(parameters)
print("address", server.listening_address, flush=True)
time.sleep(600)
"""


@contextmanager
def served(file: Path) -> Iterator[str]:
    """The address of llama.cpp's server on ``file``."""
    command = [sys.executable, "-c", SERVER, str(file)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=process.environment()
    )
    try:
        assert child.stdout is not None
        address = next((line.split()[1] for line in child.stdout if line.startswith("address ")), None)
        assert address is not None, "the server ended"
        yield address
    finally:
        child.kill()
        child.communicate()


def asked(snippet: str) -> tuple[str, dict[str, Any]]:
    """The address that a snippet gives to OpenAI's client, and the body that the client sends."""
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    given = {ast.unparse(call.func): {k.arg: ast.literal_eval(k.value) for k in call.keywords} for call in calls
             if ast.unparse(call.func) != "print"}  # fmt: skip
    body = next(values for name, values in given.items() if name.endswith(".create"))
    return str(given["OpenAI"]["base_url"]), {k: v for k, v in body.items() if k} | body.get("extra_body", {})


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as response:
        answered: dict[str, Any] = json.load(response)
    return answered


@pytest.mark.e2e
def test_the_request_of_the_openai_client_is_answered(made: making.Made) -> None:
    chat = next(block for block in blocks(told(made), "python") if "openai" in block)
    facts = made.plan.source.facts.model_copy(update={"chat_template": None})
    source = made.plan.source.model_copy(update={"facts": facts})
    changed = making.Made(
        made.checkpoint, made.root, made.plan.model_copy(update={"source": source}), made.artifacts
    )
    base = next(block for block in blocks(told(changed), "python") if "openai" in block)
    with served(made.folder / made.artifacts[0].files[0].name) as address:
        url, body = asked(chat)
        assert url == "http://localhost:8080/v1"
        assert (body["temperature"], body["top_k"], body["repetition_penalty"]) == (0.7, 40, 1.1)
        answer = post(f"{address}/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] > 0
        url, body = asked(base)
        assert post(f"{address}/v1/completions", body)["choices"][0]["text"]


def refs(hub: Hub, match: re.Match[str], request: Asked) -> Answer:
    found = hub.find(match)
    assert isinstance(found, Repository)
    return reply({"branches": [{"name": "main", "targetCommit": found.commit}], "tags": [], "converts": []})


@pytest.mark.e2e
@pytest.mark.upstream
def test_llama_server_finds_the_file_by_its_level(made: making.Made, tmp_path: Path) -> None:
    """The ``-hf`` command against a Hub; a second level and the importance matrix lie beside the file."""
    binary = making.upstream("llama-server")
    name = made.artifacts[0].files[0].name
    files = {path.name: path.read_bytes() for path in made.folder.glob("*.gguf")}
    files[name.replace("Q4_K_M", "Q8_0")] = b"GGUF, but not the one that is asked for"
    hub = Hub()
    hub.repositories[REPO] = Repository(files)
    hub.routes = [(("GET",), rf"/api/models/{ID}/refs", refs), *hub.routes]
    command = blocks(told(made), "sh")[0].splitlines()[0].split()
    assert command[:3] == ["llama-server", "-hf", f"{REPO}:Q4_K_M"]
    with serving(hub):
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "LLAMA_CACHE": str(tmp_path / "cache")}
        with _started([binary, *command[1:]], made.folder, settings):
            pass
    assert set(hub.downloads()) == {name}


@pytest.mark.e2e
@pytest.mark.upstream
def test_the_printed_server_answers_the_printed_request_with_a_tool_call(made: making.Made) -> None:
    binary = making.upstream("llama-server")
    text = told(made, None)
    command = blocks(text, "sh")[0].splitlines()[0].split()
    assert (command[0], command[-1]) == ("llama-server", "--jinja")
    url, body = _curl(text)
    assert url == "http://localhost:8080/v1/chat/completions"
    with _started([binary, *command[1:]], made.folder, {}) as address:
        answer = post(f"{address}/v1/chat/completions", body | {"temperature": 0})
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"location": "Barcelona"}


def _curl(text: str) -> tuple[str, dict[str, Any]]:
    """The address and the body of the card's request with a tool."""
    command = shlex.split(next(block for block in blocks(text, "sh") if block.startswith("curl ")))
    body: dict[str, Any] = json.loads(command[command.index("-d") + 1])
    return command[1], body


@contextmanager
def _started(command: Sequence[str | Path], folder: Path, settings: dict[str, str]) -> Iterator[str]:
    """The address of a llama-server that was started in ``folder`` as the card says, on a free port."""
    port = _free_port()
    child = subprocess.Popen(
        [*command, "--port", str(port), "--no-warmup"],
        cwd=folder,
        env={key: value for key, value in process.environment().items() if not key.startswith("HF_")}
        | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _await(child, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.communicate()


def _free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _await(child: subprocess.Popen[str], url: str) -> None:
    until = time.monotonic() + 60
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until:
        if child.poll() is not None:
            raise AssertionError(child.communicate()[0])
        try:
            with direct.open(url, timeout=5) as response:
                if json.load(response)["status"] == "ok":
                    return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise AssertionError("the server does not answer")


def test_every_file_has_its_command(made: making.Made) -> None:
    text = told(made)
    name = made.artifacts[0].files[0].name
    assert f"llama-cli -hf {REPO}:Q4_K_M -c 2048 --jinja\n" in text
    assert f"hf download {REPO} {name} --local-dir .\nllama-server -m {name} -c 2048 --jinja\n" in text
    local = told(made, None)
    assert f"llama-server -m {name} -c 2048 --jinja\nllama-cli -m {name} -c 2048 --jinja\n" in local
    assert "-hf" not in local


def _levels(made: making.Made, names: dict[str, list[str]], repo_id: str | None = REPO) -> str:
    (artifact,), (output,) = made.artifacts, made.plan.outputs
    reports, outputs = [], []
    for level, files in names.items():
        records = tuple(artifact.files[0].model_copy(update={"name": file}) for file in files)
        changed = artifact.model_copy(update={"level": level, "files": records})
        sound = Finding(check="perplexity", metric="loads", verdict=Verdict.PASS)
        reports.append(Report(artifact=changed, reference="bf16", findings=(sound,), seconds=1.0))
        outputs.append(output.model_copy(update={"level": level, "repo_id": repo_id}))
    return usage(made.plan, outputs, reports, SAMPLING)


def test_a_level_whose_name_is_the_end_of_another_is_asked_for_by_its_file(made: making.Made) -> None:
    text = _levels(made, {"F16": ["m-F16.gguf"], "BF16": ["m-BF16.gguf"], "Q8_0": ["m-Q8_0.gguf"]})
    assert "| F16 | `llama-server -hf us/tiny-chat-GGUF -hff m-F16.gguf -c 2048 --jinja` |" in text
    assert "| BF16 | `llama-server -hf us/tiny-chat-GGUF:BF16 -c 2048 --jinja` |" in text
    assert "llama-server -hf us/tiny-chat-GGUF:Q8_0 -c 2048 --jinja\nllama-cli" in text


def test_parts_are_downloaded_together_and_the_first_is_named(made: making.Made) -> None:
    parts = [f"m-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    text = _levels(made, {"Q8_0": parts})
    assert 'hf download us/tiny-chat-GGUF --include "m-Q8_0-*.gguf" --local-dir .\n' in text
    assert "llama-server -m m-Q8_0-00001-of-00002.gguf" in text
    assert 'Llama("m-Q8_0-00001-of-00002.gguf"' in text


@pytest.mark.parametrize(
    ("level", "repo_id", "command", "capability"),
    [
        ("FP8_DYNAMIC", "us/tiny-FP8", f"vllm serve us/tiny-FP8{SERVED_WITH}", True),
        ("W4A16", None, f"vllm serve tiny-chat-GGUF{SERVED_WITH}", False),
    ],
)
def test_vllm_serves_what_transformers_loads(
    made: making.Made, level: str, repo_id: str | None, command: str, capability: bool
) -> None:
    text = told(made, repo_id, engine="transformers", level=level)
    assert command in text
    assert ("compute capability 8.9" in text) is capability
    url, body = asked(blocks(text, "python")[0])
    assert url == "http://localhost:8000/v1"
    assert body["model"] == command.split()[2]
    assert "llama" not in text


def test_a_level_that_other_programs_find_by_its_tag_has_their_commands(made: making.Made) -> None:
    text = told(made)
    assert f"docker model run hf.co/{REPO}:Q4_K_M\nlms get https://huggingface.co/{REPO}@Q4_K_M\n" in text
    assert "docker model" not in told(made, None)
    hidden = _levels(made, {"F16": ["m-F16.gguf"], "BF16": ["m-BF16.gguf"]})
    assert "docker model" not in hidden  # their tag F16 is the end of BF16


@pytest.mark.parametrize(
    ("level", "command"),
    [
        ("FP8_DYNAMIC", f"python -m sglang.launch_server{SGLANG}"),
        ("W4A16", None),
    ],
)
def test_sglang_is_named_where_it_has_the_arithmetic(
    made: making.Made, level: str, command: str | None
) -> None:
    text = told(made, "us/tiny-FP8", engine="transformers", level=level)
    assert command in text if command else "sglang" not in text
    assert _curl(text)[0] == "http://localhost:8000/v1/chat/completions"


def test_the_script_for_the_gpu_runs_what_the_card_says(made: making.Made) -> None:
    serve, body = card_commands(told(made, "us/tiny-FP8", engine="transformers", level="FP8_DYNAMIC"))
    assert serve == shlex.split(f"us/tiny-FP8{SERVED_WITH}".replace("\\\n", " "))
    assert body["tools"][0]["function"]["name"] == "get_weather"


def test_a_calibrated_cache_is_asked_for(made: making.Made) -> None:
    plain = told(made, engine="transformers", level="FP8")
    assert "--kv-cache-dtype" not in plain
    assert "--kv-cache-dtype fp8" in told(
        made, engine="transformers", level="FP8", options={"kv_cache": "fp8"}
    )


def test_a_model_without_tools_is_offered_none(made: making.Made) -> None:
    facts = made.plan.source.facts.model_copy(update={"chat_template": "{{ messages }}"})
    plan = made.plan.model_copy(update={"source": made.plan.source.model_copy(update={"facts": facts})})
    text = told(making.Made(made.checkpoint, made.root, plan, made.artifacts))
    assert "--jinja" not in text
    assert "curl" not in text
