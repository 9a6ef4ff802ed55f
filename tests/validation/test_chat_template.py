"""Each fault of a chat template is found by content, through llama.cpp's own engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tampering
from tampering import altered, case, findings, gguf_of, regressions, source_of, tampered

from quantool.records import Verdict
from quantool.registry import Case, find_check
from quantool.toolchain import upstream_tool
from quantool.validation import _server, chat_template
from quantool.validation._conversations import SUITE, Conversation, of_case, suite

KEY = "tokenizer.chat_template"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def no_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the server of the xllamacpp wheel is there, as on a fresh machine."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP_PATH", raising=False)


def template(name: str) -> str:
    text = source_of(tampering.folder_of(name)).facts.chat_template
    assert text is not None
    return text


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_healthy(name: str) -> None:
    found = findings("chat_template", case(name))
    assert not regressions(found)
    assert set(found) == {"template_text", "rendered_text", "rendered_ids", "bos_count"}
    assert all(one.verdict == Verdict.PASS for one in found.values())
    assert "xllamacpp" in found["rendered_text"].detail
    assert int(str(found["rendered_text"].reference).split()[0]) >= 20


@pytest.mark.e2e
def test_llama_cpp_spaces_after_special_tokens_are_found_and_can_be_mended(tmp_path: Path) -> None:
    found = findings("chat_template", case("spm_llama"))
    assert regressions(found) == {"rendered_ids"}
    assert "add_space_prefix" in found["rendered_ids"].detail
    assert "'▁u'" in found["rendered_ids"].detail
    mended = tampered(gguf_of("spm_llama"), tmp_path / "m.gguf", {"tokenizer.ggml.add_space_prefix": False})
    found = findings("chat_template", case("spm_llama", mended))
    assert not regressions(found)
    assert found["bos_count"].measured == found["bos_count"].reference == 1


@pytest.mark.e2e
def test_swapped_template(tmp_path: Path) -> None:
    found = findings(
        "chat_template", case("qwen3", tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {KEY: CHATML}))
    )
    assert {"template_text", "rendered_text", "rendered_ids"} <= regressions(found)
    assert "'one question'" in found["rendered_text"].detail
    assert "<think>" in found["rendered_text"].detail


@pytest.mark.e2e
def test_trailing_newline(tmp_path: Path) -> None:
    longer = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {KEY: template("qwen3") + "\n"})
    found = findings("chat_template", case("qwen3", longer))
    assert regressions(found) == {"template_text"}
    assert found["template_text"].measured == len(template("qwen3").encode()) + 1


@pytest.mark.e2e
def test_template_that_llama_cpp_cannot_parse(tmp_path: Path) -> None:
    broken = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {KEY: template("qwen3") + "{% if %}"})
    found = findings("chat_template", case("qwen3", broken))
    assert regressions(found) == {"template_text", "rendered_text"}
    assert "Unexpected token" in found["rendered_text"].detail


@pytest.mark.e2e
def test_dropped_template_falls_back_to_chatml_and_is_found(tmp_path: Path) -> None:
    found = findings(
        "chat_template", case("gemma3", tampered(gguf_of("gemma3"), tmp_path / "t.gguf", drop=[KEY]))
    )
    assert {"template_text", "rendered_text", "rendered_ids"} <= regressions(found)
    assert "im_start" in found["rendered_text"].detail


@pytest.mark.e2e
def test_bos_where_the_source_has_none(tmp_path: Path) -> None:
    added = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {"tokenizer.ggml.add_bos_token": True})
    found = findings("chat_template", case("qwen3", added))
    assert regressions(found) == {"rendered_ids", "bos_count"}
    assert (found["bos_count"].measured, found["bos_count"].reference) == (1, 0)


@pytest.mark.e2e
def test_doubled_bos(tmp_path: Path) -> None:
    twice = tampered(
        gguf_of("gemma3"), tmp_path / "t.gguf", {KEY: "{{- bos_token -}}\n" + template("gemma3")}
    )
    found = findings("chat_template", case("gemma3", twice))
    assert "bos_count" in regressions(found)
    assert (found["bos_count"].measured, found["bos_count"].reference) == (2, 1)


@pytest.mark.e2e
def test_wrong_order_of_roles_must_be_rejected_by_both(tmp_path: Path) -> None:
    lax = template("gemma3").replace("{{- raise_exception('roles must alternate user/assistant') -}}", "")
    found = findings(
        "chat_template", case("gemma3", tampered(gguf_of("gemma3"), tmp_path / "t.gguf", {KEY: lax}))
    )
    assert "rendered_text" in regressions(found)
    assert "accepted here" in found["rendered_text"].detail


@pytest.mark.e2e
def test_model_without_template_is_skipped_unless_the_artifact_has_one(tmp_path: Path) -> None:
    base = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", drop=[KEY])
    found = findings("chat_template", altered(case("qwen3", base), chat_template=None))
    assert [one.verdict for one in found.values()] == [Verdict.SKIPPED]
    found = findings("chat_template", altered(case("qwen3"), chat_template=None))
    assert regressions(found) == {"template_text"}


def test_own_conversations_are_added(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    said = [{"role": "user", "content": "Kaixo"}]
    answered = [*said, {"role": "assistant", "content": "Kaixo!"}]
    lines: list[dict[str, Any]] = [{"messages": said}, {"messages": answered}, {"text": "Bon dia"}]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    added = of_case(case("gemma3", conversations=str(own)))[len(SUITE) :]
    assert [one.name for one in added] == ["yours, 1", "yours, 2", "yours, 3"]
    assert [one.generation_prompt for one in added] == [True, False, True]
    assert added[2].messages == ({"role": "user", "content": "Bon dia"},)
    assert len(of_case(case("gemma3"))) == len(SUITE)


@pytest.mark.e2e
def test_folder_for_transformers(tmp_path: Path) -> None:
    folder = tampering.tokenizer_folder("qwen3", tmp_path / "artifact")
    assert not regressions(findings("chat_template", case("qwen3", folder, output="fp8/FP8")))
    (folder / "chat_template.jinja").write_text(CHATML)
    found = findings("chat_template", case("qwen3", folder, output="fp8/FP8"))
    assert {"template_text", "rendered_text", "rendered_ids"} <= regressions(found)


@pytest.mark.e2e
@pytest.mark.upstream
def test_llama_server_says_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = upstream_tool("llama-server")
    if binary is None:
        pytest.skip("llama-server is not built")
    monkeypatch.setenv("PATH", str(binary.parent))
    found = findings("chat_template", case("qwen3"))
    assert not regressions(found)
    assert str(binary) in found["rendered_text"].detail


def test_binary_is_found_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def binary(folder: Path) -> Path:
        folder.mkdir(parents=True)
        path = folder / "llama-server"
        path.write_text("#!/bin/sh\nexit 3\n")
        path.chmod(0o755)
        return path

    chosen = case("qwen3")
    assert _server.find_binary(chosen) is None
    on_path = binary(tmp_path / "bin-on-path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert _server.find_binary(chosen) == on_path
    checkout = binary(tmp_path / "checkout/build/bin")
    monkeypatch.setenv("LLAMA_CPP_PATH", str(tmp_path / "checkout"))
    assert _server.find_binary(chosen) == checkout


@pytest.mark.e2e
def test_server_that_dies_is_a_regression_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = tmp_path / "llama-server"
    dying.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = findings("chat_template", case("qwen3"))
    assert regressions(found) == {"rendered_text"}
    assert "exit code 3" in found["rendered_text"].detail


def test_suite_is_given_what_the_server_would_set_by_itself() -> None:
    plain = suite("{{ messages }}")
    assert len(plain) == len(SUITE)
    assert all(one.settings == {"enable_thinking": False} for one in plain)
    rich = suite("{% if enable_thinking %}{{ date_string }}{% endif %}")
    assert all("date_string" in one.settings for one in rich)
    assert {one.settings["enable_thinking"] for one in rich} == {True, False}
    assert len({one.name for one in rich}) == len(rich)


def test_parts_printed_as_python_are_no_reference() -> None:
    parts = Conversation("parts", ({"role": "user", "content": [{"type": "text", "text": "x"}]},))
    printed = {"accepted": [{"text": "[{'type': 'text', 'text': 'x'}]", "ids": []}], "error": ""}
    assert "Python" in chat_template._without_reference(parts, printed)
    dropped = {"accepted": [{"text": "<user></user>", "ids": []}], "error": ""}
    assert "drops" in chat_template._without_reference(parts, dropped)
    assert not chat_template._without_reference(
        parts, {"accepted": [{"text": "<user>x</user>", "ids": []}], "error": ""}
    )
    failed = {"accepted": [], "error": "TypeError: can only concatenate"}
    assert "TypeError" in chat_template._without_reference(parts, failed)
    refused = {"accepted": [], "error": "TemplateError: roles must alternate"}
    assert not chat_template._without_reference(parts, refused)


def test_only_a_wrong_order_of_roles_has_to_be_rejected() -> None:
    said = ({"role": "system", "content": "x"},)
    refused = {"accepted": [], "error": "TemplateError: System role not supported"}
    rendered = {"text": "x", "ids": [1], "nfc_ids": [1]}
    for strict, verdict in ((False, Verdict.PASS), (True, Verdict.REGRESSION)):
        answered = {"accepted": [rendered], "error": ""}
        reference = {"facts": {"bos_text": None}, "answers": [answered, refused]}
        chats = (Conversation("fine", said), Conversation("refused", said, strict=strict))
        both = chat_template.Renderings(chats, reference, [rendered, rendered])
        found = chat_template._judge_text(both, "an engine")
        assert found.verdict == verdict
        assert "'refused': rejected by the source" in found.detail


def test_content_parts_that_the_engine_joins_are_not_compared() -> None:
    parts = Conversation("parts", ({"role": "user", "content": [{"type": "text", "text": "x"}]},))
    answered = {"accepted": [{"text": "x", "ids": [1]}], "error": ""}
    for typed, excuse in ((True, ""), (False, "llama.cpp joins content parts to a text for this template")):
        both = chat_template.Renderings((parts,), {}, [], typed_content=typed)
        assert both.excuse(parts, answered) == excuse


def test_difference_without_a_generation_prompt_is_noted_only() -> None:
    tally = chat_template.Tally()
    tally.count(True, "")
    tally.differ(Conversation("x", (), generation_prompt=False), "at character 1")
    noted = tally.finding("rendered_text")
    assert noted.verdict == Verdict.PASS
    assert "at character 1" in noted.detail
    tally.differ(Conversation("y", ()), "at character 2")
    assert tally.finding("rendered_text").verdict == Verdict.REGRESSION
    assert tally.finding("rendered_text").measured == "1 of 2"


def test_first_difference_is_shown_with_its_surroundings() -> None:
    shown = chat_template._explain_text("a" * 100 + "b" + "c" * 100, "a" * 100 + "x" + "c" * 100)
    assert shown.startswith("at character 100: expected ")
    assert "ab" in shown
    assert "ax" in shown
    assert len(shown) < 200


def test_summary_is_a_sentence() -> None:
    assert find_check("chat_template").summary.endswith(".")
    assert isinstance(case("qwen3"), Case)
