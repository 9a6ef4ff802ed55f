"""Each fault of a chat template is found by content, through llama.cpp's own engine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tampering
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tampering import altered, case, findings, gguf_of, regressions, source_of, tampered

from quantool.errors import DependencyError, QuantizationError, SourceError
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Verdict
from quantool.runtime import limits
from quantool.runtime.toolchain import upstream_tool
from quantool.runtime.workspace import Workspace
from quantool.validation._chat import agreement, llama_server
from quantool.validation._chat.conversations import SUITE, THINKING, Conversation, of_case, suite
from quantool.validation._chat.renderings import Renderings, Tally, explain_text, without_reference
from quantool.validation._engines import hf_tokenizer
from quantool.validation._engines.vocabulary import UnloadableError

KEY = "tokenizer.chat_template"
CHATML = (  # to the byte the template for which llama-cpp-python has a format of its own
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


def of_folder(folder: Path, artifact: Path) -> Case:
    """A case with the tokenizer of ``folder`` as its source's, beside the weights of gemma3."""
    healthy = tampering.folder_of("gemma3") / "model.safetensors"
    if not (folder / healthy.name).exists():
        (folder / healthy.name).symlink_to(healthy)
    return replace(
        case("gemma3", artifact, output=f"given/{artifact.stem}"),
        source=source_of(folder),
        workspace=Workspace(folder.parent / "run"),
    )


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_healthy(name: str) -> None:
    found = findings("chat_template", case(name))
    assert not regressions(found)
    assert set(found) == {
        *("template_text", "template_caps", "rendered_text", "rendered_ids", "bos_count"),
        *("rendered_continuation", "rendered_text_python", "bos_count_python"),
    }
    passed = {metric for metric, one in found.items() if one.verdict == Verdict.PASS}
    assert set(found) - passed <= {"rendered_continuation"}
    assert "llama-cpp-python" in found["rendered_text_python"].detail
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
    assert "'one question" in found["rendered_text"].detail
    assert "<think>" in found["rendered_text"].detail


@pytest.mark.e2e
def test_trailing_newline(tmp_path: Path) -> None:
    longer = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {KEY: template("qwen3") + "\n"})
    found = findings("chat_template", case("qwen3", longer))
    assert "template_text" in regressions(found)
    assert not {"rendered_text", "rendered_ids", "rendered_text_python"} & regressions(found)
    assert found["template_text"].measured == len(template("qwen3").encode()) + 1


@pytest.mark.e2e
def test_template_that_llama_cpp_cannot_parse(tmp_path: Path) -> None:
    broken = tampered(gguf_of("qwen3"), tmp_path / "t.gguf", {KEY: template("qwen3") + "{% if %}"})
    found = findings("chat_template", case("qwen3", broken))
    assert regressions(found) == {"template_text", "rendered_text", "rendered_text_python"}
    assert "Unexpected token" in found["rendered_text"].detail
    assert "TemplateSyntaxError" in found["rendered_text_python"].detail


@pytest.mark.e2e
def test_chatml_in_the_place_of_the_template_is_found_by_every_renderer(tmp_path: Path) -> None:
    planted = tampered(gguf_of("gemma3"), tmp_path / "t.gguf", {KEY: CHATML})
    found = findings("chat_template", case("gemma3", planted))
    renderers = {"rendered_text", "rendered_ids", "rendered_continuation", "rendered_text_python"}
    assert {"template_text", *renderers} <= regressions(found)
    assert "its own format 'chatml'" in found["rendered_text_python"].detail
    assert "im_start" in found["rendered_text"].detail


@pytest.mark.e2e
def test_format_that_llama_cpp_python_prefers_to_the_sources_template_is_skipped(tmp_path: Path) -> None:
    folder = tampering.tokenizer_folder("gemma3", tmp_path / "source")
    (folder / "chat_template.jinja").write_text(CHATML)
    same = tampered(gguf_of("gemma3"), tmp_path / "t.gguf", {KEY: CHATML})
    found = findings("chat_template", of_folder(folder, same))
    assert found["template_text"].verdict == found["rendered_text"].verdict == Verdict.PASS
    assert found["rendered_text_python"].verdict == Verdict.SKIPPED
    assert "its own format 'chatml'" in found["rendered_text_python"].detail


@pytest.mark.e2e
def test_named_templates_are_compared_one_by_one(tmp_path: Path) -> None:
    tools = template("gemma3") + "{% for one in tools %}<tool>{{ one.function.name }}</tool>{% endfor %}"
    folder = tampering.tokenizer_folder("gemma3", tmp_path / "source")
    (folder / "additional_chat_templates").mkdir()
    for name, text in (("tool_use", tools), ("for-rag", "{{ documents }}")):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    keys = {f"{KEY}.tool_use": tools, f"{KEY}.for_rag": "{{ documents }}"}
    names = {f"{KEY}s": ["for_rag", "tool_use"]}
    whole = tampered(gguf_of("gemma3"), tmp_path / "whole.gguf", keys | names)
    found = findings("chat_template", of_folder(folder, whole))
    assert not regressions(found)
    named = {"template_text of tool_use", "template_text of for_rag", "template_names"}
    assert all(found[metric].verdict == Verdict.PASS for metric in named)

    partial = tampered(gguf_of("gemma3"), tmp_path / "part.gguf", {f"{KEY}.for_rag": "{{ documents }} "})
    found = findings("chat_template", of_folder(folder, partial))
    assert {*named, "rendered_text"} <= regressions(found)
    assert "<tool>" in found["rendered_text"].detail
    assert "no chat template tool_use" in found["template_text of tool_use"].detail
    assert found["template_text"].verdict == Verdict.PASS

    saved = tampering.tokenizer_folder("gemma3", tmp_path / "saved")
    found = findings("chat_template", of_folder(folder, saved))
    assert {"template_text of tool_use", "template_text of for-rag", "rendered_text"} <= regressions(found)


@pytest.mark.e2e
def test_wrong_eos_shows_in_what_the_template_prints(tmp_path: Path) -> None:
    folder = tampering.tokenizer_folder("gemma3", tmp_path / "source")
    text = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    keys = {KEY: text, "tokenizer.ggml.eos_token_id": 5}
    found = findings(
        "chat_template", of_folder(folder, tampered(gguf_of("gemma3"), tmp_path / "t.gguf", keys))
    )
    assert {"rendered_text", "rendered_text_python"} <= regressions(found)
    assert "<eos>" in found["rendered_text"].detail


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
    detail = found["rendered_text"].detail
    assert "rendered by llama-server" in detail
    assert str(binary.parent) not in detail  # findings are published


def test_binary_is_found_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def binary(folder: Path) -> Path:
        folder.mkdir(parents=True)
        path = folder / "llama-server"
        path.write_text("#!/bin/sh\nexit 3\n")
        path.chmod(0o755)
        return path

    chosen = case("qwen3")
    assert llama_server.find_binary(chosen.config) is None
    on_path = binary(tmp_path / "bin-on-path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert llama_server.find_binary(chosen.config) == on_path
    checkout = binary(tmp_path / "checkout/build/bin")
    monkeypatch.setenv("LLAMA_CPP_PATH", str(tmp_path / "checkout"))
    assert llama_server.find_binary(chosen.config) == checkout


@pytest.mark.e2e
def test_server_that_dies_is_a_regression_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server(tmp_path, "echo no such luck in /home/me/x.cpp:3\nexit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = findings("chat_template", case("qwen3"))
    assert regressions(found) == {"rendered_text"}
    assert "exit code 3" in found["rendered_text"].detail
    assert "no such luck in x.cpp:3" in found["rendered_text"].detail


def server(folder: Path, body: str) -> Path:
    """A llama-server that knows its version, and does what ``body`` says."""
    path = folder / "llama-server"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo version: 1 && exit\n{body}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho broken >&2\nexit 127\n", "ends with exit code 127: broken"),
        ("#!/bin/sh\n", "ends with exit code 0: it says nothing"),
        ("#!/no/such/shell\n", "does not run: .*No such file"),
        ("\x7fELF", "does not run: .*Exec format error"),
    ],
)
def test_a_broken_server_is_not_the_files_fault(tmp_path: Path, script: str, reason: str) -> None:
    broken = tmp_path / "llama-server"
    broken.write_text(script)
    broken.chmod(0o755)
    with pytest.raises(DependencyError, match=reason) as raised:
        llama_server._require_working(str(broken))
    assert "xllamacpp" in raised.value.hint


@pytest.mark.parametrize("body", [b"<html>proxy</html>", b"[]", b"\xff"])
def test_an_answer_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    class Opener:
        def open(self, *_: Any, **__: Any) -> BytesIO:
            return BytesIO(body)

    monkeypatch.setattr("urllib.request.build_opener", lambda *_: Opener())
    with pytest.raises(QuantizationError, match=r"llama\.cpp's server answers .* to /props: no"):
        llama_server._post("http://127.0.0.1:1", "/props", None)


@pytest.mark.e2e
def test_server_that_is_too_old_is_not_the_files_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server(tmp_path, "echo 'error: invalid argument: --no-repack' >&2\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(DependencyError, match="invalid argument: --no-repack") as raised:
        llama_server.render(case("qwen3"), ())
    assert "xllamacpp" in raised.value.hint


@pytest.mark.e2e
def test_server_that_breaks_off_is_the_files_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real server on a free port that answers once that it is well, and closes every other connection."""
    flaky = tmp_path / "llama-server"
    flaky.write_text(FLAKY.format(python=sys.executable))
    flaky.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UnloadableError, match="broke off at a chat that ends with"):
        llama_server.render(case("qwen3"), SUITE[:2])


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, "on the conversation 'x' it did not end within 5 s"),
        ("{{ 7 ** (10 ** 9) }}", "it did not end within 5 s"),
        (DOUBLING, "it took more than 1 GB of memory"),
        ("{{ '%2999999999d'|format(1) }}", "it took more than 1 GB of memory"),
    ],
)
def test_a_template_that_does_not_end_is_an_error_of_the_source(
    monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(limits.limit, "__defaults__", (0, 1, limits.BYTES))
    monkeypatch.setattr(hf_tokenizer, "load_tokenizer", lambda *_, **__: Rendering(template))
    with pytest.raises(SourceError, match=reason):
        hf_tokenizer.render(
            {"folder": "", "trust_remote_code": False, "conversations": [CHAT]}, lambda *_: None
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ range(10 ** 9) }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if x %}" * 3000,
    ],
)
def test_a_template_that_breaks_is_refused(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(hf_tokenizer, "load_tokenizer", lambda *_, **__: Rendering(template))
    monkeypatch.setattr(hf_tokenizer, "describe", lambda _: {})
    asked = {"folder": "", "trust_remote_code": False, "conversations": [CHAT]}
    (answer,) = hf_tokenizer.render(asked, lambda *_: None)["answers"]
    assert answer["accepted"] == []
    assert "Error: " in answer["error"]


CHAT = Conversation("x", ({"role": "user", "content": "Hi"},)).request()


class Rendering:
    """Of a tokenizer what renders, as transformers does it."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: Any, **variables: Any) -> str:
        made = ImmutableSandboxedEnvironment().from_string(self.template)
        return made.render(messages=messages, **variables)


@pytest.mark.e2e
def test_an_endless_template_of_the_artifact_is_found_and_hangs_nobody(tmp_path: Path) -> None:
    bad = tampered(gguf_of("qwen3"), tmp_path / "bad.gguf", {"tokenizer.chat_template": ENDLESS})
    found = findings("chat_template", case("qwen3", bad))
    assert regressions(found) >= {"template_text", "rendered_text", "rendered_text_python"}
    assert "SIGXCPU" in found["rendered_text"].detail
    assert "did not end within 5 s" in found["rendered_text_python"].detail
    assert str(tmp_path) not in "".join(one.detail for one in found.values())


FLAKY = """#!{python}
import http.server, json, sys

if sys.argv[1] == "--version":
    print("version: 1")
    sys.exit()

class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(dict(status="ok")).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.connection.close()

server = http.server.HTTPServer(("127.0.0.1", 0), Once)
print("listening on http://127.0.0.1:%d" % server.server_port, flush=True)
server.serve_forever()
"""


def test_suite_is_given_what_the_server_would_set_by_itself() -> None:
    plain = suite("{{ messages }}")
    assert len(plain) == len(SUITE)
    assert all(one.settings == {"enable_thinking": False, "preserve_reasoning": False} for one in plain)
    rich = suite("{% if enable_thinking and thinking and not clear_thinking %}{{ date_string }}{% endif %}")
    assert len(rich) > len(SUITE) + len(THINKING)
    assert all("date_string" in one.settings and one.settings["clear_thinking"] for one in rich)
    for switch in ("enable_thinking", "thinking"):
        assert {one.settings[switch] for one in rich if switch in one.settings} == {True, False}
    assert len({one.name for one in rich}) == len(rich)


def test_parts_printed_as_python_are_no_reference() -> None:
    parts = Conversation("parts", ({"role": "user", "content": [{"type": "text", "text": "x"}]},))
    printed = {"accepted": [{"text": "[{'type': 'text', 'text': 'x'}]", "ids": []}], "error": ""}
    assert "Python" in without_reference(parts, printed)
    dropped = {"accepted": [{"text": "<user></user>", "ids": []}], "error": ""}
    assert "drops" in without_reference(parts, dropped)
    assert not without_reference(parts, {"accepted": [{"text": "<user>x</user>", "ids": []}], "error": ""})
    failed = {"accepted": [], "error": "TypeError: can only concatenate"}
    assert "TypeError" in without_reference(parts, failed)
    refused = {"accepted": [], "error": "TemplateError: roles must alternate"}
    assert not without_reference(parts, refused)


def test_only_a_wrong_order_of_roles_has_to_be_rejected() -> None:
    said = ({"role": "system", "content": "x"},)
    refused = {"accepted": [], "error": "TemplateError: System role not supported"}
    rendered = {"text": "x", "ids": [1], "nfc_ids": [1]}
    for strict, verdict in ((False, Verdict.PASS), (True, Verdict.REGRESSION)):
        answered = {"accepted": [rendered], "error": ""}
        reference = {"facts": {"bos_text": None}, "answers": [answered, refused]}
        chats = (Conversation("fine", said), Conversation("refused", said, strict=strict))
        both = Renderings(chats, reference, [rendered, rendered])
        found = agreement.judge_text(both, "rendered_text")
        assert found.verdict == verdict
        assert "'refused': rejected by the source" in found.detail


def test_content_parts_that_the_engine_joins_are_not_compared() -> None:
    parts = Conversation("parts", ({"role": "user", "content": [{"type": "text", "text": "x"}]},))
    answered = {"accepted": [{"text": "x", "ids": [1]}], "error": ""}
    for typed, excuse in ((True, ""), (False, "llama.cpp joins content parts to a text for this template")):
        both = Renderings((parts,), {}, [], typed_content=typed)
        assert both.excuse(parts, answered) == excuse


def test_difference_without_a_generation_prompt_is_noted_only() -> None:
    tally = Tally()
    tally.count(True, "")
    tally.differ(Conversation("x", (), generation_prompt=False), "at character 1")
    noted = tally.finding("rendered_text")
    assert noted.verdict == Verdict.PASS
    assert "at character 1" in noted.detail
    tally.differ(Conversation("y", ()), "at character 2")
    assert tally.finding("rendered_text").verdict == Verdict.REGRESSION
    assert tally.finding("rendered_text").measured == "1 of 2"


def test_first_difference_is_shown_with_its_surroundings() -> None:
    shown = explain_text("a" * 100 + "b" + "c" * 100, "a" * 100 + "x" + "c" * 100)
    assert shown.startswith("at character 100: expected ")
    assert "ab" in shown
    assert "ax" in shown
    assert len(shown) < 200


def test_summary_is_a_sentence() -> None:
    assert find_check("chat_template").summary.endswith(".")
    assert isinstance(case("qwen3"), Case)
