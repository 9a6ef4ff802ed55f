"""A sentence hidden in long text: found by a model that copies, lost by a damaged one, and no verdict without a reference."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import induction
import making
import pytest
import tampering

from quantool import pipeline
from quantool.config.schema import Config
from quantool.errors import ConfigError
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Finding, Gates, Verdict
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.validation._tasks.needle_grid import compare
from quantool.validation._tasks.needle_worker import ANSWER, Haystack, Hidden, cells, holds

pytestmark = pytest.mark.e2e

QUIET = Progress(quiet=True)
GRID = {"lengths": [256, 768], "depths": [0.0, 0.5, 1.0]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return induction.write_induction(tmp_path_factory.mktemp("induction") / "model")


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    return tampering.convert(model, model.parent / "induction-BF16.gguf")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English without digits and equals signs: the model goes on from two characters that it saw before."""
    path = tmp_path_factory.mktemp("text") / "hay.txt"
    path.write_text(re.sub(r"[=\d]", "", (making.TEXT / "heldout.en.txt").read_text())[:500])
    return path


def config(folder: Path, text: Path, **settings: Any) -> Config:
    validation = {"corpora": [{"name": "hay", "path": str(text)}], "needle": {**GRID, **settings}}
    return Config.model_validate(
        {
            "model_id": str(folder),
            "method": "gguf",
            "quantization_config": making.QWEN2,
            "quant_level": "Q8_0",
            "device": "cpu",
            "output_path": str(text.parent / "out"),
            "validation": validation,
        }
    )


def case(artifact: Path, wanted: Config, workspace: Workspace) -> Case:
    source = resolve(wanted, weights=True, progress=QUIET)
    engine = "transformers" if artifact.is_dir() else "llama.cpp"
    return Case(artifact, engine, f"t/{artifact.name}", source, wanted, Gates(), workspace)


def judge(one: Case) -> Finding:
    (finding,) = find_check("needle").judge(one, QUIET)
    return finding


class Calls:
    """Runs workers in this process, which saves loading torch each time, and notes their engines."""

    def __init__(self) -> None:
        self.engines: list[str] = []

    def __call__(self, work: Work, request: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        self.engines.append(request["engine"])
        answer = work(json.loads(json.dumps(request)), lambda *_: None)
        found: dict[str, Any] = json.loads(json.dumps(answer))
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(process, "call", found)
    return found


def test_what_the_reference_finds_is_found_and_lost_by_a_damaged_file(
    model: Path, gguf: Path, text: Path, shared: Workspace, calls: Calls, tmp_path: Path
) -> None:
    found = judge(case(gguf, config(model, text), shared))
    assert (found.verdict, found.measured, found.reference) == (Verdict.PASS, 1, 1)
    lines = found.detail.splitlines()
    assert lines[0].startswith("finds 6 of 6 hidden sentences, the reference 6; 0 lost, 0 gained")
    assert [line.split() for line in lines[1:5]] == [
        ["depth", "256", "768"],
        ["0", "%", "both", "both"],
        ["50", "%", "both", "both"],
        ["100", "%", "both", "both"],
    ]
    assert "the text was too short and stands up to 2 times in a prompt" in lines[-1]
    assert calls.engines == ["transformers", "llama.cpp"]

    # As when a converter drops the rotary settings: neighbours are not told apart any more.
    wrong = tampering.tampered(gguf, tmp_path / "wrong-BF16.gguf", {"llama.rope.freq_base": 10000.0})
    found = judge(case(wrong, config(model, text), shared))
    assert (found.verdict, found.measured, found.reference) == (Verdict.REGRESSION, 0, 1)
    assert "6 lost, 0 gained: p = 0.016" in found.detail
    assert "lost beyond chance" in found.detail.splitlines()[0]
    assert "LOST" in found.detail
    assert "at 0 % of 256 tokens" in found.detail.splitlines()[-2]
    assert calls.engines == ["transformers", "llama.cpp", "llama.cpp"]

    assert judge(case(wrong, config(model, text), shared)) == found
    assert len(calls.engines) == 3  # all of it was kept
    text.write_text(text.read_text()[1:])
    judge(case(gguf, config(model, text), shared))
    assert calls.engines[3:] == ["transformers", "llama.cpp"]  # another text, other answers


def test_a_reference_that_finds_nothing_says_nothing(shared: Workspace, tmp_path: Path) -> None:
    """The tiny chat model is asked through its template, in a child; the artifact is not even looked at."""
    talk = making.TEXT / "heldout.chat.jsonl"
    wanted = config(making.TINY, making.TEXT / "heldout.en.txt", haystack=str(talk))
    wanted = wanted.model_copy(update={"output_path": tmp_path})
    found = judge(case(tmp_path / "absent.gguf", wanted, Workspace(tmp_path / "run")))
    assert found.verdict is Verdict.SKIPPED
    assert "the reference finds none of 6 hidden sentences, asked in chat form" in found.detail


def test_what_does_not_load_is_a_regression(
    model: Path, text: Path, shared: Workspace, tmp_path: Path, calls: Calls
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"what" * 100)
    found = judge(case(bad, config(model, text), shared))
    assert found.verdict is Verdict.REGRESSION
    assert "llama.cpp cannot load it" in found.detail


def test_without_a_section_it_says_that_it_did_not_run(gguf: Path, model: Path, shared: Workspace) -> None:
    plain = Config.model_validate({"model_id": str(model), "method": "gguf"})
    (finding,) = find_check("needle").judge(case(gguf, plain, shared), QUIET)
    assert finding.verdict is Verdict.SKIPPED
    assert finding.detail == "validation.needle is not configured"


# --- the verdict


def grids(before: str, after: str) -> tuple[list[Hidden], list[Hidden]]:
    """Cells found (x) or not (.) by reference and artifact."""
    empty = list(cells([1024, 4096], [0.0, 0.25, 0.5, 0.75, 1.0], 42))
    return tuple(  # type: ignore[return-value]
        [
            replace(cell, found=mark == "x", answer=f"{cell.value}." if mark == "x" else "I do not know.")
            for cell, mark in zip(empty, marks, strict=True)
        ]
        for marks in (before, after)
    )


@pytest.mark.parametrize(
    ("before", "after", "verdict", "words"),
    [
        ("xxxxxxxxxx", "xxxxx....x", Verdict.PASS, "4 lost, 0 gained"),
        ("xxxxxxxxxx", "xxxxx.....", Verdict.REGRESSION, "5 lost, 0 gained: p = 0.031"),
        ("xxxxxxxxx.", "xxxx.....x", Verdict.PASS, "5 lost, 1 gained: p = 0.11"),
        ("x.........", "xxxxxxxxxx", Verdict.PASS, "0 lost, 9 gained"),
        ("xxxxx.....", "xxxxx.....", Verdict.PASS, "0 lost, 0 gained: p = 1"),
    ],
)
def test_only_more_than_chance_fails(before: str, after: str, verdict: Verdict, words: str) -> None:
    found = compare(*grids(before, after))
    assert found.verdict is verdict
    assert words in found.detail


def test_finding_everything_where_the_reference_finds_little_is_an_anomaly() -> None:
    before, after = grids("x.........", "xxxxxxxxxx")
    more = [replace(cell, length=8192) for cell in before[1:]]
    everything = [replace(cell, found=True) for cell in more]
    assert compare([*before, *more], [*after, *everything]).verdict is Verdict.ANOMALOUS


def test_the_grid_shows_who_found_what() -> None:
    found = compare(*grids("xxx..xxxx.", "xx.x.xxxx."))
    rows = [line.split() for line in found.detail.splitlines()[1:7]]
    assert rows[0] == ["depth", "1024", "4096"]
    assert [row[-2:] for row in rows[1:]] == [
        ["both", "both"],
        ["both", "both"],
        ["LOST", "both"],
        ["gained", "both"],
        ["none", "none"],
    ]
    assert "at 50 % of 1024 tokens" in found.detail
    assert "'I do not know.'" in found.detail


# --- what is asked


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("482913", True),
        ("The code is 482,913.", True),
        ("482 913", True),
        ("4-8-2-9-1-3", True),
        ("Code QXZ = 482913.\n", True),
        ("482914", False),
        ("1482913", False),
        ("4829130", False),
        ("I cannot find it.", False),
        ("", False),
    ],
)
def test_an_answer_holds_the_code_or_not(answer: str, found: bool) -> None:
    assert holds(answer, "482913") is found


def test_every_cell_has_a_code_of_its_own_from_the_seed() -> None:
    one, same, other = (list(cells([256, 512], [0.0, 1.0], seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert len({cell.value for cell in one}) == len({cell.name for cell in one}) == 4
    assert all(len(set(cell.value)) == len(cell.value) == 6 for cell in one)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("length", [160, 700])
def test_a_prompt_fills_its_length_and_hides_the_sentence_at_its_depth(chat: bool, length: int) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(making.TINY)
    text = (making.TEXT / "heldout.en.txt").read_text()[:900]
    for depth in (0.0, 0.3, 1.0):
        cell = Hidden(length, depth, "QXZ", "482913", 1)
        ids, repeats = Haystack(tokenizer, text, chat).prompt(cell)
        assert length - ANSWER - 16 <= len(ids) <= length - ANSWER
        said = tokenizer.decode(ids)
        before, _, after = said.partition("\nCode QXZ = 482913.\n")
        question = "Code QXZ = ?" if chat else "Code QXZ ="
        ending = "<|im_end|>\n<|im_start|>assistant\n" if chat else ""
        assert after.endswith(question + ending)
        head = before.rpartition("<|im_start|>user\n")[2]
        rest = after[: -len(question + ending)].strip()
        assert len(head) / (len(head) + len(rest)) == pytest.approx(depth, abs=0.05)
        assert (repeats > 1) is (length == 700)


def test_a_length_without_room_is_refused() -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(making.TINY)
    with pytest.raises(ConfigError, match="70 tokens have no room"):
        Haystack(tokenizer, "some text " * 50, chat=True).prompt(Hidden(70, 0.5, "QXZ", "482913", 1))


# --- refused early


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lengths": [256, 4096]},
            r"validation\.needle\.lengths: 4096 tokens, but .* reads no more than 2048",
        ),
        ({"lengths": [256, 256], "depths": [0, 0.5, 1]}, "has 3 cells"),
        ({"haystack": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_could_not_be_asked_is_refused_by_the_plan(
    text: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline.plan(config(making.TINY, text, **settings), QUIET)


@pytest.mark.parametrize("settings", [{"depths": [1.2]}, {"lengths": [64]}, {"lengths": []}])
def test_values_out_of_range_are_refused_by_the_configuration(text: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needle"):
        config(making.TINY, text, **settings)
