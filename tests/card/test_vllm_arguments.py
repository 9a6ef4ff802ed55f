"""What the card tells vLLM, by what a template writes."""

from __future__ import annotations

from pathlib import Path

import making
import pytest

from quantool.card.vllm_arguments import reasoning_parser, serve_arguments, tensor_parallel, tool_parser
from quantool.records import ModelFacts
from quantool.source.resolve import resolve

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"


@pytest.fixture(scope="module")
def tiny() -> ModelFacts:
    wanted = making.config(making.TINY, Path("never-written"), "F16")
    return resolve(wanted, weights=False, progress=making.QUIET).facts


def with_template(facts: ModelFacts, template: str, **changes: object) -> ModelFacts:
    return facts.model_copy(update={"chat_template": template, "named_templates": {}} | changes)


@pytest.mark.parametrize(
    ("text", "parser"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "hermes"),
        (
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
            "qwen3_coder",
        ),
        ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "glm45"),
        ('[TOOL_CALLS][{"name": "f"}]', "mistral"),
        (
            "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>f\n```json\n{}\n```",
            "deepseek_v3",
        ),
        (
            "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>f<\uff5ctool\u2581sep\uff5c>{}",
            "deepseek_v31",
        ),
        ("<|start|>assistant<|channel|>commentary<|message|>{}<|call|>", "openai"),
        ('Environment: ipython {"name": "f", "parameters": {}}', "llama3_json"),
        ("CALL f WITH a", None),
    ],
)
def test_a_tool_parser_goes_by_the_format_of_the_calls(
    tiny: ModelFacts, text: str, parser: str | None
) -> None:
    assert tool_parser(with_template(tiny, TOOLS + text)) == parser
    assert tool_parser(with_template(tiny, text)) is None  # a template that takes no tools
    named = with_template(tiny, "{{ messages }}", named_templates={"tool_use": TOOLS + text})
    assert tool_parser(named) == parser


def test_a_model_without_a_template_gets_no_parser(tiny: ModelFacts) -> None:
    assert serve_arguments(tiny.model_copy(update={"chat_template": None}), 1) == []


@pytest.mark.parametrize(
    ("template", "model_type", "parser"),
    [
        (
            PROMPT + "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}{% endif %}",
            "qwen3",
            "qwen3",
        ),
        (PROMPT + "{{ '<think>\n' }}{% endif %}", "qwen2", "deepseek_r1"),
        (PROMPT + "{% if enable_thinking %}<think>{% endif %}{% endif %}", "glm4_moe", "glm45"),
        ("{{ '<think>' + message.reasoning_content + '</think>' }}" + PROMPT + "{% endif %}", "qwen3", None),
        ("{{ messages }}", "llama", None),
    ],
)
def test_a_reasoning_parser_goes_by_how_an_answer_begins(
    tiny: ModelFacts, template: str, model_type: str, parser: str | None
) -> None:
    assert reasoning_parser(with_template(tiny, template, model_type=model_type)) == parser


@pytest.mark.parametrize(
    ("gigabytes", "heads", "gpus"),
    [(7, 32, 1), (41, 64, 1), (81, 64, 2), (140, 64, 4), (405, 128, 8), (81, 7, 1)],
)
def test_as_many_gpus_as_hold_the_weights(tiny: ModelFacts, gigabytes: float, heads: int, gpus: int) -> None:
    facts = tiny.model_copy(update={"heads": heads})
    assert tensor_parallel(facts, int(gigabytes * 1e9)) == gpus


def test_the_tiny_chat_model(tiny: ModelFacts) -> None:
    assert serve_arguments(tiny, Path(making.TINY / "model.safetensors").stat().st_size) == [
        "--enable-auto-tool-choice", "--tool-call-parser hermes",
    ]  # fmt: skip
    assert serve_arguments(tiny.model_copy(update={"heads": 64}), 8 * 10**10)[0] == "--tensor-parallel-size 2"
