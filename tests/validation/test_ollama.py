"""Chats through Ollama: what it hands on, and a verdict that says what comes out otherwise without failing the file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tampering import case, findings, folder_of

from quantool.records import Verdict
from quantool.validation._chat.conversations import WEATHER, Conversation, assistant, call, result, user
from quantool.validation._chat.ollama import handed_on, has_tools


def test_tools_arrive_in_the_order_of_ollamas_types_and_without_what_these_lack() -> None:
    schema = {"type": "integer", "minimum": 1, "description": "<n>"}
    parameters = {
        "type": "object",
        "properties": {"n": schema},
        "required": ["n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "strict": True, "function": {"name": "f", "parameters": parameters}}
    sent = handed_on(Conversation("t", (user("a"),), (tool,)))
    assert sent is not None
    assert json.dumps(sent.tools[0]) == json.dumps(
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "type": "object",
                    "required": ["n"],
                    "properties": {"n": {"type": "integer", "description": "<n>"}},
                },
            },
        }
    )


def test_arguments_become_text_as_go_writes_it_and_reasoning_is_lost() -> None:
    messages = (user("a"), assistant(None, call({"b": "<1>", "a": 2}), reasoning="why"), result("{}"))
    sent = handed_on(Conversation("t", messages))
    assert sent is not None
    assert has_tools(sent)
    assert sent.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call00001",
                "index": 0,
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"b":"\\u003c1\\u003e","a":2}'},
            }
        ],
    }
    assert sent.messages[2] == {
        "role": "tool",
        "content": "{}",
        "tool_call_id": "call00001",
        "name": "get_weather",
    }


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation("parts", (user([{"type": "text", "text": "a"}]),)),
        Conversation("no prompt", (user("a"), assistant("b")), generation_prompt=False),
    ],
)
def test_what_cannot_be_sent_is_not_compared(conversation: Conversation) -> None:
    assert handed_on(conversation) is None


@pytest.mark.e2e
def test_plain_conversations_are_equal_and_a_template_that_prints_schemas_is_not() -> None:
    found = findings("ollama", case("qwen3"))
    assert {metric: finding.verdict for metric, finding in found.items()} == {
        "conversations": Verdict.PASS,
        "tools": Verdict.SKIPPED,
    }
    assert "the file is sound" in found["tools"].detail
    assert WEATHER["function"]["name"] in found["tools"].detail or "required" in found["tools"].detail


def test_what_ollama_does_not_run_is_skipped() -> None:
    folder = folder_of("qwen3")
    (found,) = findings("ollama", case("qwen3", folder)).values()
    assert (found.verdict, found.detail) == (Verdict.SKIPPED, "Ollama runs GGUF files")
    chosen = case("qwen3", folder.with_suffix(".gguf"))
    facts = chosen.source.facts.model_copy(update={"chat_template": None})
    bare = replace(chosen, source=chosen.source.model_copy(update={"facts": facts}))
    (found,) = findings("ollama", bare).values()
    assert found.detail == "the source has no chat template"
