"""Chats rendered twice, and what to make of each pair: equal, different, or no fair comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantool.records import Finding, Verdict
from quantool.validation._chat.conversations import Conversation
from quantool.validation._engines.hf_tokenizer import RAISED
from quantool.validation._findings.builder import FindingBuilder

NAME = "chat_template"
BUILD = FindingBuilder(NAME)
SURROUNDINGS = 30  # characters shown on each side of a difference


@dataclass
class Tally:
    """How many conversations were compared, how many agree, and the first that does not."""

    total: int = 0
    equal: int = 0
    first: str = ""
    notes: list[str] = field(default_factory=list)

    def count(self, equal: bool, explanation: str) -> None:
        """Count one conversation; ``explanation`` is kept if it is the first that differs."""
        self.total += 1
        self.equal += equal
        if not equal:
            self.first = self.first or explanation

    def differ(self, conversation: Conversation, explanation: str) -> None:
        """Count a conversation that differs; one without a generation prompt is only noted.

        llama.cpp's server has its own way with some of them (``_causes``) and never makes an answer from one.
        """
        if conversation.generation_prompt:
            self.count(False, explanation)
        else:
            self.notes.append(f"differs, without a generation prompt: {explanation}")

    def finding(self, metric: str, cause: str = "", *, excuse: str = "") -> Finding:
        """The finding of all that was counted; with an ``excuse``, a difference is SKIPPED for that reason."""
        if not self.total:
            return BUILD.skip(metric, "; ".join(self.notes) or "nothing to compare")
        passed = self.equal == self.total
        problem = "" if passed else "; ".join(filter(None, (excuse, self.first + cause)))
        measured, whole = f"{self.equal} of {self.total}", f"{self.total} of {self.total}"
        found = BUILD.fact(metric, measured, problem, whole, note="; ".join(self.notes))
        return found.model_copy(update={"verdict": Verdict.SKIPPED}) if problem and excuse else found


@dataclass(frozen=True)
class Renderings:
    """Each conversation as the source's tokenizer (``hf_tokenizer.render``) and as the artifact's engine render it."""

    conversations: Sequence[Conversation]
    reference: dict[str, Any]
    found: Sequence[dict[str, Any]]
    engine: str = "transformers"
    native: bool = False
    """Whether that engine is llama.cpp's own; the others are Jinja2, as the reference is."""
    typed_content: bool = True
    """Whether the engine hands lists of content parts to this template as they are."""

    def excuse(self, conversation: Conversation, expected: dict[str, Any]) -> str:
        """Why a conversation says nothing about the artifact, or an empty string."""
        listed = any(isinstance(message.get("content"), list) for message in conversation.messages)
        if listed and not self.typed_content:
            return "llama.cpp joins content parts to a text for this template"
        return (self.native and _null_as_none(conversation, expected)) or without_reference(
            conversation, expected
        )

    def texts(self, expected: dict[str, Any]) -> list[str]:
        """All texts that are right; also without a leading BOS, which llama.cpp's server adds as a token."""
        bos = self.reference["facts"]["bos_text"]
        texts: list[str] = [accepted["text"] for accepted in expected["accepted"]]
        return texts + [text.removeprefix(bos) for text in texts if bos and text.startswith(bos)]

    def __iter__(self) -> Iterator[tuple[Conversation, dict[str, Any], dict[str, Any]]]:
        return iter(zip(self.conversations, self.reference["answers"], self.found, strict=True))


def first(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of either engine as ``text`` and ``ids``, or ``error``."""
    if "accepted" not in answer:
        return answer
    accepted: list[dict[str, Any]] = answer["accepted"]
    return accepted[0] if accepted else {"error": answer["error"]}


def without_reference(conversation: Conversation, expected: dict[str, Any]) -> str:
    """Why the source's rendering says nothing about a conversation, or an empty string."""
    if expected["error"]:
        accident = not expected["error"].startswith(RAISED)
        return f"transformers fails on it ({expected['error']})" if accident else ""
    text = expected["accepted"][0]["text"]
    contents = [message.get("content") for message in conversation.messages]
    parts = [
        part["text"]
        for content in contents
        if isinstance(content, list)
        for part in content
        if "text" in part
    ]
    if parts and "'type': 'text'" in text:
        return "this template prints content parts as Python code"
    return "this template drops content parts" if any(part.strip() not in text for part in parts) else ""


def _null_as_none(conversation: Conversation, expected: dict[str, Any]) -> str:
    """Why a conversation with a null argument says nothing about the artifact, or an empty string."""
    printed = expected["accepted"] and re.search(r"\bNone\b", expected["accepted"][0]["text"])
    if not printed or not _has_null(conversation):
        return ""
    return (
        "this template prints null as Python's None, llama.cpp as nothing "
        "(gather_string_parts_recursive in common/jinja/runtime.h)"
    )


def _has_null(conversation: Conversation) -> bool:
    """Whether an argument of a tool call is null."""
    calls = [
        call["function"] for message in conversation.messages for call in message.get("tool_calls") or ()
    ]
    return any(None in call["arguments"].values() for call in calls if isinstance(call["arguments"], dict))


def closest(texts: Sequence[str], found: str) -> str:
    """Of ``texts`` the one that agrees with ``found`` for longest."""
    return max(texts, key=lambda text: differing_text(text, found))


def differing_text(one: str, other: str) -> int:
    """Index of the first difference of two texts; the length of the longer one + 1 when they are equal."""
    if one == other:
        return max(len(one), len(other)) + 1
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def explain_text(expected: str, found: str) -> str:
    """The first difference of two texts with its surroundings."""
    index = differing_text(expected, found)
    cut = slice(max(0, index - SURROUNDINGS), index + SURROUNDINGS)
    return f"at character {index}: expected {expected[cut]!r}, found {found[cut]!r}"
