"""Commands of engines beside llama.cpp and vLLM, each shown only where it is known to take this very artifact."""

from __future__ import annotations

import json

from quantool.card.vllm_arguments import reasoning_parser, tensor_parallel, tool_parser
from quantool.records import ModelFacts
from quantool.report.sections import folded

SGLANG_LEVELS = frozenset({"FP8", "FP8_DYNAMIC", "W8A8"})
"""What SGLang computes by itself (its compressed_tensors.py, ``_get_scheme_from_parts``); the rest asks for vLLM beside it."""
SGLANG_TOOLS = {
    "deepseek_v3": "deepseekv3",
    "deepseek_v31": "deepseekv31",
    "glm45": "glm45",
    "hermes": "qwen25",
    "kimi_k2": "kimi_k2",
    "llama3_json": "llama3",
    "minimax_m2": "minimax-m2",
    "mistral": "mistral",
    "openai": "gpt-oss",
    "qwen3_coder": "qwen3_coder",
}
"""vLLM's name of a tool parser to SGLang's (function_call_parser.py, ``ToolCallParserEnum``)."""
SGLANG_REASONING = {"deepseek_r1": "deepseek-r1", "glm45": "glm45", "qwen3": "qwen3"}
"""The same for reasoning (reasoning_parser.py, ``DetectorMap``)."""

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "Name of the city"}},
            "required": ["location"],
        },
    },
}
TOOL_QUESTION = "What is the weather in Barcelona?"


def sglang(level: str, named: str, facts: ModelFacts, weights: int, context: int) -> str:
    """``sglang.launch_server`` on a folder of ``level``, folded; empty where SGLang has no arithmetic for it."""
    if level not in SGLANG_LEVELS:
        return ""
    arguments = [f"--model-path {named}", f"--context-length {context}"]
    if (gpus := tensor_parallel(facts, weights)) > 1:
        arguments.append(f"--tp-size {gpus}")
    if (parser := tool_parser(facts)) in SGLANG_TOOLS:
        arguments.append(f"--tool-call-parser {SGLANG_TOOLS[parser]}")
    if (parser := reasoning_parser(facts)) in SGLANG_REASONING:
        arguments.append(f"--reasoning-parser {SGLANG_REASONING[parser]}")
    command = " \\\n  ".join(["python -m sglang.launch_server", *arguments])
    return folded("With SGLang", f"```sh\n{command}\n```\n\nIt listens on port 30000.\n")


def desktop(repo_id: str, level: str) -> str:
    """Docker Model Runner and LM Studio, which find a level of a repository by its tag as llama.cpp does; folded."""
    return folded(
        "With Docker Model Runner or LM Studio",
        f"```sh\ndocker model run hf.co/{repo_id}:{level}\n"
        f"lms get https://huggingface.co/{repo_id}@{level}\n```\n\n"
        "Both run the file with a build of llama.cpp of their own, which is not the one that judged it.\n",
    )


def tool_request(port: int, model: str) -> str:
    """A request that offers a tool to a server which reads tool calls, folded; the answer is a call, not a text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": TOOL_QUESTION}],
        "tools": [TOOL],
        "max_tokens": 64,
    }
    url = f"http://localhost:{port}/v1/chat/completions"
    request = json.dumps(body, indent=2)
    return folded(
        "A tool call",
        f"While the server runs:\n\n```sh\ncurl {url} -H 'Content-Type: application/json' -d '{request}'\n```\n\n"
        "The call stands in `choices[0].message.tool_calls`, its arguments as JSON text.\n",
    )
