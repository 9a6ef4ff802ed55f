"""Findings on chats that two engines rendered: their text, their ids, their BOS, and how an answer is continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quantool.records import Finding, Verdict
from quantool.validation._chat.causes import cause
from quantool.validation._chat.conversations import Conversation
from quantool.validation._chat.renderings import BUILD, Renderings, Tally, closest, explain_text
from quantool.validation._engines.vocabulary import Vocabulary, differing, explain

NFC = "the source's tokenizer normalizes text to NFC, llama.cpp cannot; the ids agree once the text is normalized"
SPACE_PREFIX = (
    "; llama.cpp puts a space before the text after every special token, the source's tokenizer (legacy: false) does "
    "not: make the file with quantization_config.add_space_prefix: false"
)
CONTINUED = (
    "the template is the source's; llama.cpp's server does not cut an answer out of what it renders, but adds to the "
    "chat before it the generation prompt, the template's marks of reasoning and what was said so far"
)

SHOWN = {
    "supports_system_role": ("system message", ("You are terse.",)),
    "supports_tools": ("tools offered", ("get_weather", "Current weather")),
    "supports_tool_calls": ("tool call", ("Hospitalet",)),
    "supports_parallel_tool_calls": ("parallel tool calls", ("Hospitalet", "CET")),
}
"""Capabilities that the server reports (common/jinja/caps.cpp), a conversation that needs them and what it then shows."""


def judge_text(both: Renderings, metric: str, template: str = "") -> Finding:
    """Rendered texts are equal, and what the template rejects is rejected by both.

    ``template`` is the file's, for naming what is known of llama.cpp's ways with it.
    """
    tally = Tally(notes=[f"rendered by {both.engine}"])
    for conversation, expected, found in both:
        if conversation.continued:
            continue
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
            right = closest(both.texts(expected), found["text"])
            if found["text"] == right:
                tally.count(True, "")
            else:
                tally.differ(conversation, _explain(both, conversation, right, found["text"], template))
    return tally.finding(metric)


def _explain(both: Renderings, conversation: Conversation, right: str, found: str, template: str) -> str:
    reasons = [f"{conversation.name!r}: {explain_text(right, found)}"]
    if both.native and (known := cause(template, right, found)):
        reasons.append(known)
    return " - ".join(reasons)


def judge_ids(both: Renderings, vocabulary: Vocabulary | None) -> Finding:
    """Token ids of the rendered chats are equal."""
    tally = Tally()
    facts = both.reference["facts"]
    pieces = vocabulary.pieces if vocabulary is not None else ()
    for conversation, expected, found in both:
        if conversation.continued or not expected["accepted"] or both.excuse(conversation, expected):
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
            right = max(ids, key=lambda accepted: differing(accepted, found["ids"]) or 0)
            tally.differ(conversation, f"{name} {explain(right, found['ids'], pieces)}")
    prefixed = vocabulary is not None and vocabulary.space_prefix and facts["prepend_scheme"] == "first"
    return tally.finding("rendered_ids", SPACE_PREFIX if prefixed else "")


def judge_continued(both: Renderings, template: str | None, stored: str | None) -> Finding:
    """What an assistant has begun to say is continued from the same text.

    Where llama.cpp has the source's template and ends with what was said, another text before it is its own way
    (SKIPPED); an engine that closes the message instead, or with another template, fails.
    """
    tally, own = Tally(), both.native and template == stored
    for conversation, expected, found in both:
        if not conversation.continued or both.excuse(conversation, expected) or not expected["accepted"]:
            continue
        name = repr(conversation.name)
        if "error" in found:
            tally.count(False, f"{name}: rejected here: {found['error']}")
            own = False
            continue
        right = closest(both.texts(expected), found["text"])
        tally.count(found["text"] == right, f"{name}: {explain_text(right, found['text'])}")
        own = own and found["text"].endswith(conversation.messages[-1]["content"])
    return tally.finding("rendered_continuation", excuse=CONTINUED if own else "")


def judge_caps(both: Renderings, server: dict[str, Any], *, tools: bool, stored: str | None) -> Finding:
    """What llama.cpp's server takes the template for able to do (``chat_template_caps``) is what it does.

    Where it thinks a template cannot do something it makes up for that, so a wrong guess changes prompts: a system
    message moves into the first question, tools are described in llama.cpp's words. What the template does is seen in the
    reference's renderings. ``server`` is its answer; ``tools``: whether this template is the one used for tools.
    """
    caps = server["caps"]
    expected = {name: _shows(both, name) for name in SHOWN if tools or name == "supports_system_role"}
    known = {name: shows for name, shows in expected.items() if shows is not None and name in caps}
    problems = [
        f"{name}: the source's template {'does' if shows else 'does not'}, llama.cpp says it "
        f"{'does' if caps[name] else 'does not'}"
        for name, shows in known.items()
        if shows != caps[name]
    ]
    notes = []
    used = server["template"]
    if stored and used and used.rstrip("\n") != stored.rstrip("\n"):
        notes.append(f"it changed the template: {explain_text(stored, server['template'])}")
    if not known:
        return BUILD.skip("template_caps", "; ".join(notes) or "the server names no capabilities")
    count = len(known)
    measured = f"{count - len(problems)} of {count}"
    return BUILD.fact(
        "template_caps", measured, "; ".join(problems), f"{count} of {count}", note="; ".join(notes)
    )


def _shows(both: Renderings, capability: str) -> bool | None:
    """Whether the reference's rendering of a conversation has what the capability is about; None without a rendering."""
    name, words = SHOWN[capability]
    for conversation, expected in zip(both.conversations, both.reference["answers"], strict=True):
        if conversation.name == name and expected["accepted"]:
            return all(word in expected["accepted"][0]["text"] for word in words)
    return None


def judge_python(
    both: Renderings, answered: dict[str, Any], template: str | None, stored: str | None
) -> Finding:
    """llama-cpp-python renders as the source does, with the messages as they are given.

    It always asks for an answer, so conversations without that are left out. Where it has the source's template and
    still takes a format of its own, the file cannot help it: SKIPPED, and said.
    """
    chosen = [
        (conversation, _as_given(expected), found)
        for conversation, expected, found in both
        if conversation.generation_prompt
    ]
    conversations, expected, found = zip(*chosen, strict=True)
    given = replace(
        both, conversations=conversations, reference=both.reference | {"answers": expected}, found=found
    )
    finding = judge_text(given, "rendered_text_python")
    if not answered["format"]:
        return finding
    reason = f"it takes its own format {answered['format']!r} in the place of the file's template"
    own = finding.verdict == Verdict.REGRESSION and template is not None and template == stored
    verdict = Verdict.SKIPPED if own else finding.verdict
    return finding.model_copy(update={"verdict": verdict, "detail": f"{reason}; {finding.detail}"})


def _as_given(expected: dict[str, Any]) -> dict[str, Any]:
    """What the source makes of the messages as they are, without other readings."""
    error = expected["given"]
    return {"accepted": [] if error else expected["accepted"][:1], "error": error}


def judge_bos(both: Renderings, bos: int | None, metric: str) -> Finding:
    """As many BOS tokens before a chat as the source's tokenizer gives, and never two."""
    counts = [
        (conversation.name, _leading(expected["accepted"][0]["ids"], bos), _leading(found["ids"], bos))
        for conversation, expected, found in both
        if expected["accepted"] and "error" not in found
    ]
    if bos is None or not counts:
        none = "no conversation was rendered by both"
        return BUILD.skip(metric, "there is no BOS token" if bos is None else none)
    name, expected_count, count = next((row for row in counts if row[1] != row[2] or row[2] > 1), counts[0])
    if expected_count == count <= 1:
        return BUILD.fact(metric, count, "", expected_count, note="BOS tokens before a chat")
    return BUILD.fact(metric, count, f"BOS tokens before the chat {name!r}", expected_count)


def _leading(ids: Sequence[int], token: int | None) -> int:
    count = 0
    while count < len(ids) and ids[count] == token:
        count += 1
    return count
