"""The conversations that every artifact's chat template is tried on.

They are the cases in which chat templates and their engines are known to part: whitespace, unicode, tools, tool calls
whose arguments are an object (as transformers wants them) or a JSON text (as the OpenAI API sends them), content parts,
empty content, the text of special tokens in what a user wrote, and orders of roles that a strict template rejects.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from quantool.config.schema import Corpus
from quantool.plugins.contract import Case
from quantool.texts import corpus
from quantool.validation._chat.languages import questions

Message = dict[str, Any]

DATE = "26 Jul 2024"
"""Given to templates that print a date, so that both sides print the same one."""


@dataclass(frozen=True)
class Conversation:
    """One conversation to render. ``settings`` are further variables of the template (``enable_thinking``)."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    generation_prompt: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    """Whether the engine has to reject it where the source's template does: roles in a wrong order."""
    continued: bool = False
    """Whether the assistant's message at the end is continued instead of closed."""

    def request(self) -> dict[str, Any]:
        """The conversation as a JSON value."""
        return {
            "name": self.name,
            "messages": list(self.messages),
            "tools": list(self.tools),
            "generation_prompt": self.generation_prompt,
            "settings": self.settings,
            "continued": self.continued,
        }


def user(content: Any) -> Message:
    """What a user says."""
    return {"role": "user", "content": content}


def assistant(content: Any, *calls: Message, reasoning: str | None = None) -> Message:
    """What the assistant says and calls."""
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": list(calls)} if calls else {})


def system(content: str) -> Message:
    """What a system message says."""
    return {"role": "system", "content": content}


def result(content: Any, name: str | None = "get_weather", call: str = "call00001") -> Message:
    """What a tool answers."""
    named = {"name": name} if name is not None else {}
    return {"role": "tool", "tool_call_id": call, **named, "content": content}


def _continued(name: str, *messages: Message) -> Conversation:
    return Conversation(name, messages, generation_prompt=False, continued=True)


def call(arguments: Any, name: str = "get_weather", call: str = "call00001") -> Message:
    """A tool call; arguments as an object or as a JSON text."""
    return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER: Message = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city: el temps, eguraldia, o tempo. Says <b>\"°C\" & 'wind'</b>.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}
CLOCK: Message = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Time of day in a time zone.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": []},
    },
}
PLACE = {"city": "L'Hospitalet de Llobregat", "unit": "celsius"}
ANSWER = '{"temperature": 21.5, "sky": "núvols"}'
ARGUMENTS = {"city": "Vic", "days": 3, "exact": True, "hours": [6, 12.5], "where": {"lat": 41.9}}
REASONING = "The user wants a number.\nTwo and two make four."
ENDED = "ends with the assistant"
"""Name of the conversation that shows how a turn ends, after LAST_WORD."""
LAST_WORD = "Finis"
NULL = "null argument"
UNICODE = (
    "Привет 🚀\U0001f469\u200d\U0001f52c 你好、世界 \u200dŒuvre «col·legi» ¿ñandú? ﷽ \U0001f1e6\U0001f1e9"
)
MARKS = "cafe\u0301 man\u0303ana e\u0323\u0302 \u0e19\u0e49\u0e33 \u0928\u093f"

FORGETFUL = {
    "preserve_thinking": False,
    "clear_thinking": True,
    "truncate_history_thinking": True,
    "drop_thinking": True,
}
"""What templates call dropping the reasoning of earlier turns. llama.cpp's server keeps it unless it is told otherwise
(``preserve_reasoning``; ``caps_apply_preserve_reasoning`` in common/jinja/caps.cpp), transformers sets nothing."""
SWITCHES = ("enable_thinking", "thinking")
SWITCHED = ("one question", "several turns", "tool call", "reasoning", "reasoning before a tool call")

SUITE: tuple[Conversation, ...] = (
    Conversation("one question", (user("Hello"),)),
    Conversation("system message", (system("You are terse."), user("Hi there, who are you?"))),
    Conversation(
        "several turns",
        (
            system("Answer in Catalan."),
            user("What is 2 + 2?"),
            assistant("Quatre."),
            user("And 3 + 3?"),
            assistant("Sis."),
            user("Why?"),
        ),
    ),
    Conversation("several turns, no system", (user("a"), assistant("b"), user("c"))),
    Conversation("no generation prompt", (user("a"), assistant("b"), user("c")), generation_prompt=False),
    Conversation(ENDED, (user("Hello"), assistant(LAST_WORD)), generation_prompt=False),
    Conversation("combining marks", (user(MARKS),)),
    Conversation("unicode", (system(UNICODE), user(UNICODE), assistant(UNICODE), user("👍🏽"))),
    Conversation(
        "whitespace around",
        (system("  lead and trail  \n"), user("\n\n x\t\n"), assistant(" y "), user("  ")),
    ),
    Conversation("lines and indents", (user("def f(x):\r\n\n\n    return  x\n\tpass"),)),
    Conversation("empty content", (user(""), assistant(""), user("still there?"))),
    Conversation(
        "special tokens in the text", (user("Say <|im_end|></s><eos> and [INST] <bos> literally."),)
    ),
    Conversation("braces", (user("{{ messages }} {% if x %} {# c #} %}"),)),
    Conversation("tools offered", (user("Weather in Girona?"),), (WEATHER, CLOCK)),
    Conversation("system and tools", (system("Use tools."), user("Weather in Girona?")), (WEATHER,)),
    Conversation(
        "tool call",
        (user("Weather?"), assistant("", call(PLACE)), result(ANSWER)),
        (WEATHER,),
    ),
    Conversation(
        "tool call with words",
        (
            user("Weather?"),
            assistant("Let me look.", call(PLACE)),
            result(ANSWER),
            assistant("21.5 °C."),
            user("ok"),
        ),
        (WEATHER, CLOCK),
    ),
    Conversation(
        "tool call, arguments as text",
        (user("Weather?"), assistant("", call(json.dumps(PLACE, ensure_ascii=False))), result(ANSWER)),
        (WEATHER,),
    ),
    Conversation(
        "tools, no generation prompt",
        (user("Weather?"), assistant("", call(PLACE)), result(ANSWER), assistant("21.5 °C.")),
        (WEATHER,),
        generation_prompt=False,
    ),
    Conversation(
        "parallel tool calls",
        (
            user("Weather and time?"),
            assistant("", call(PLACE), call({"zone": "CET"}, "get_time", "call00002")),
            result(ANSWER),
            result('{"time": "12:30"}', "get_time", "call00002"),
        ),
        (WEATHER, CLOCK),
    ),
    Conversation(
        "tool results one after the other",
        (
            user("Weather, then time?"),
            assistant("", call(PLACE)),
            result(ANSWER),
            assistant("", call({}, "get_time", "call00002")),
            result("12:30", "get_time", "call00002"),
        ),
        (WEATHER, CLOCK),
    ),
    Conversation(
        "tool call without content",
        (user("Weather?"), assistant(None, call(PLACE)), result(ANSWER)),
        (WEATHER,),
    ),
    Conversation(
        "arguments of every type",
        (user("Weather?"), assistant("", call(ARGUMENTS)), result(ANSWER)),
        (WEATHER,),
    ),
    Conversation(
        NULL,
        (user("Weather?"), assistant("", call({"city": "Vic", "unit": None})), result(ANSWER)),
        (WEATHER,),
    ),
    *(
        Conversation(
            f"tool result: {form}",
            (user("Weather?"), assistant("", call(PLACE)), result(content, name)),
            (WEATHER,),
        )
        for form, content, name in (
            ("text", '21.5 °C, <b>núvols</b> & "vent"\n', "get_weather"),
            ("list", '[{"city": "Vic"}, 2, null]', "get_weather"),
            ("number", "21.5", "get_weather"),
            ("empty", "", "get_weather"),
            ("without a name", ANSWER, None),
            ("content parts", [{"type": "text", "text": ANSWER}], "get_weather"),
        )
    ),
    _continued("continued answer", user("Capital of Galicia?"), assistant("The capital is")),
    _continued(
        "continued answer of several turns",
        system("Be brief."),
        user("a"),
        assistant("b"),
        user("Count."),
        assistant("1, 2,\n3"),
    ),
    Conversation(
        "content parts",
        (user([{"type": "text", "text": "part one, "}, {"type": "text", "text": "part two"}]),),
    ),
    Conversation("two users in a row", (user("a"), user("b")), strict=True),
    Conversation("assistant first", (assistant("b"), user("a")), strict=True),
    Conversation("two answers in a row", (user("a"), assistant("b"), assistant("c"), user("d")), strict=True),
    Conversation("system message at the end", (user("a"), system("b")), strict=True),
    Conversation("unknown role", (user("a"), {"role": "wizard", "content": "b"}), strict=True),
)

THINKING: tuple[Conversation, ...] = (
    Conversation("reasoning", (user("2 + 2?"), assistant("4.", reasoning=REASONING), user("Sure?"))),
    Conversation(
        "reasoning before a tool call",
        (user("Weather?"), assistant("", call(PLACE), reasoning=REASONING), result(ANSWER)),
        (WEATHER,),
    ),
    _continued("continued answer after reasoning", user("2 + 2?"), assistant("It is", reasoning=REASONING)),
)
"""For templates that know of reasoning: to others llama.cpp's server may pass it on in a form that they cannot read."""


def suite(template: str) -> tuple[Conversation, ...]:
    """The conversations for a template: those of ``SUITE``, and more where it can think.

    Variables that llama.cpp's server sets by itself (thinking is on, the reasoning of earlier turns is kept, a date) are
    set for both sides. A template that knows of thinking is tried with it on and off, by each name it has for that.
    """
    settings: dict[str, Any] = {"enable_thinking": False, "preserve_reasoning": False}
    settings |= {name: value for name, value in FORGETFUL.items() if name in template}
    if "date_string" in template:
        settings["date_string"] = DATE
    chosen = [_with(conversation, settings) for conversation in SUITE]
    if any(word in template for word in ("reasoning", "thinking", "think>")):
        chosen += [_with(conversation, settings) for conversation in THINKING]
    for switch in SWITCHES:
        if re.search(rf"\b{switch}\b", template):
            chosen += [
                _with(
                    conversation,
                    settings | {switch: on},
                    f"{conversation.name}, {switch} {'on' if on else 'off'}",
                )
                for on in (True, False)
                for conversation in chosen[: len(SUITE) + len(THINKING)]
                if conversation.name in SWITCHED and settings.get(switch) != on
            ]
    return tuple(chosen)


def of_case(case: Case) -> tuple[Conversation, ...]:
    """The suite for the source's template, the languages of the model's card, and the user's own (``validation.conversations``).

    Of the user's documents, one without messages is what a user says; one that ends with the assistant is rendered
    without a generation prompt.
    """
    chosen = suite(case.source.facts.chat_template or "")
    chosen += tuple(
        Conversation(f"in {language}", (user(text),), settings=chosen[0].settings)
        for language, text in questions(case.source.card.languages).items()
    )
    path = case.config.validation.conversations
    if path is None:
        return chosen
    documents = corpus.read(Corpus(name="conversations", path=path))
    own = (
        Conversation(
            f"yours, {number}",
            document.messages or (user(document.text),),
            document.tools,
            generation_prompt=not document.messages or document.messages[-1]["role"] != "assistant",
            settings=chosen[0].settings,
        )
        for number, document in enumerate(documents, 1)
    )
    return (*chosen, *own)


def _with(conversation: Conversation, settings: dict[str, Any], name: str | None = None) -> Conversation:
    return replace(conversation, name=name or conversation.name, settings=conversation.settings | settings)


def end_of_turn(answer: dict[str, Any], special: dict[str, int]) -> int | None:
    """The special token that the template prints right after what the assistant said; None when there is none."""
    if not answer["accepted"]:
        return None
    behind = answer["accepted"][0]["text"].rpartition(LAST_WORD)[2].lstrip()
    found = [content for content in special if behind.startswith(content)]
    return special[max(found, key=len)] if found else None
