"""Why llama.cpp's server renders some templates differently from transformers although it has the same template.

Each cause was found by rendering the conversations of ``conversations`` with every template in llama.cpp's own source
tree (models/templates) and following the difference to the line; the places are those of the llama.cpp in
llama-cpp-python 0.3.36. The user of the file gets the other text all the same, so a cause explains a difference and does
not excuse it: it says that the file is not what to mend.
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
    return next((known.reason for known in CAUSES if known.explains(template, expected, found)), "")


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _unescaped(text: str) -> str:
    import html

    return html.unescape(text)


def _unquoted(text: str) -> str:
    """The text without quotes and backslashes, which is all that Python's and JSON's way to write a text differ in."""
    return re.sub(r"""["'\\]""", "", text)
