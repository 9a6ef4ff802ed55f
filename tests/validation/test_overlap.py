import json
import time
from pathlib import Path
from typing import Any

import pytest

from quantool.config.schema import Config
from quantool.plugins.contract import Case
from quantool.plugins.find import find_check
from quantool.records import Finding, Gates, OutputPlan, Source, Verdict
from quantool.runtime import process
from quantool.runtime.progress import Progress
from quantool.runtime.worker import Work
from quantool.runtime.workspace import Workspace
from quantool.source.resolve import resolve
from quantool.texts import readers
from quantool.texts.corpus import Document
from quantool.validation import overlap
from tests.checkpoint import write_checkpoint

CHECK = find_check("overlap")
QUIET = Progress(quiet=True)
HELD_OUT = [
    f"The {number}th held-out sentence has words that no other one has, such as {number**3}."
    for number in range(40)
]
OTHER = [
    f"Calibration line {number} talks of something else: {number**2} things, in a row of its own."
    for number in range(60)
]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    config = Config(model_id=str(write_checkpoint(tmp_path / "model")), method="gguf")
    return resolve(config, weights=True, progress=QUIET)


def judged(
    tmp_path: Path, source: Source, calibrated: str | None, evaluated: dict[str, str], **keys: Any
) -> dict[str, Finding]:
    """The findings by corpus; a name that ends in .jsonl makes that kind of file."""
    corpora = []
    for name, text in evaluated.items():
        (tmp_path / name).write_text(text)
        corpora.append({"name": name.partition(".")[0], "path": str(tmp_path / name)})
    if calibrated is not None:
        (tmp_path / "calibration.txt").write_text(calibrated)
        keys["dataset_path"] = str(tmp_path / "calibration.txt")
    return judge(tmp_path, source, {"validation": {"corpora": corpora}} | keys)


def judge(
    tmp_path: Path, source: Source, keys: dict[str, Any], output: OutputPlan | None = None
) -> dict[str, Finding]:
    config = Config.model_validate({"model_id": str(source.folder), "method": "gguf"} | keys)
    case = Case(
        tmp_path / "m.gguf", "llama.cpp", "t/m", source, config, Gates(), Workspace(tmp_path / "run"), output
    )
    return {finding.corpus or "": finding for finding in CHECK.judge(case, QUIET)}


def test_common_text_is_measured_and_shown(tmp_path: Path, source: Source) -> None:
    calibrated = "\n".join([*OTHER, *HELD_OUT[:10]])
    mixed = "\n".join(HELD_OUT[5:])
    found = judged(
        tmp_path,
        source,
        calibrated,
        {"apart.txt": "\n".join(f"{line} Indeed!" for line in OTHER[:1]) + " x " * 30, "mixed.txt": mixed},
    )
    mixed_finding = found["mixed"]
    assert mixed_finding.verdict is Verdict.PASS
    # 5 of 35 sentences of 15 words.
    assert mixed_finding.measured == pytest.approx((15 * 5 - 12) / (15 * 35 - 12))
    assert "the 5th held out sentence has words that no other one has such" in mixed_finding.detail
    assert "a little better" in mixed_finding.detail


def test_nothing_in_common_is_said_so(tmp_path: Path, source: Source) -> None:
    (finding,) = judged(tmp_path, source, "\n".join(OTHER), {"en.txt": "\n".join(HELD_OUT)}).values()
    assert (finding.verdict, finding.measured) == (Verdict.PASS, 0)
    assert finding.detail.startswith("0.00 % of 588 sequences of 13 words of en")


def test_a_text_that_was_mostly_calibrated_on_fails(tmp_path: Path, source: Source) -> None:
    shouted = "\n".join(HELD_OUT).upper().replace(",", " -- ")
    (finding,) = judged(tmp_path, source, shouted, {"en.txt": "\n".join(HELD_OUT)}).values()
    assert (finding.verdict, finding.measured) == (Verdict.ANOMALOUS, 1)
    assert "no held-out figures" in finding.detail


def test_conversations_and_scripts_without_spaces_count(tmp_path: Path, source: Source) -> None:
    japanese = "これは評価用の文章であり、校正用の文章にも現れます。"
    asked = {"role": "user", "content": [{"type": "text", "text": japanese}]}
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"text": HELD_OUT[3]}}}],
    }
    chat = "\n".join(json.dumps({"messages": messages}) for messages in ([asked], [called]))
    found = judged(tmp_path, source, f"{japanese}\n{HELD_OUT[3]}", {"chat.jsonl": chat})
    assert float(found["chat"].measured or 0) > 0.5
    assert found["chat"].verdict is Verdict.ANOMALOUS


def test_without_calibration_text_it_is_skipped(tmp_path: Path, source: Source) -> None:
    (finding,) = judged(tmp_path, source, None, {"en.txt": "some words"}).values()
    assert finding.verdict is Verdict.SKIPPED
    assert "names no calibration text" in finding.detail
    plan = OutputPlan(
        id="gguf/Q8_0", method="gguf", level="Q8_0", options={}, engine="llama.cpp", repo="r", repo_id=None, files=(),
        bits_per_weight=None, peak_ram=0, gates=Gates(), needs=("base",),
    )  # fmt: skip
    keys = {"dataset_path": str(tmp_path / "en.txt")}
    (finding,) = judge(tmp_path, source, keys, plan).values()
    assert finding.verdict is Verdict.SKIPPED
    assert "without an importance matrix" in finding.detail
    (finding,) = judged(tmp_path, source, "few words", {"short.txt": "too short a text"}).values()
    assert (finding.verdict, finding.measured) == (Verdict.PASS, 0)


def test_the_built_in_text_on_both_sides_is_said_and_kept(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(work: Work, request: Any, **_: Any) -> Any:
        assert work is overlap.find
        return json.loads(json.dumps(overlap.find(request, lambda *_: None)))

    files = readers._documented_files(None)[:20]
    monkeypatch.setattr(readers, "_documented_files", lambda _: files)
    monkeypatch.setattr(process, "call", here)
    keys = {"dataset_id": "python-docs", "sample_size": 100000, "validation": {"max_tokens": 4096}}
    (finding,) = judge(tmp_path, source, keys).values()
    assert finding.verdict is Verdict.PASS
    assert finding.measured == 1
    assert "both are python-docs" in finding.detail

    def call(*_: Any, **__: Any) -> Any:
        raise AssertionError("compared again")

    monkeypatch.setattr(process, "call", call)
    assert judge(tmp_path, source, keys) == {"python-docs": finding}
    with pytest.raises(AssertionError, match="compared again"):
        judge(tmp_path, source, keys | {"sample_size": 5})


def test_many_words_take_seconds() -> None:
    words = [f"word{number % 50021}" for number in range(300_000)]
    document = Document(text=" ".join(words))
    started = time.process_time()
    hashes, _ = overlap.sequences([document])
    assert overlap.overlap([document], hashes).share == 1
    assert time.process_time() - started < 10
    assert len(set(hashes.tolist())) == 50021


def test_no_sequence_reaches_over_the_end_of_a_document() -> None:
    known, _ = overlap.sequences([Document(text=" ".join(HELD_OUT[:2]))])
    apart = [
        Document(text=" ".join(HELD_OUT[0].split()[:10])),
        Document(text=" ".join(HELD_OUT[0].split()[10:])),
    ]
    assert overlap.overlap(apart, known).sequences == 0
