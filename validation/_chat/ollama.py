"""What Ollama hands on of a conversation: since 0.30 it has llama.cpp's server render a GGUF through the file's own template.

Read in Ollama 0.32 (``server/routes.go``: ``chatModeForModel``; ``llm/llama_server.go``: ``llamaServerChatRequest``; ``api/types.go``).
Not everything arrives as it was sent: tools go through types of Ollama's own, which put the keys of a schema in one order and
have no place for others, arguments of calls become JSON text, and reasoning of earlier turns is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantool.validation._chat.conversations import Conversation, Message

PROPERTY = ("anyOf", "type", "items", "description", "enum", "properties", "required")
"""Keys of a property, in the order of ``ToolProperty``; there are no others."""
PARAMETERS = ("type", "$defs", "items", "required", "properties")
"""Likewise of ``ToolFunctionParameters``."""
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What Go's ``json.Marshal`` escapes beside JSON's own."""


def handed_on(conversation: Conversation) -> Conversation | None:
    """The conversation as llama.cpp's server gets it from Ollama.

    None for one that cannot be sent: its content is no text, or it asks for no answer.
    """
    contents = [message.get("content") for message in conversation.messages]
    if not conversation.generation_prompt or any(isinstance(content, list) for content in contents):
        return None
    return replace(
        conversation,
        messages=tuple(_message(message) for message in conversation.messages),
        tools=tuple(_tool(tool) for tool in conversation.tools),
    )


def has_tools(conversation: Conversation) -> bool:
    """Whether tools are offered, called or answering in it."""
    return bool(conversation.tools) or any(
        message["role"] == "tool" or message.get("tool_calls") for message in conversation.messages
    )


def _message(message: Message) -> Message:
    sent: Message = {"role": message["role"].lower(), "content": message.get("content") or ""}
    for key in ("tool_call_id", "name"):
        if message.get(key):
            sent[key] = message[key]
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [_call(number, call) for number, call in enumerate(calls)]
    return sent


def _call(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function["arguments"]
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    identity = {"id": call["id"]} if call.get("id") else {}
    return {
        **identity,
        "index": number,
        "type": "function",
        "function": {"name": function["name"], "arguments": _go_json(given)},
    }


def _tool(tool: Mapping[str, Any]) -> Message:
    function = tool["function"]
    described = {"description": function["description"]} if function.get("description") else {}
    return {
        "type": tool.get("type", ""),
        "function": {
            "name": function["name"],
            **described,
            "parameters": _parameters(function.get("parameters") or {}),
        },
    }


def _parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: schema[key] for key in PARAMETERS if schema.get(key)}
    properties = schema.get("properties")
    return {"type": "", **kept, "properties": None if properties is None else _properties(properties)}


def _properties(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _property(found) for name, found in properties.items()}


def _property(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: schema[key] for key in PROPERTY if schema.get(key)}
    if "properties" in kept:
        kept["properties"] = _properties(kept["properties"])
    if "anyOf" in kept:
        kept["anyOf"] = [_property(choice) for choice in kept["anyOf"]]
    return kept


def _go_json(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return "".join(ESCAPED.get(letter, letter) for letter in text)
