"""The card's commands for embedding models, rerankers and classifiers, run as they stand there where the engine is here."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import making
import pooled_making
import pytest

from quantool.card import how_to_embed
from quantool.runtime import process
from quantool.tasks import Task, TaskKind

EMBEDDING = Task(kind=TaskKind.EMBEDDING, pooling="lasttoken", prompts={"query": "Find: ", "document": ""})
RERANKER = Task(kind=TaskKind.RERANKING, labels=("LABEL_0",))
CLASSIFIER = Task(kind=TaskKind.CLASSIFICATION, labels=("sport", "law", "weather"))
PATIENCE = 120  # seconds


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@contextmanager
def serving(binary: Path, words: list[str]) -> Iterator[str]:
    """The address of llama-server with the options of the card, on a free port."""
    command = [str(binary), *words, "--host", "127.0.0.1", "--port", "0", "--offline", "--no-warmup"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=process.environment()
    ) as child:
        try:
            assert child.stderr is not None
            lines = iter(child.stderr.readline, "")
            found = next(
                (m[1] for line in lines if (m := re.search(r"listening on (http://[0-9.]+:\d+)", line))), None
            )
            assert found is not None, "llama-server ended"
            yield found
        finally:
            child.kill()


def post(url: str, body: str) -> Any:
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})  # noqa: S310
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with direct.open(request, timeout=PATIENCE) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > until:  # 503: the model is being loaded
                raise
            time.sleep(0.1)


def answered(file: Path, task: Task) -> Any:
    """What the server answers to the card's request, both as the card has them."""
    server, request = blocks(how_to_embed.served(f"-m {shlex.quote(str(file))}", task, 256), "sh")
    name, *words = shlex.split(server)
    curl = shlex.split(request)
    assert (name, curl[0]) == ("llama-server", "curl")
    with serving(making.upstream(name), words) as address:
        return post(curl[1].replace("http://localhost:8080", address), curl[curl.index("-d") + 1])


@pytest.mark.e2e
@pytest.mark.upstream
def test_the_server_embeds() -> None:
    answer = answered(pooled_making.gguf(pooled_making.EMBEDDING), EMBEDDING)
    vectors = [entry["embedding"] for entry in answer["data"]]
    assert [len(vector) for vector in vectors] == [256, 256]
    assert [math.fsum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.e2e
@pytest.mark.upstream
def test_the_server_reranks() -> None:
    answer = answered(pooled_making.gguf("roberta_reranker"), RERANKER)
    assert {entry["index"] for entry in answer["results"]} == {0, 1}
    assert len({entry["relevance_score"] for entry in answer["results"]}) == 2


@pytest.mark.e2e
def test_the_snippet_for_a_classifier_runs() -> None:
    folder = pooled_making.fp8("qwen3_classifier")
    (snippet,) = blocks(how_to_embed.loaded(str(folder), CLASSIFIER, 256), "python")
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        capture_output=True,
        text=True,
        check=False,
        env=process.environment(),
    )
    assert done.returncode == 0, done.stderr
    assert re.search("sport|law|weather", done.stdout)


def test_pooling_and_prompts_are_the_models_own() -> None:
    text = how_to_embed.served("-m x.gguf", EMBEDDING, 512)
    assert "llama-server -m x.gguf --embedding --pooling last -c 512 -b 512 -ub 512" in text
    assert "- query: `Find: `" in text
    assert "document" not in text.partition("wants its prompt")[2]
    assert "--pooling mean" in how_to_embed.served("x", EMBEDDING.model_copy(update={"pooling": "mean"}), 512)


def test_a_classifier_is_run_by_the_program_that_knows_its_labels() -> None:
    """llama-server answers with as many numbers as the model is wide, of which the first ones alone are logits."""
    text = how_to_embed.served("-m x.gguf", CLASSIFIER, 512)
    assert "llama-embedding -m x.gguf --pooling rank -c 512" in text
    assert "a logit for each label: sport, law, weather" in text


def test_a_prompt_stays_on_its_line() -> None:
    task = EMBEDDING.model_copy(update={"prompts": {"query": "Instruct: find\nQuery: "}})
    assert r"- query: `Instruct: find\nQuery: `" in how_to_embed.prompts(task)
    assert how_to_embed.prompts(RERANKER) == ""


@pytest.mark.parametrize(
    ("task", "name"),
    [(EMBEDDING, "SentenceTransformer"), (RERANKER, "CrossEncoder"), (CLASSIFIER, "pipeline")],
)
def test_folders_are_loaded_by_the_library_of_their_task(task: Task, name: str) -> None:
    text = how_to_embed.loaded("us/m", task, 512)
    (snippet,) = blocks(text, "python")
    compile(snippet, "card", "exec")
    assert f'{name}("' in snippet
    assert '"us/m"' in snippet
    assert "vllm serve us/m --runner pooling --max-model-len 512" in text
