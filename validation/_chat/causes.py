"""Why llama.cpp's server renders some templates differently from transformers although it has the same template.

Each cause was found by rendering the conversations of ``_conversations`` with every template in llama.cpp's own source
tree (models/templates) and following the difference to the line; the places are those of the llama.cpp in
llama-cpp-python 0.3.36. The user of the file gets the other text all the same, so a cause explains a difference and does
not excuse it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from quantool.validation._chat.renderings import differing_text


@dataclass(frozen=True)
class Cause:
    """A reason for a difference, and how it is known from the template, the right text and the one found."""

    reason: str
    explains: Callable[[str, str, str], bool]


@dataclass(frozen=True)
class Family:
    """Templates for which the server has a parser of its own, known by what their text contains and does not contain."""

    name: str
    source: str
    signs: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def has(self, template: str) -> bool:
        """Whether ``template`` is one of them."""
        return all(sign in template for sign in self.signs) and not any(
            sign in template for sign in self.lacks
        )


FAMILIES = (
    Family("Ministral 3", "ministral3.cpp", ("[SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]"), ("[CALL_ID]",)),
    Family("gpt-oss", "gpt-oss.cpp", ("<|channel|>",)),
    Family("Muse Glimmer", "muse-glimmer.cpp", ("<atem:function_calls>", "<|eom|>")),
    Family("Functionary 3.2", "functionary-v3-2.cpp", (">>>all", ">>>${recipient}")),
    Family("Kimi K2", "kimi-k2.cpp", ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")),
    Family("Kimi K3", "kimi-k3.cpp", ("<|open|>", "<|close|>", "<|end_of_msg|>")),
    Family("Ling 3", "ling3.cpp", ("<role>ASSISTANT</role>", "<arg_key>")),
    Family("Cohere 2 MoE", "cohere2moe.cpp", ("<|START_TEXT|>", "<|START_ACTION|>")),
    Family("LFM 2", "lfm2.cpp", ("<|tool_list_start|>", "<|tool_list_end|>")),
    Family("LFM 2.5", "lfm2.cpp", ("List of tools: [",), ("<|tool_list_start|>",)),
    Family("GigaChat 3", "gigachat-v3.cpp", ("<|role_sep|>", "<|message_sep|>"), ("<|function_call|>",)),
    Family("MiniMax M3", "minimax-m3.cpp", ("]<]minimax[>[", "<tool_call>", "<invoke name=")),
    Family("DeepSeek 3.2", "deepseek.cpp", ("dsml_token", "DSML", "function_calls")),
    Family("DeepSeek 4", "deepseek.cpp", ("dsml_token", "DSML", "tool_calls")),
    Family("Gemma 4", "gemma4.cpp", ("'<|tool_call>call:'",)),
    Family("MiniCPM 5", "minicpm5.cpp", ("Tool usage guidelines:", '<function name="', '<param name="')),
    Family(
        "Qwen 3 Coder",
        "qwen3-coder.cpp",
        ("<tool_call>", "<function=", "<parameter="),
        ("'<tool_call><function=' ~ tool_call.name ~ '>'",),
    ),
)
"""In the order in which ``common_chat_try_specialized_template`` (common/chat.cpp) tries them."""

STEPFUN = "You have access to the following functions in JSONSchema format"
CAUSES = (
    Cause(
        "llama.cpp trims every message for StepFun's templates (trim_all_content in common/chat.cpp)",
        lambda template, expected, found: STEPFUN in template and _squeezed(expected) == _squeezed(found),
    ),
    Cause(
        "llama.cpp merges tool results into the call's turn for Gemma 4's first templates "
        "(convert_tool_responses_gemma4 in common/parsers/gemma4.cpp)",
        lambda template, _, found: (
            "'<|tool_call>call:'" in template
            and "{#- OpenAI Chat Completions:" not in template
            and "<|tool_response>" in found
        ),
    ),
    Cause(
        "llama.cpp ends the last message with <|end|> in the place of <|return|> "
        "(common_chat_params_init_gpt_oss in common/parsers/gpt-oss.cpp)",
        lambda template, expected, found: (
            "<|channel|>" in template and expected.replace("<|return|>", "<|end|>") == found
        ),
    ),
    Cause(
        "llama.cpp leaves add_generation_prompt undefined where it is off, and this template takes that for on "
        "(common_chat_template_direct_apply_impl in common/chat.cpp)",
        lambda template, expected, found: (
            bool(re.search(r"add_generation_prompt is (not )?defined", template))
            and found.startswith(expected)
        ),
    ),
    Cause(
        "llama.cpp's |safe does nothing, in transformers what is added to a safe text is escaped "
        "(value_string_t::get_builtins in common/jinja/value.cpp)",
        lambda template, expected, found: (
            bool(re.search(r"\|\s*safe\b", template)) and _unescaped(expected) == _unescaped(found)
        ),
    ),
    Cause(
        "llama.cpp prints a text with an apostrophe inside a list or object as JSON, Python with its own quotes "
        "(value_to_string_repr in common/jinja/value.cpp)",
        lambda _, expected, found: _unquoted(expected) == _unquoted(found) and "'" in expected,
    ),
    Cause(
        "llama.cpp prints the elements of a list one after the other, Python prints its repr "
        "(gather_string_parts_recursive in common/jinja/runtime.h)",
        lambda _, expected, found: expected[differing_text(expected, found) :].startswith("["),
    ),
)


def cause(template: str, expected: str, found: str) -> str:
    """The known reason why llama.cpp makes ``found`` of ``template`` instead of ``expected``; an empty string without one."""
    return next((one.reason for one in CAUSES if one.explains(template, expected, found)), "")


def family(template: str) -> Family | None:
    """The family whose parser the server uses for ``template``; None for its general one (chat-auto-parser)."""
    return next((one for one in FAMILIES if one.has(template)), None)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _unescaped(text: str) -> str:
    import html

    return html.unescape(text)


def _unquoted(text: str) -> str:
    """The text without quotes and backslashes, which is all that Python's and JSON's way to write a text differ in."""
    return re.sub(r"""["'\\]""", "", text)
