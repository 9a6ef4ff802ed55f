"""Files with the same keys are asked once; any change of one that a tokenizer or template reads has a file asked again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tampering import case, edited, findings, gguf_of, tampered

from quantool.errors import QuantizationError
from quantool.plugins.contract import Case
from quantool.runtime import process
from quantool.runtime.workspace import Workspace
from quantool.validation._chat import llama_cpp_python, llama_server
from quantool.validation._chat.conversations import suite
from quantool.validation._engines import vocabulary
from quantool.validation._engines.vocabulary import LLAMA_CPP, ProbeText, UnloadableError, gguf_key, of_gguf

pytestmark = pytest.mark.e2e

TEXTS = (ProbeText("text", "Bon dia!"), ProbeText("special", "<|im_end|> x"))
OF_A_LEVEL = {"general.file_type": 7, "quantize.imatrix.file": "a.gguf", "general.quantization_version": 3}


@pytest.fixture
def level(tmp_path: Path) -> Callable[..., Case]:
    """A case of its own workspace, of the structure's GGUF with other keys."""
    workspace = Workspace(tmp_path / "run")

    def made(name: str, change: dict[str, Any]) -> Case:
        path = tampered(gguf_of("qwen3"), tmp_path / f"{name}.gguf", change)
        return replace(case("qwen3", path, output=f"gguf/{name}"), workspace=workspace)

    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the workers that were called."""
    names: list[str] = []

    def noted(work: Any, *inputs: Any, **settings: Any) -> dict[str, Any]:
        names.append(f"{work.__module__.rpartition('.')[2]}.{work.__name__}")
        return process.call(work, *inputs, **settings)

    for module in (vocabulary, llama_server, llama_cpp_python):
        monkeypatch.setattr(module, "call", noted)
    return names


def asked(one: Case) -> list[Any]:
    conversations = suite(one.source.facts.chat_template or "")[:3]
    return [
        of_gguf(one),
        of_gguf(one, TEXTS),
        llama_server.render(one, conversations),
        llama_cpp_python.render(one, conversations),
    ]


def test_levels_of_one_base_are_asked_once(level: Callable[..., Case], calls: list[str]) -> None:
    first, second = level("Q8_0", {}), level("Q4_K_M", OF_A_LEVEL)
    answers = asked(first)
    assert sorted(calls) == [
        "llama_cpp_python.answer", "llama_server.answer", "vocabulary.tokenize", "vocabulary.tokenize",
    ]  # fmt: skip
    calls.clear()
    assert asked(second) == answers
    assert not calls
    of_gguf(second, [*TEXTS, ProbeText("another", "x")])
    assert calls == ["vocabulary.tokenize"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("tokenizer.chat_template", lambda text: text.replace("user", "User")),
        ("tokenizer.chat_template.tool_use", lambda _: "{{ 1 }}"),
        ("tokenizer.ggml.tokens", lambda tokens: [*tokens[:-1], f"{tokens[-1]}x"]),
        ("tokenizer.ggml.token_type", lambda types: [*types[:-1], 1 if types[-1] != 1 else 4]),
        ("tokenizer.ggml.merges", lambda merges: [merges[1], merges[0], *merges[2:]]),
        ("tokenizer.ggml.pre", lambda _: "gpt-2"),
        ("tokenizer.ggml.add_bos_token", lambda value: not value),
        ("tokenizer.ggml.eos_token_id", lambda token: token - 1),
        ("general.architecture", lambda name: f"{name}x"),
        ("general.name", lambda _: "another"),
    ],
)
def test_a_change_of_any_other_key_is_seen(
    level: Callable[..., Case], key: str, change: Callable[[Any], Any], tmp_path: Path
) -> None:
    from gguf import GGUFReader

    field = GGUFReader(gguf_of("qwen3")).get_field(key)
    value = change(field.contents() if field is not None else None)
    if key == "general.architecture":  # which the writer of the tests sets by itself
        path = tmp_path / "changed.gguf"
        path.write_bytes(gguf_of("qwen3").read_bytes().replace(b"qwen3", b"qwen2", 1))
        changed = replace(level("x", {}), artifact=path)
    else:
        changed = level("changed", {key: value})
    before, after = (gguf_key(one, LLAMA_CPP) for one in (level("whole", {}), changed))
    assert before is not None
    assert after not in (before, None)


def test_a_changed_level_behind_a_good_one_is_found(level: Callable[..., Case], calls: list[str]) -> None:
    good = level("Q8_0", {})
    template = good.source.facts.chat_template or ""
    changed = level("Q4_K_M", {"tokenizer.chat_template": f"Hm. {template}"})
    for answers, others in zip(asked(good)[2:], asked(changed)[2:], strict=True):
        texts = [[one.get("text") for one in each["answers"]] for each in (answers, others)]
        assert texts[0] != texts[1]
    ordinary = level("Q6_K", {"tokenizer.ggml.pre": "gpt-2"})
    calls.clear()
    of_gguf(ordinary, TEXTS)
    assert calls == ["vocabulary.tokenize"]


def test_other_weights_leave_the_key_and_a_cut_file_has_none(
    level: Callable[..., Case], tmp_path: Path
) -> None:
    whole = level("Q8_0", {})

    def zero(data: Any) -> None:
        data[:] = 0

    other = replace(whole, artifact=edited(whole.artifact, tmp_path / "other.gguf", "ffn_up", zero))
    assert gguf_key(other, LLAMA_CPP) == gguf_key(whole, LLAMA_CPP)
    cut = tmp_path / "cut.gguf"
    shutil.copyfile(whole.artifact, cut)
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 1)
    assert gguf_key(replace(whole, artifact=cut), LLAMA_CPP) is None
    of_gguf(whole)
    with pytest.raises((UnloadableError, QuantizationError)):
        of_gguf(replace(whole, artifact=cut))


def test_a_file_that_changed_since_is_read_again(level: Callable[..., Case]) -> None:
    one = level("Q8_0", {})
    before = gguf_key(one, LLAMA_CPP)
    tampered(gguf_of("qwen3"), one.artifact, {"tokenizer.ggml.pre": "gpt-2"})
    assert gguf_key(one, LLAMA_CPP) != before


def test_that_a_file_loads_is_seen_on_itself(level: Callable[..., Case], calls: list[str]) -> None:
    first, second = level("Q8_0", {}), level("Q4_K_M", OF_A_LEVEL)
    of_gguf(first)
    assert findings("integrity", second)["loads"].measured == "header and vocabulary"
    assert calls == ["vocabulary.tokenize"] * 2
