"""Answers beside the reference's: healthy artifacts pass, and each planted fault is named by the finding that should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import making
import pytest
from llama_gguf import write_gguf
from tampering import altered, convert, edited, source_of, tampered

from quantool.config.schema import Config
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Finding, Gates, Verdict
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.validation import behaviour
from quantool.validation._cache.questions import ask_artifact
from quantool.validation._chat import answers
from quantool.validation._chat.answers import ChatAnswer, Prompt, Prompts, prompts_of, questions_of
from quantool.validation._chat.prompts import BUILT_IN
from quantool.validation._engines.crash import WorkerError
from quantool.validation._engines.head import Unsound

CHAT = making.TINY
END, PAD = 4091, 4089
EOS = "tokenizer.ggml.eos_token_id"
QUIET = Progress(quiet=True)

slow = pytest.mark.e2e


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(CHAT, tmp_path_factory.mktemp("gguf") / "tiny-chat-BF16.gguf")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose reference the tests share, as artifacts of one run do."""
    return Workspace(tmp_path_factory.mktemp("run"))


def case(artifact: Path, workspace: Workspace, gate: float | None = 0.95, **settings: Any) -> Case:
    config = Config.model_validate(
        {"model_id": str(CHAT), "method": "gguf", "device": "cpu", "validation": settings}
    )
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    gates = Gates(min_same_top_p=gate)
    return Case(artifact, engine, f"t/{artifact.name}", source_of(CHAT), config, gates, workspace)


def judge(chosen: Case) -> dict[str, Finding]:
    return {finding.metric: finding for finding in find_check("behaviour").judge(chosen, QUIET)}


def regressions(found: Mapping[str, Finding]) -> set[str]:
    return {metric for metric, finding in found.items() if finding.verdict is Verdict.REGRESSION}


class Calls:
    """Runs workers in this process, which saves loading libraries each time, and notes the artifacts they answer with."""

    def __init__(self) -> None:
        self.artifacts: list[str] = []

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        self.artifacts.append(Path(request["model"]).name)
        answer: dict[str, Any] = json.loads(
            json.dumps(work(json.loads(json.dumps(request)), lambda *_: None))
        )
        return answer


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(process, "call", found)
    return found


@slow
def test_a_healthy_file_passes(gguf: Path, shared: Workspace) -> None:
    """With real children; every other test here reuses this reference."""
    found = judge(case(gguf, shared))
    assert {finding.verdict for finding in found.values()} == {Verdict.PASS}
    assert set(found) == {"first_token", "ends", "stops", "tool_calls", "common_prefix"}
    assert float(found["first_token"].measured or 0) >= 0.97
    assert found["first_token"].threshold == 0.95
    assert found["ends"].measured == "4091 <|im_end|>"
    assert found["stops"].measured == pytest.approx(found["stops"].reference, abs=0.06)
    assert float(found["common_prefix"].measured or 0) > 0.9
    assert "7 of 7 calls name the reference's function" in found["tool_calls"].detail


@slow
def test_four_bits_pass(gguf: Path, shared: Workspace, tmp_path: Path) -> None:
    """The gates of a level hold for large models; this one has five million parameters."""
    quantized = tmp_path / "tiny-chat-Q4_K_M.gguf"
    making.quantized(gguf, [making.run("Q4_K_M", quantized)])
    found = judge(case(quantized, shared, 0.85))
    assert not regressions(found)
    assert 0.6 < float(found["first_token"].measured or 0) < 1
    assert 0.3 < float(found["common_prefix"].measured or 0) < 0.9
    assert "the reference says" in found["common_prefix"].detail


@slow
def test_the_reference_is_asked_once(gguf: Path, shared: Workspace, tmp_path: Path, here: Calls) -> None:
    first = judge(case(gguf, shared))
    assert here.artifacts == []  # both kept
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(gguf, copy)
    assert judge(case(copy, shared)) == first
    assert here.artifacts == ["copy.gguf"]
    copy.write_bytes(copy.read_bytes())  # the same bytes, but nobody knows
    judge(case(copy, shared))
    assert here.artifacts == ["copy.gguf"] * 2


@slow
def test_permuted_k_rows(gguf: Path, shared: Workspace, tmp_path: Path, here: Calls) -> None:
    def permute(rows: Any) -> None:
        rows[:] = rows.copy().reshape(2, 32, 2, -1).swapaxes(1, 2).reshape(rows.shape)

    found = judge(case(edited(gguf, tmp_path / "k.gguf", "attn_k.weight", permute), shared, 0.84))
    assert {"first_token", "tool_calls"} <= regressions(found)
    assert "the reference says" in found["tool_calls"].detail


@slow
def test_an_end_that_does_not_end(gguf: Path, shared: Workspace, tmp_path: Path, here: Calls) -> None:
    tokens = making.keys(gguf)["tokenizer.ggml.tokens"]
    tokens[END] = "<other>"  # llama.cpp knows <|im_end|> by its text
    wrong = tampered(gguf, tmp_path / "eos.gguf", {EOS: PAD, "tokenizer.ggml.tokens": tokens})
    found = judge(case(wrong, shared))
    assert regressions(found) == {"ends", "stops"}
    assert "says 4091 <|im_end|> and goes on in" in found["ends"].detail
    assert "does not end where the reference does, again and again" in found["stops"].detail


@slow
def test_an_ordinary_token_that_ends(gguf: Path, shared: Workspace, tmp_path: Path, here: Calls) -> None:
    comma = making.keys(gguf)["tokenizer.ggml.tokens"].index("Ġis")
    found = judge(case(tampered(gguf, tmp_path / "eos.gguf", {EOS: comma}), shared))
    assert "ends" in regressions(found)
    assert f"stops at {comma}, an ordinary token, in" in found["ends"].detail


@slow
def test_folders(tmp_path: Path, here: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "BUILT_IN", BUILT_IN[:12])  # transformers takes seconds for all of them
    shared, folder = Workspace(tmp_path / "run"), tmp_path / "copy"
    shutil.copytree(CHAT, folder)
    found = judge(case(folder, shared))
    assert not regressions(found)
    assert found["common_prefix"].measured == found["first_token"].measured == 1
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(making.read_json(generation) | {"eos_token_id": [PAD]}))
    found = judge(case(folder, shared))
    assert regressions(found) == {"ends"}  # these are too few to tell anything from where they stop
    assert "says 4091 <|im_end|> and goes on in" in found["ends"].detail
    assert found["first_token"].measured == 1
    (folder / "model.safetensors").unlink()
    (finding,) = judge(case(folder, shared)).values()
    assert finding.verdict is Verdict.REGRESSION
    assert "transformers cannot load" in finding.detail


@slow
def test_files_that_cannot_answer(shared: Workspace, tmp_path: Path, here: Calls) -> None:
    short = write_gguf(CHAT, tmp_path / "short.gguf", vocabulary=2000)
    (finding,) = judge(case(short, shared)).values()
    assert finding.verdict is Verdict.REGRESSION
    assert "has 2000 entries, but the source's prompts use id 40" in finding.detail
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"what" * 100)
    (finding,) = judge(case(broken, shared)).values()
    assert finding.verdict is Verdict.REGRESSION
    assert "llama.cpp cannot load it" in finding.detail


def test_a_crash_is_a_regression_and_a_killed_worker_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = case(tmp_path, Workspace(tmp_path / "run"))
    prompts = Prompts((prompt("Hi"),), (), (END,), END, {})

    def dying(signal: str) -> None:
        def call(work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
            raise options["failure"](
                f"{process.name_of(work)} ended by {signal} without a result",
                hint="last lines of /home/me/out/log:\n/tmp/build/ggml.c:5: GGML_ASSERT(x)",
            )

        monkeypatch.setattr(process, "call", call)

    dying("SIGABRT (an assertion of llama.cpp)")
    questions = questions_of(chosen, prompts)
    with pytest.raises(Unsound, match=r"crashes on it(.|\n)*GGML_ASSERT\(x\)") as raised:
        ask_artifact(chosen, questions, QUIET)
    assert "ggml.c:5" in str(raised.value)
    assert "/" not in str(raised.value).partition("GGML")[2]
    dying("SIGKILL (out of memory?)")
    with pytest.raises(WorkerError, match="SIGKILL"):
        ask_artifact(chosen, questions, QUIET)


def test_models_without_a_template_are_skipped(tmp_path: Path) -> None:
    (finding,) = judge(altered(case(tmp_path, Workspace(tmp_path / "run")), chat_template=None)).values()
    assert finding.verdict is Verdict.SKIPPED
    assert "no chat template" in finding.detail


@slow
def test_prompts_of_the_user_and_of_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LIMIT", 42)
    own = tmp_path / "prompts.jsonl"
    chats: list[Any] = [
        [{"role": "user", "content": "Mine"}, {"role": "assistant", "content": "answer"}],
        [{"role": "assistant", "content": "nobody asked"}],
        [{"role": "user", "content": "long " * 3000}],
        [{"role": "user", "content": "bad"}, {"role": "wizard", "content": "role"}],
    ]
    own.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    chat = making.TEXT / "heldout.chat.jsonl"
    corpora = [
        {"name": "chat", "path": str(chat)},
        {"name": "docs", "path": str(making.TEXT / "heldout.en.txt")},
    ]
    found = prompts_of(
        case(tmp_path, Workspace(tmp_path / "run"), behaviour={"prompts": own}, corpora=corpora)
    )
    names = [prompt.name for prompt in found.prompts]
    assert names[:1] == ["question 1, en"]
    assert names[-3:] == ["yours, 1", "chat, 1", "chat, 2"]
    notes = "; ".join(found.notes)
    assert "the last 14 of 56 left out" in notes
    assert "'yours, 3' left out: 3010 tokens, room for 2000" in notes
    assert "'yours, 4' left out: the source's template refuses it (TemplateError: Unknown role" in notes
    assert (found.ends, found.turn_end) == ((END, PAD), END)
    (mine,) = (prompt for prompt in found.prompts if prompt.name == "yours, 1")
    assert mine.question == "Mine"
    assert len(mine.ids) < 15


def prompt(said: str, *, tools: bool = False) -> Prompt:
    return Prompt(said, said, tools, (1, 2, 3))


def said(ids: Sequence[int], ended: int | None = None, margin: float = 5.0, text: str = "") -> ChatAnswer:
    return ChatAnswer(tuple(ids), ended, (margin,) * (len(ids) + (ended is not None)), text)


def pair(one: ChatAnswer, other: ChatAnswer, *, tools: bool = False) -> behaviour.AnswerPair:
    return behaviour.AnswerPair(prompt("Hi", tools=tools), one, other, frozenset({2, 4}))


SOURCE = Prompts((), (), (2,), 4, {2: "</s>", 4: "<|im_end|>", 3: "<|x|>"})


def test_near_ties_say_nothing() -> None:
    gates, none = Gates(min_same_top_p=0.9), Gates()
    same, other = pair(said([7]), said([7])), pair(said([7]), said([8]))
    tie = pair(said([7], margin=0.2), said([8]))
    finding = behaviour._judge_first([same] * 3 + [tie] * 5, gates)
    assert (finding.measured, finding.verdict) == (1, Verdict.PASS)
    assert "5 left out" in finding.detail
    assert behaviour._judge_first([tie], gates).verdict is Verdict.SKIPPED
    low_bit = gates.model_copy(update={"max_mean_kld": 0.81})  # logits may be off by 1.8
    unsure = [pair(said([7], margin=1.7), said([8])), pair(said([7], margin=1.9), said([7]))]
    assert behaviour._judge_first(unsure, low_bit).measured == 1
    assert behaviour._judge_first(unsure, gates).measured == 0.5
    # 100 answers at a gate of 0.9: two standard errors are 0.06.
    assert behaviour._judge_first([same] * 85 + [other] * 15, gates).verdict is Verdict.PASS
    assert behaviour._judge_first([same] * 83 + [other] * 17, gates).verdict is Verdict.REGRESSION
    assert behaviour._judge_first([other] * 9, none).verdict is Verdict.PASS


def test_answers_are_compared_to_the_end_of_the_turn() -> None:
    ran_on = pair(said([7, 8, 4, 9, 9]), said([7, 8], 4))
    assert (ran_on.common(), ran_on.share()) == (3, 1)
    assert pair(said([7, 8, 9], 2), said([7, 8], 2)).share() == 0.5
    assert pair(said([], 2), said([7], 2)).common() == 0


def test_a_source_that_does_not_name_its_end() -> None:
    """Its answers go on behind the end of the turn; llama.cpp stops there, transformers does not: both are right."""
    for other in (said([7, 8], 4), said([7, 8, 4, 5, 5])):
        pairs = [pair(said([7, 8, 4, 9, 9]), other)] * 20
        ends, stops = behaviour._judge_ends(pairs, SOURCE), behaviour._judge_stops(pairs, SOURCE, 0.9)
        assert ends.verdict is stops.verdict is Verdict.PASS
        assert "defect of the source: its configurations do not name 4 <|im_end|>" in ends.detail
        assert stops.measured == stops.reference == 1


def test_ends_are_named() -> None:
    good = pair(said([7], 2), said([7], 2))
    assert behaviour._judge_ends([good], SOURCE).verdict is Verdict.PASS
    over = behaviour._judge_ends([good, pair(said([7], 2), said([7, 2, 9]))], SOURCE)
    assert over.verdict is Verdict.REGRESSION
    assert "says 2 </s> and goes on in 1 of 2 answers" in over.detail
    early = behaviour._judge_ends([good, pair(said([7], 2), said([], 7))], SOURCE)
    assert early.verdict is Verdict.REGRESSION
    assert "stops at 7, an ordinary token" in early.detail
    other = behaviour._judge_ends([pair(said([7], 2), said([7], 3))], SOURCE)
    assert other.verdict is Verdict.PASS
    assert "stops at 3 <|x|>, which the source does not name" in other.detail


def test_stops_are_judged_together() -> None:
    both, missing, excess, neither = (
        pair(said([7], one), said([7], other)) for one, other in ((2, 2), (2, None), (None, 2), (None, None))
    )

    def verdict(*pairs: behaviour.AnswerPair, gate: float | None = 0.9) -> Verdict:
        return behaviour._judge_stops(pairs, SOURCE, gate).verdict

    assert verdict(*[both] * 30, *[missing] * 7) is Verdict.PASS  # 1 of 128 by chance
    assert verdict(*[both] * 22, *[missing] * 8) is Verdict.REGRESSION
    assert verdict(*[both] * 22, *[excess] * 8) is Verdict.REGRESSION
    assert verdict(*[both] * 10, *[missing] * 10, *[excess] * 8) is Verdict.PASS
    assert verdict(*[both] * 22, *[missing] * 8, gate=0.6) is Verdict.PASS  # such a level may
    assert verdict(*[missing] * 30, gate=None) is Verdict.PASS
    assert verdict(*[neither] * 9) is Verdict.SKIPPED


def test_tool_calls() -> None:
    def of(*names: str) -> ChatAnswer:
        return said([7], 2, text="".join(f'{{"name": "{name}", "arguments": {{}}}}' for name in names))

    same, other, none = (pair(of("f"), one, tools=True) for one in (of("f"), of("g"), of()))
    found = behaviour._judge_calls([same] * 9 + [other], 0.9)
    assert (found.measured, found.verdict) == (0.9, Verdict.PASS)
    assert "9 of 10 calls name the reference's function, 9 with its arguments" in found.detail
    assert behaviour._judge_calls([same] * 5 + [none] * 5, 0.9).verdict is Verdict.REGRESSION
    assert behaviour._judge_calls([pair(of(), of("f"), tools=True)], 0.9).verdict is Verdict.SKIPPED
    assert behaviour._judge_calls([pair(of("f"), of())], 0.9).verdict is Verdict.SKIPPED
