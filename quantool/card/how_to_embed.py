"""How to run an embedding model, a reranker or a classifier: commands and snippets for the model card."""

from __future__ import annotations

import json

from quantool.report.sections import folded
from quantool.tasks import Task, TaskKind

SERVER = "http://localhost:8080"
POOLINGS = {"lasttoken": "last"}
"""How llama-server calls what sentence-transformers names otherwise."""
TEXTS = ["Madrid is the capital of Spain.", "It rains in Bilbao."]
QUERY = "What is the capital of Spain?"


def served(choice: str, task: Task, context: int) -> str:
    """llama-server on the file that ``choice`` (its arguments) names, and a request to it.

    A text is computed in one piece, which has to fit into a batch (``-ub``).
    """
    heading = "With [llama.cpp](https://github.com/ggml-org/llama.cpp):\n\n"
    room = f"-c {context} -b {context} -ub {context}"
    if task.kind is TaskKind.CLASSIFICATION:  # llama-server answers with more numbers than there are labels
        return (
            f"{heading}```sh\nllama-embedding {choice} --pooling rank {room} -p '{TEXTS[0]}'\n```\n\n"
            f"It prints a logit for each label: {', '.join(task.labels)}.\n"
        )
    if task.kind is TaskKind.EMBEDDING:
        mode = f"--embedding --pooling {POOLINGS.get(task.pooling or '', task.pooling)}"
        path = "/v1/embeddings"
        body: dict[str, str | list[str]] = {"input": TEXTS}
    else:
        mode, path, body = "--rerank", "/v1/rerank", {"query": QUERY, "documents": TEXTS}
    request = json.dumps(body)
    text = (
        f"{heading}```sh\nllama-server {choice} {mode} {room}\n```\n\nWhile it runs:\n\n"
        f"```sh\ncurl {SERVER}{path} -H 'Content-Type: application/json' -d '{request}'\n```\n"
    )
    return text + prompts(task)


def prompts(task: Task) -> str:
    """What the model wants before a text, which neither llama.cpp nor vLLM puts there."""
    known = {name: text for name, text in task.prompts.items() if text}
    if not known:
        return ""
    lines = [f"- {name}: `{json.dumps(text, ensure_ascii=False)[1:-1]}`" for name, text in known.items()]
    return (
        "\nBefore a text the model wants its prompt (sentence-transformers puts it there by its name):\n\n"
        + "\n".join(lines)
        + "\n"
    )


def loaded(named: str, task: Task, context: int) -> str:
    """A folder in sentence-transformers or transformers, and served by vLLM."""
    if task.kind is TaskKind.EMBEDDING:
        library = "sentence-transformers"
        code = (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{named}")\nprint(model.encode({json.dumps(TEXTS)}))\n'
        )
    elif task.kind is TaskKind.RERANKING:
        library = "sentence-transformers"
        pairs = json.dumps([[QUERY, text] for text in TEXTS])
        code = (
            "from sentence_transformers import CrossEncoder\n\n"
            f'model = CrossEncoder("{named}")\nprint(model.predict({pairs}))\n'
        )
    else:
        library = "transformers"
        code = (
            "from transformers import pipeline\n\n"
            f'classify = pipeline("text-classification", model="{named}")\nprint(classify({json.dumps(TEXTS)}))\n'
        )
    serve = f"```sh\nvllm serve {named} --runner pooling --max-model-len {context}\n```\n"
    return (
        f"`pip install {library} compressed-tensors`, then:\n\n```python\n{code}```\n{prompts(task)}\n"
        + folded("Served by vLLM", serve)
    )
