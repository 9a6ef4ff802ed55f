"""What is made of two renderings of a chat, without any engine."""

from __future__ import annotations

from typing import Any

from quantool.records import Verdict
from quantool.validation._chat.agreement import (
    judge_bos,
    judge_caps,
    judge_continued,
    judge_python,
    judge_text,
)
from quantool.validation._chat.causes import cause
from quantool.validation._chat.conversations import Conversation
from quantool.validation._chat.renderings import Renderings
from quantool.validation._engines import hf_tokenizer

QUESTION = {"role": "user", "content": "2 + 2?"}


def rendered(text: str, *ids: int) -> dict[str, Any]:
    return {"text": text, "ids": list(ids), "nfc_ids": list(ids)}


def expected(*texts: str, given: str = "") -> dict[str, Any]:
    return {"accepted": [rendered(text) for text in texts], "error": "" if texts else given, "given": given}


def both(conversation: Conversation, right: dict[str, Any], found: dict[str, Any], **more: Any) -> Renderings:
    facts = {"bos_text": "<s>", "nfc": False, "prepend_scheme": None}
    return Renderings((conversation,), {"facts": facts, "answers": [right]}, (found,), **more)


def test_an_answer_that_is_closed_is_no_continuation() -> None:
    said = {"role": "assistant", "content": "It is"}
    begun = Conversation("begun", (QUESTION, said), generation_prompt=False, continued=True)
    for text, template, verdict in (
        ("<a>It is", "T", Verdict.PASS),
        ("<a><think></think>It is", "T", Verdict.SKIPPED),
        ("<a><think></think>It is", "other", Verdict.REGRESSION),
        ("<a>It is</a>", "T", Verdict.REGRESSION),
    ):
        pair = both(begun, expected("<a>It is"), rendered(text), native=True)
        assert judge_continued(pair, "T", template).verdict == verdict, text
    foreign = both(begun, expected("<a>It is"), rendered("<a><think></think>It is"))
    assert judge_continued(foreign, "T", "T").verdict == Verdict.REGRESSION
    refused = both(begun, expected("<a>It is"), {"error": "no"}, native=True)
    assert judge_continued(refused, "T", "T").verdict == Verdict.REGRESSION
    assert judge_text(foreign, "rendered_text").verdict == Verdict.SKIPPED


def test_a_format_of_llama_cpp_pythons_own_is_excused_for_the_sources_template_only() -> None:
    asked = Conversation("asked", (QUESTION,))
    for name, stored, verdict in (
        ("", "T", Verdict.REGRESSION),
        ("chatml", "other", Verdict.REGRESSION),
        ("llama-2", None, Verdict.REGRESSION),
        ("chatml", "T", Verdict.SKIPPED),
    ):
        pair = both(asked, expected("right"), rendered("wrong"))
        found = judge_python(pair, {"format": name}, "T", stored)
        assert found.verdict == verdict
        assert f"{name!r}" in found.detail or not name


def test_llama_cpp_python_has_to_fail_where_the_source_refuses_the_messages_as_given() -> None:
    asked = Conversation("asked", (QUESTION,), strict=True)
    refused = expected("text of another reading", given="TemplateError: arguments must be an object")
    found = judge_python(both(asked, refused, {"error": "ValueError"}), {"format": ""}, "T", "T")
    assert found.verdict == Verdict.PASS
    found = judge_python(both(asked, refused, rendered("anything")), {"format": ""}, "T", "T")
    assert found.verdict == Verdict.REGRESSION


def test_capabilities_that_the_server_denies_fail() -> None:
    messages = ({"role": "system", "content": "You are terse."}, QUESTION)
    pair = both(
        Conversation("system message", messages), expected("<s>You are terse.</s>2 + 2?"), rendered("")
    )
    for says, verdict in ((True, Verdict.PASS), (False, Verdict.REGRESSION)):
        server = {"caps": {"supports_system_role": says, "supports_tools": True}, "template": "T"}
        found = judge_caps(pair, server, tools=True, stored="T\n")
        assert (found.verdict, found.reference) == (verdict, "1 of 1")
        assert "changed the template" not in found.detail
    patched = judge_caps(pair, server | {"template": "another"}, tools=True, stored="T")
    assert "it changed the template" in patched.detail
    silent = judge_caps(pair, {"caps": {}, "template": None}, tools=True, stored="T")
    assert silent.verdict == Verdict.SKIPPED


def test_two_bos_fail_even_where_the_reference_has_two() -> None:
    asked = Conversation("asked", (QUESTION,))
    right = {"accepted": [rendered("<s><s>x", 1, 1, 5)], "error": "", "given": ""}
    found = judge_bos(both(asked, right, rendered("<s><s>x", 1, 1, 5)), 1, "bos_count")
    assert (found.verdict, found.measured) == (Verdict.REGRESSION, 2)


def test_null_printed_as_none_is_no_reference_for_llama_cpp() -> None:
    function = {"name": "f", "arguments": {"x": None}}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    asked = Conversation("null argument", (QUESTION, calls))
    pair = both(asked, expected("f(x=None)"), rendered("f(x=)"), native=True)
    assert judge_text(pair, "rendered_text").verdict == Verdict.SKIPPED
    assert "Python's None" in judge_text(pair, "rendered_text").detail
    python = both(asked, expected("f(x=None)"), rendered("f(x=)"))
    assert judge_text(python, "rendered_text").verdict == Verdict.REGRESSION


def test_a_cause_is_named_only_for_what_it_explains() -> None:
    stepfun = "You have access to the following functions in JSONSchema format"
    assert "trim_all_content" in cause(stepfun, "a \nb", "a\nb")
    assert not cause(stepfun, "a \nb", "a\nc")
    assert not cause("T", "a \nb", "a\nb")
    assert "value_to_string_repr" in cause("T", "{'x': 'it\\'s'}", "{'x': \"it's\"}")
    assert "builtins" in cause("{{ x | safe }}", "&lt;b&gt;", "<b>")
    assert not cause("{{ x }}", "&lt;b&gt;", "<b>")
    stepfun = f"{stepfun} {{{{ messages }}}}"
    assert "trim_all_content" in judge_detail(stepfun, "a \nb", "a\nb")
    assert " - " not in judge_detail("T", "right", "wrong")


def judge_detail(template: str, right: str, wrong: str) -> str:
    pair = both(Conversation("asked", (QUESTION,)), expected(right), rendered(wrong), native=True)
    return judge_text(pair, "rendered_text", template).detail


def test_readings_are_the_forms_in_which_the_server_hands_messages_on() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    readings = hf_tokenizer._readings([QUESTION, call])
    assert readings[0] == [QUESTION, call]
    seen = [(one[1]["content"], one[1]["tool_calls"][0]["function"]["arguments"]) for one in readings]
    assert seen == [(None, '{"x": 1}'), (None, {"x": 1}), ("", '{"x": 1}'), ("", {"x": 1})]
    thought = {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    given, named, parts, *_ = hf_tokenizer._readings([thought])
    assert given == [thought]
    assert named == [thought | {"thinking": "hm"}]
    assert parts[0]["content"][0] == {"type": "thinking", "thinking": "hm"}
    assert hf_tokenizer._readings([QUESTION]) == [[QUESTION]]
