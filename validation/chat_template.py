"""Whether a chat comes out the same: template text, rendered text, and token ids.

The reference is the source's tokenizer through ``apply_chat_template``; the other side is what users run: llama.cpp's own
Jinja engine for a GGUF (``_server``), the saved tokenizer for an artifact that transformers loads. The text of the
template is compared byte for byte beside it, so an engine that fell back on another template is found by content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantool.progress import Progress
from quantool.records import Finding, Verdict
from quantool.registry import Case, check
from quantool.validation._conversations import Conversation, of_case
from quantool.validation._server import render
from quantool.validation._vocabulary import (
    UnloadableError,
    Vocabulary,
    by_artifact,
    by_source,
    differing,
    explain,
    of_gguf,
    unloadable,
)

NAME = "chat_template"
SURROUNDINGS = 30  # characters shown on each side of a difference
RAISED = "TemplateError: "  # what raise_exception of a template becomes: a rejection that the template's author wrote
NFC = "the source's tokenizer normalizes text to NFC, llama.cpp cannot; the ids agree once the text is normalized"
MALFORMED = "TemplateSyntaxError: "
SPACE_PREFIX = (
    "; llama.cpp puts a space before the text after every special token, the source's tokenizer (legacy: false) does "
    "not: make the file with quantization_config.add_space_prefix: false"
)


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

        llama.cpp's server has its own way with some of them (gpt-oss, Solar) and never makes an answer from one.
        """
        if conversation.generation_prompt:
            self.count(False, explanation)
        else:
            self.notes.append(f"differs, without a generation prompt: {explanation}")

    def finding(self, metric: str, cause: str = "") -> Finding:
        """The finding of all that was counted."""
        if not self.total:
            detail = "; ".join(self.notes) or "nothing to compare"
            return Finding(check=NAME, metric=metric, verdict=Verdict.SKIPPED, detail=detail)
        passed = self.equal == self.total
        first = "" if passed else self.first + cause
        return Finding(
            check=NAME,
            metric=metric,
            verdict=Verdict.PASS if passed else Verdict.REGRESSION,
            measured=f"{self.equal} of {self.total}",
            reference=f"{self.total} of {self.total}",
            detail="; ".join(filter(None, (first, *self.notes))),
        )


@dataclass(frozen=True)
class Renderings:
    """Each conversation as the source's tokenizer (``_hf.render``) and as the artifact's engine render it."""

    conversations: Sequence[Conversation]
    reference: dict[str, Any]
    found: Sequence[dict[str, Any]]
    typed_content: bool = True
    """Whether the engine hands lists of content parts to this template as they are."""

    def excuse(self, conversation: Conversation, expected: dict[str, Any]) -> str:
        """Why a conversation says nothing about the artifact, or an empty string."""
        listed = any(isinstance(message.get("content"), list) for message in conversation.messages)
        if listed and not self.typed_content:
            return "llama.cpp joins content parts to a text for this template"
        return _without_reference(conversation, expected)

    def __iter__(self) -> Iterator[tuple[Conversation, dict[str, Any], dict[str, Any]]]:
        return iter(zip(self.conversations, self.reference["answers"], self.found, strict=True))


@check(NAME)
def judge(case: Case, progress: Progress, /) -> Sequence[Finding]:
    """Chats rendered by the artifact's engine and by the source's tokenizer: template, text and token ids."""
    del progress  # a second or two
    template = case.source.facts.chat_template
    try:
        vocabulary = of_gguf(case)[0] if case.engine == "llama.cpp" else None
    except UnloadableError as error:
        return unloadable(NAME, error)
    if template is None:
        return [_judge_absence(case, vocabulary)]
    conversations = of_case(case)
    asked = {"conversations": [conversation.request() for conversation in conversations]}
    reference = by_source(case, "chats", "_hf:render", asked)
    if vocabulary is None:
        answered = by_artifact(case, "_hf:render", asked)
        stored = answered["facts"]["template"]
    else:
        stored = vocabulary.template
        try:
            answered = render(case, conversations)
        except UnloadableError as error:
            reason = f"llama.cpp's engine cannot use the artifact's template: {error}"
            return [_judge_template(template, stored), _failed(reason)]
    found = [_first(one) for one in answered["answers"]]
    both = Renderings(
        conversations, reference, found, answered.get("caps", {}).get("supports_typed_content", True)
    )
    if all(one["error"].startswith(MALFORMED) for one in reference["answers"]):
        reason = reference["answers"][0]["error"]
        return [
            _judge_template(template, stored),
            _failed(f"the source's own template is malformed: {reason}"),
        ]
    return [
        _judge_template(template, stored),
        _judge_text(both, str(answered.get("engine", "transformers"))),
        _judge_ids(both, vocabulary),
        _judge_bos(both, reference["facts"]["bos"] if vocabulary is None else vocabulary.bos),
    ]


def _first(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of either engine as ``text`` and ``ids``, or ``error``."""
    if "accepted" not in answer:
        return answer
    accepted: list[dict[str, Any]] = answer["accepted"]
    return accepted[0] if accepted else {"error": answer["error"]}


def _judge_absence(case: Case, vocabulary: Vocabulary | None) -> Finding:
    """A model without a template is skipped, unless its artifact brings one."""
    stored = vocabulary.template if vocabulary is not None else None
    if stored is None:
        detail = "the source has no chat template"
        return Finding(check=NAME, metric="template_text", verdict=Verdict.SKIPPED, detail=detail)
    detail = f"{case.name} holds a chat template that the source does not have: {stored[:80]!r}"
    return Finding(check=NAME, metric="template_text", verdict=Verdict.REGRESSION, detail=detail)


def _judge_template(template: str, stored: str | None) -> Finding:
    """The stored template is the source's, byte for byte."""
    if stored == template:
        return Finding(
            check=NAME,
            metric="template_text",
            verdict=Verdict.PASS,
            measured=len(stored.encode()),
            reference=len(template.encode()),
            detail="bytes, all equal",
        )
    detail = "the artifact has no chat template" if stored is None else _explain_text(template, stored)
    return Finding(
        check=NAME,
        metric="template_text",
        verdict=Verdict.REGRESSION,
        measured=0 if stored is None else len(stored.encode()),
        reference=len(template.encode()),
        detail=detail,
    )


def _failed(reason: str) -> Finding:
    return Finding(check=NAME, metric="rendered_text", verdict=Verdict.REGRESSION, detail=reason)


def _judge_text(both: Renderings, engine: str) -> Finding:
    """Rendered texts are equal, and what the template rejects is rejected by both."""
    tally = Tally(notes=[f"rendered by {engine}"])
    bos = both.reference["facts"]["bos_text"]
    for conversation, expected, found in both:
        name = repr(conversation.name)
        excuse = both.excuse(conversation, expected)
        if excuse:
            tally.notes.append(f"{name} not compared: {excuse}")
        elif not expected["accepted"]:
            explanation = f"{name}: rejected by the source ({expected['error']}), accepted here"
            if conversation.strict or "error" in found:
                tally.count("error" in found, explanation)
            else:  # llama.cpp makes up for some roles and contents that a template does not know
                tally.notes.append(explanation)
        elif "error" in found:
            tally.count(False, f"{name}: rejected here: {found['error']}")
        else:
            texts = [accepted["text"] for accepted in expected["accepted"]]
            texts += _without_bos(texts, bos)
            closest = max(texts, key=lambda text: _differing_text(text, found["text"]))
            if found["text"] == closest:
                tally.count(True, "")
            else:
                tally.differ(conversation, f"{name}: {_explain_text(closest, found['text'])}")
    return tally.finding("rendered_text")


def _without_reference(conversation: Conversation, expected: dict[str, Any]) -> str:
    """Why the source's rendering says nothing about a conversation, or an empty string."""
    if expected["error"]:
        accident = not expected["error"].startswith(RAISED)
        return f"transformers fails on it ({expected['error']})" if accident else ""
    contents = [message.get("content") for message in conversation.messages]
    parts = [
        part["text"]
        for content in contents
        if isinstance(content, list)
        for part in content
        if "text" in part
    ]
    text = expected["accepted"][0]["text"]
    if parts and "'type': 'text'" in text:
        return "this template prints content parts as Python code"
    return "this template drops content parts" if any(part.strip() not in text for part in parts) else ""


def _without_bos(texts: Sequence[str], bos: str | None) -> list[str]:
    """The texts as llama.cpp's server gives them when the tokenizer adds BOS: a leading one is taken off."""
    return [text.removeprefix(bos) for text in texts if bos and text.startswith(bos)]


def _judge_ids(both: Renderings, vocabulary: Vocabulary | None) -> Finding:
    """Token ids of the rendered chats are equal."""
    tally = Tally()
    facts = both.reference["facts"]
    pieces = vocabulary.pieces if vocabulary is not None else ()
    for conversation, expected, found in both:
        if not expected["accepted"] or both.excuse(conversation, expected):
            continue
        ids = [accepted["ids"] for accepted in expected["accepted"]]
        name = repr(conversation.name)
        if "error" in found:
            tally.count(False, f"{name}: rejected here: {found['error']}")
        elif found["ids"] in ids:
            tally.count(True, "")
        elif facts["nfc"] and found.get("nfc_ids") in ids:
            tally.notes.append(f"{name} not compared: {NFC}")
        else:
            closest = max(ids, key=lambda one: differing(one, found["ids"]) or 0)
            tally.differ(conversation, f"{name} {explain(closest, found['ids'], pieces)}")
    prefixed = vocabulary is not None and vocabulary.space_prefix and facts["prepend_scheme"] == "first"
    return tally.finding("rendered_ids", SPACE_PREFIX if prefixed else "")


def _judge_bos(both: Renderings, bos: int | None) -> Finding:
    """As many BOS tokens before a chat as the source's tokenizer gives, and never two."""
    counts = [
        (conversation.name, _leading(expected["accepted"][0]["ids"], bos), _leading(found["ids"], bos))
        for conversation, expected, found in both
        if expected["accepted"] and "error" not in found
    ]
    if bos is None or not counts:
        detail = "there is no BOS token" if bos is None else "no conversation was rendered by both"
        return Finding(check=NAME, metric="bos_count", verdict=Verdict.SKIPPED, detail=detail)
    name, expected_count, count = next((one for one in counts if one[1] != one[2] or one[2] > 1), counts[0])
    passed = expected_count == count <= 1
    return Finding(
        check=NAME,
        metric="bos_count",
        verdict=Verdict.PASS if passed else Verdict.REGRESSION,
        measured=count,
        reference=expected_count,
        detail="BOS tokens before a chat" if passed else f"BOS tokens before the chat {name!r}",
    )


def _leading(ids: Sequence[int], token: int | None) -> int:
    count = 0
    while count < len(ids) and ids[count] == token:
        count += 1
    return count


def _differing_text(one: str, other: str) -> int:
    """Index of the first difference of two texts; the length of the longer one + 1 when they are equal."""
    if one == other:
        return len(one) + 1
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def _explain_text(expected: str, found: str) -> str:
    """The first difference of two texts with its surroundings."""
    index = _differing_text(expected, found)
    cut = slice(max(0, index - SURROUNDINGS), index + SURROUNDINGS)
    return f"at character {index}: expected {expected[cut]!r}, found {found[cut]!r}"
