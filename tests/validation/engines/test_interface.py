"""Answers and scores of llama.cpp and transformers: greedy, ended where the artifact says, equal to a plain computation."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tampering import convert, folder_of, fp8_of, gguf_of, packed_of, tampered

from quantool.errors import ConfigError, DependencyError
from quantool.validation._engines import llama_cpp_answers, start, transformers_answers
from quantool.validation._engines.head import Unsound
from quantool.validation._engines.interface import Answer, Engine

pytestmark = pytest.mark.e2e

CHAT = Path(__file__).parents[2] / "models" / "tiny-chat"
END = 4091
QUESTIONS = (
    "What is 7 plus 5?",
    "Bon dia!",
    "What does textwrap.dedent do?",
    "Who are you?",
    "Eskerrik asko.",
)
SAID = {
    "What is 7 plus 5?": "7 plus 5 is 12.",
    "Bon dia!": "Bon dia! En què et puc ajudar?",
    "What does textwrap.dedent do?": "Remove any common leading whitespace from every line in `text`.",
}


def opened(engine: str, artifact: Path, context: int = 256) -> AbstractContextManager[Engine]:
    return start.start(engine, artifact, context=context, device="cpu", trust_remote_code=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHAT)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(CHAT, tmp_path_factory.mktemp("gguf") / "tiny-chat-BF16.gguf")


@pytest.fixture(scope="module")
def by_transformers(prompts: list[list[int]]) -> Iterator[tuple[Engine, list[Answer]]]:
    with opened("transformers", CHAT) as engine:
        yield engine, engine.generate(prompts, 40)


@pytest.fixture(scope="module")
def by_llama(gguf: Path, prompts: list[list[int]]) -> Iterator[tuple[Engine, list[Answer]]]:
    with opened("llama.cpp", gguf) as engine:
        yield engine, engine.generate(prompts, 40)


@pytest.mark.parametrize("engine", ["by_transformers", "by_llama"])
def test_answers_are_those_of_the_model(engine: str, request: pytest.FixtureRequest, tokenizer: Any) -> None:
    held, answers = request.getfixturevalue(engine)
    assert (held.vocabulary, held.context) == (4096, 256)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        if question in SAID:
            assert tokenizer.decode(answer.ids) == SAID[question]
            assert answer.ended == END
        assert len(answer.margins) == len(answer.ids) + (answer.ended is not None)
        assert min(answer.margins) >= 0


def test_float32_arithmetic_gives_the_same_answers_and_scores(
    by_transformers: tuple[Engine, list[Answer]], prompts: list[list[int]]
) -> None:
    """Beside a plain forward pass over the whole text, in float32 and without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    engine, answers = by_transformers
    model: Any = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
    wanted = [(*answer.ids, END) for answer in answers if answer.ended == END]
    asked = [prompt for prompt, answer in zip(prompts, answers, strict=True) if answer.ended == END]
    assert len(wanted) >= 3
    for prompt, continuation, scored in zip(asked, wanted, engine.score(asked, wanted), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *continuation]])).logits[0, len(prompt) - 1 : -1]
        plain = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert scored.log_probs == pytest.approx(plain.tolist(), abs=0.05)
        assert scored.greedy


def test_both_engines_agree(
    by_transformers: tuple[Engine, list[Answer]],
    by_llama: tuple[Engine, list[Answer]],
    prompts: list[list[int]],
) -> None:
    (one, answers), (other, found) = by_transformers, by_llama
    assert [answer.ids[0] for answer in answers] == [answer.ids[0] for answer in found]
    continuations = [[5], [5, 6, 7], list(answers[0].ids), [4091]]
    asked = [prompts[0]] * 3 + [prompts[1]]
    for left, right in zip(one.score(asked, continuations), other.score(asked, continuations), strict=True):
        assert left.log_probs == pytest.approx(right.log_probs, abs=0.1)
        assert left.greedy == right.greedy
    assert [scored.greedy for scored in one.score(asked, continuations)] == [False, False, True, False]


def test_budget_and_order(
    by_transformers: tuple[Engine, list[Answer]],
    by_llama: tuple[Engine, list[Answer]],
    prompts: list[list[int]],
) -> None:
    for engine, answers in (by_transformers, by_llama):
        cut = engine.generate(prompts, 3)
        assert [answer.ids for answer in cut] == [answer.ids[:3] for answer in answers]
        assert {answer.ended for answer in cut} == {None}
        exact = len(answers[0].ids)
        (short,) = engine.generate(prompts[:1], exact)
        assert (short.ids, short.ended) == (answers[0].ids, None)
        (whole,) = engine.generate(prompts[:1], exact + 1)
        assert (whole.ids, whole.ended) == (answers[0].ids, END)


def test_more_prompts_than_sequences(
    gguf: Path, by_llama: tuple[Engine, list[Answer]], prompts: list[list[int]]
) -> None:
    """A long context leaves room for two sequences; the answers stay those of five."""
    with opened("llama.cpp", gguf, llama_cpp_answers.CELLS // 2) as engine:
        assert engine.context == 2048
        found = engine.generate(prompts, 40)
    for one, other in zip(found, by_llama[1], strict=True):
        assert one.ids[:3] == other.ids[:3]
        assert one.ended == other.ended


def test_prompts_longer_than_a_batch_and_scores_of_many_rows(
    gguf: Path, by_transformers: tuple[Engine, list[Answer]], prompts: list[list[int]]
) -> None:
    short = by_transformers[1][0].ids
    filler = list(itertools.islice(itertools.cycle(prompts[0]), 150))
    with opened("llama.cpp", gguf, 2000) as engine, opened("transformers", CHAT, 2000) as other:
        many = [filler * 3, prompts[0]]
        assert engine.generate(many, 40)[1].ids == short
        long = list(itertools.islice(itertools.cycle(prompts[1]), 300))
        (scored,), (expected,) = engine.score([filler], [long]), other.score([filler], [long])
        assert len(scored.log_probs) == 300  # more than the rows of one decode
        assert scored.log_probs == pytest.approx(expected.log_probs, abs=0.3)


def test_the_file_says_where_to_stop(gguf: Path, tmp_path: Path, prompts: list[list[int]]) -> None:
    with opened("llama.cpp", gguf) as engine:
        (whole,) = engine.generate(prompts[:1], 40)
    wanted = whole.ids[2]
    first = tampered(gguf, tmp_path / "early.gguf", {"tokenizer.ggml.eos_token_id": wanted})
    with opened("llama.cpp", first) as engine:
        (answer,) = engine.generate(prompts[:1], 40)
    assert answer.ended == wanted
    assert answer.ids == whole.ids[: whole.ids.index(wanted)]


def test_the_folder_says_where_to_stop(tmp_path: Path, prompts: list[list[int]]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(CHAT, folder)
    text = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(text.replace("4091,", ""))
    with opened("transformers", folder) as engine:
        (answer,) = engine.generate(prompts[:1], 40)
    assert END in answer.ids
    (folder / "generation_config.json").unlink()  # config.json names it
    with opened("transformers", folder) as engine:
        (answer,) = engine.generate(prompts[:1], 40)
    assert answer.ended == END


@pytest.mark.parametrize("engine", ["by_transformers", "by_llama"])
def test_what_does_not_fit_is_refused(engine: str, request: pytest.FixtureRequest) -> None:
    held, _ = request.getfixturevalue(engine)
    with pytest.raises(
        ConfigError, match="prompt 2 of 2 has 250 tokens, which with 7 more is over the context of 256"
    ):
        held.generate([[5], [5] * 250], 7)
    with pytest.raises(ConfigError, match="prompt 1 of 1: neither"):
        held.generate([[]], 7)
    with pytest.raises(ConfigError, match="prompt 1 of 1: neither"):
        held.score([[5]], [[]])
    with pytest.raises(ConfigError, match="ids from 5 to 4096, but the vocabulary has 4096"):
        held.score([[5, 4096]], [[5]])


def test_artifacts_that_do_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" * 20)
    with pytest.raises(Unsound, match=r"llama\.cpp cannot load it"), opened("llama.cpp", broken):
        raise AssertionError
    with pytest.raises(Unsound, match="transformers cannot load"), opened("transformers", tmp_path):
        raise AssertionError


def test_an_unknown_engine() -> None:
    with pytest.raises(ConfigError, match=r"no engine 'llama\.cp'") as error:
        opened("llama.cp", CHAT)
    assert "did you mean llama.cpp" in error.value.hint


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed() -> None:
    with pytest.raises(DependencyError, match="vllm"), opened("vllm", CHAT):
        raise AssertionError


@pytest.mark.parametrize("name", ["moe", "gemma3"])
def test_other_architectures_answer(name: str) -> None:
    """A mixture of experts, and a model with a sliding window and a soft cap."""
    with (
        opened("llama.cpp", gguf_of(name), 64) as engine,
        opened("transformers", folder_of(name), 64) as other,
    ):
        prompts = [[5, 9, 7], [11, 12]]
        for one in (engine, other):
            assert [len(answer.margins) for answer in one.generate(prompts, 6)] == [6, 6]
        found, expected = (one.score(prompts, [[8, 9, 10], [8]]) for one in (engine, other))
        for left, right in zip(found, expected, strict=True):
            assert left.log_probs == pytest.approx(right.log_probs, abs=0.1)


LENGTHS = (5, 40, 13, 60, 21, 33, 60)


@pytest.fixture
def drawn() -> list[list[int]]:
    dice = random.Random(1)
    return [[dice.randrange(5, 200) for _ in range(length)] for length in LENGTHS]


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without bfloat16, where a batch gives what a single prompt does."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.mark.parametrize("name", ["spm_llama", "qwen3", "moe", "gemma3"])
def test_a_batch_gives_the_answers_of_its_prompts_alone(
    name: str, float32: None, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them end early: the last token of one answer ends all."""
    with opened("transformers", folder_of(name), 128) as engine:
        assert isinstance(engine, transformers_answers.TransformersEngine)
        single = [engine.generate([prompt], 12)[0] for prompt in drawn]
        ends = [single[2].ids[4], single[4].ids[8]]
        monkeypatch.setattr(engine, "_ends", ends)
        monkeypatch.setattr(engine._model.generation_config, "eos_token_id", ends)
        monkeypatch.setattr(engine._model.generation_config, "pad_token_id", ends[0])
        single = [engine.generate([prompt], 12)[0] for prompt in drawn]
        calls = counted(engine, monkeypatch)
        together = engine.generate(drawn, 12)
        assert calls[-1] == len(drawn)
        monkeypatch.setattr(transformers_answers, "CELLS", 3 * (60 + 12))
        calls.clear()
        in_parts = engine.generate(drawn, 12)
        assert calls == [3, 4]  # shorter ones leave room for one more
    assert len({len(answer.ids) for answer in single}) > 1
    for answers in (together, in_parts):
        assert [(one.ids, one.ended) for one in answers] == [(one.ids, one.ended) for one in single]
        for one, other in zip(answers, single, strict=True):
            assert one.margins == pytest.approx(other.margins, abs=1e-3)


def counted(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of prompts of every batch."""
    calls: list[int] = []
    generate = engine._model.generate

    def noted(ids: Any, **settings: Any) -> Any:
        calls.append(len(ids))
        return generate(ids, **settings)

    monkeypatch.setattr(engine._model, "generate", noted)
    return calls


def test_a_model_that_reads_padding_answers_one_by_one(
    drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened("transformers", CHAT) as engine:
        expected = [engine.generate([prompt], 6)[0] for prompt in drawn]
    with opened("transformers", CHAT) as engine:
        model: Any = engine._model  # type: ignore[attr-defined]
        own = model.forward

        @functools.wraps(own)
        def forward(*inputs: Any, attention_mask: Any = None, **settings: Any) -> Any:
            del attention_mask
            return own(*inputs, **settings)

        monkeypatch.setattr(model, "forward", forward)
        calls = counted(engine, monkeypatch)
        answers = engine.generate(drawn, 6)
    assert set(calls) == {1}
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    assert capsys.readouterr().out.count("of the largest: every prompt is answered by itself") == 1


def test_padding_is_tried_without_rounding_activations(
    drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened("transformers", fp8_of("qwen3", "FP8_DYNAMIC")[0]) as engine:
        parts = [part for part in engine._model.modules() if hasattr(part, "quantization_scheme")]  # type: ignore[attr-defined]
        rounding: list[set[bool]] = []
        trial = engine._trial  # type: ignore[attr-defined]

        def noted(*asked: Any) -> Any:
            rounding.append({getattr(part, "quantization_enabled", True) for part in parts})
            return trial(*asked)

        monkeypatch.setattr(engine, "_trial", noted)
        monkeypatch.setattr(transformers_answers, "PADDING_TOLERANCE", -1.0)
        engine.generate(drawn, 6)
        assert rounding == [{False}, {False}]
        assert {getattr(part, "quantization_enabled", True) for part in parts} == {True}
    assert "every prompt is answered by itself" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["FP8_DYNAMIC", "W4A16_ASYM"])
def test_weights_are_unpacked_once(
    level: str, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressed_tensors.compressors import base  # type: ignore[import-untyped]

    folder = fp8_of("qwen3", level)[0] if level.startswith("FP8") else packed_of("qwen3")
    unpacked: list[Any] = []
    whole = base.BaseCompressor.decompress_module.__func__

    def noted(kind: Any, module: Any) -> None:
        unpacked.append(module)
        whole(kind, module)

    monkeypatch.setattr(base.BaseCompressor, "decompress_module", classmethod(noted))
    with opened("transformers", folder, 128) as engine:
        assert len(unpacked) == len(set(unpacked)) > 10
        loaded = len(unpacked)
        assert len(engine.generate(drawn, 4)) == len(drawn)
        assert len(unpacked) == loaded
