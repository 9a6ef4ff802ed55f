"""Tool calls are found in every format that models were trained on, and nowhere else."""

from __future__ import annotations

import pytest

from quantool.validation._chat.tool_calls import Call, calls


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}',
        'Let me look.\n<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}<|eom_id|>',
        '{"type": "function", "name": "f", "parameters": {"a": 1}}',
        '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]</s>',
        '[TOOL_CALLS]f[ARGS]{"a": 1}</s>',
        '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}</s>',
        '[TOOL_CALLS]f{"a": 1}</s>',
        '```json\n{"name": "f", "arguments": {"a": 1}}\n```',
        '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>',
        '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}}\n]<|END_ACTION|>',
        '<function=f>{"a": 1}</function><|eot_id|>',
        '>>>f\n{"a": 1}<|eot_id|>',
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>',
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',  # noqa: RUF001 - DeepSeek's bars
    ],
)
def test_formats_of_tool_calls(text: str) -> None:
    assert calls(text) == (Call("f", {"a": 1}),)


def test_formats_without_types() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx y\n</parameter>\n</function>"
    assert calls(text) == (Call("f", {"a": "1", "b": "x y"}),)
    assert calls('[f(a=1), g(b="x")]') == (Call("f", {"a": "1"}), Call("g", {"b": "'x'"}))
    assert calls("```tool_code\nf(a=1)\n```") == (Call("f", {"a": "1"}),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is sunny in Vigo.",
        '<tool_call>\n{"name": "f", "arguments": {"a": ',
        '{"name": "Ana", "age": 3}',
        '{"name": "f", "arguments": 5}',
        "[TOOL_CALLS]f",
        "[1, 2, f(3)]",
        "{" * 3000,
        "[f(" * 300,
        "```python\nprint(2 + 3)\n```",
    ],
)
def test_what_is_no_tool_call(text: str) -> None:
    assert calls(text) == ()


def test_several_calls_in_order() -> None:
    one, other = (f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in "fg")
    assert [call.name for call in calls(one + "\n" + other)] == ["f", "g"]
    nested = '{"name": "f", "arguments": {"inner": {"name": "g", "arguments": {}}}}'
    assert [call.name for call in calls(nested)] == ["f"]
