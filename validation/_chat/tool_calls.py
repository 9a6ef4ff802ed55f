"""Tool calls in what a model said, whatever format it was trained on.

The same reading serves the reference and the artifact, so it need not be that of an engine. It knows:

- a JSON object with a name and arguments (or parameters), alone or in a list, behind whatever marks it: Hermes and Qwen
  (``<tool_call>``), Llama 3 (``<|python_tag|>`` or nothing), Mistral (``[TOOL_CALLS]``), Granite and Phi
  (``<|tool_call|>``), Command R (``<|START_ACTION|>``), a fenced block;
- a name in a mark followed by a JSON object: ``<function=NAME>`` (Llama 3 custom tools, functionary 3.1, Qwen3-Coder),
  ``>>>NAME`` (functionary 3.2), ``[TOOL_CALLS]NAME`` (Mistral since 2025), ``functions.NAME`` (gpt-oss, Kimi),
  a name behind DeepSeek's separator;
- calls in Python's notation in a list or a fenced block (Llama 3.2, Gemma 3, OLMo).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters", "args")
MARKED = re.compile(
    r"(?:<function=|>>>|\[TOOL_CALLS\]|\bfunctions\.|<｜tool▁sep｜>)(?P<name>[A-Za-z_][\w.-]*)>?"  # noqa: RUF001 - DeepSeek's bar
)
"""A name that stands in a mark; its arguments follow as a JSON object or as ``<parameter=…>`` elements."""
PARAMETER = re.compile(r"\s*<parameter=(?P<key>[^>\s]+)>\s*(?P<value>.*?)\s*</parameter>", re.DOTALL)
BETWEEN = re.compile(r"(?:\[(?:ARGS|CALL_ID)\]\w*|:\d+|<\|[\w ]+\|>|[\w ]|```|\s)*")
"""What may stand between such a name and its arguments."""
PYTHON = re.compile(
    r"```(?:tool_code|python)?\s*(?P<fenced>.+?)```|(?P<listed>\[\s*\w[\w.]*\(.*\)\s*\])", re.DOTALL
)


@dataclass(frozen=True)
class Call:
    """One call: the function's name, and its arguments where they could be read."""

    name: str
    arguments: Any


def calls(text: str) -> tuple[Call, ...]:
    """The tool calls in ``text``, special tokens included, in order; empty when there are none or none is complete."""
    for reading in (_marked, _objects, _python):
        if found := tuple(reading(text)):
            return found
    return ()


def _marked(text: str) -> Iterator[Call]:
    for match in MARKED.finditer(text):
        name, rest = match["name"], text[match.end() :]
        if (parameter := PARAMETER.match(rest)) is not None:
            yield Call(name, dict(_parameters(rest, parameter)))
            continue
        start = BETWEEN.match(rest)
        arguments = _json_at(rest, start.end() if start else 0)
        if isinstance(arguments, dict):
            yield Call(name, arguments)


def _parameters(rest: str, first: re.Match[str]) -> Iterator[tuple[str, str]]:
    match: re.Match[str] | None = first
    while match is not None:
        yield match["key"], match["value"]
        match = PARAMETER.match(rest, match.end())


def _objects(text: str) -> Iterator[Call]:
    """Objects with a name and arguments; one inside another is part of it."""
    place = text.find("{")
    while place >= 0:
        value, end = _decoded(text, place)
        if value is None:
            end = place + 1
        elif (call := _call(value)) is not None:
            yield call
        else:
            end = place + 1  # a call may be inside
        place = text.find("{", end)


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str)), None)
    arguments = next((value[key] for key in ARGUMENTS if key in value), None)
    if name is None or arguments is None:
        return None
    if isinstance(arguments, str):
        arguments = _json_at(arguments, 0)
    return Call(name, arguments) if isinstance(arguments, dict) else None


def _json_at(text: str, place: int) -> Any:
    return _decoded(text, place)[0] if text[place : place + 1] == "{" else None


def _decoded(text: str, place: int) -> tuple[Any, int]:
    """The JSON value at ``place`` and where it ends; None when there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (json.JSONDecodeError, RecursionError):
        return None, place


def _python(text: str) -> Iterator[Call]:
    for match in PYTHON.finditer(text):
        try:
            tree = ast.parse((match["fenced"] or match["listed"]).strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        body = tree.body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        for node in nodes:
            if isinstance(node, ast.Call) and not node.args:
                yield Call(
                    ast.unparse(node.func), {part.arg: ast.unparse(part.value) for part in node.keywords}
                )
