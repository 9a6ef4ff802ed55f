"""The Modelfile for Ollama and what the card says about it: by what was found, and nothing where nobody looked."""

from __future__ import annotations

from pathlib import Path

import making
import pytest

from quantool.card.modelfile import modelfile, ollama
from quantool.records import Finding, Report, Verdict

SAMPLING = {"temperature": 0.2, "top_k": 40, "repetition_penalty": 1.1}
NAME = "tiny-chat-GGUF"


@pytest.fixture
def made(tmp_path: Path, plugin: Path) -> making.Made:
    del plugin
    return making.recorded(tmp_path / "out")


def report(made: making.Made, *findings: tuple[str, Verdict, str | None]) -> Report:
    loads = Finding(check="perplexity", metric="loads", verdict=Verdict.PASS)
    found = [
        Finding(check="ollama", metric=metric, verdict=verdict, measured=measured)
        for metric, verdict, measured in findings
    ]
    return Report(artifact=made.artifacts[0], reference="bf16", findings=(loads, *found), seconds=1.0)


def test_equal_conversations_make_a_modelfile(made: making.Made) -> None:
    reports = [report(made, ("conversations", Verdict.PASS, "9 of 9"), ("tools", Verdict.PASS, "5 of 5"))]
    file = made.artifacts[0].files[0].name
    text = modelfile(reports, SAMPLING, 2048)
    assert text == (
        f"FROM ./{file}\nPARAMETER num_ctx 2048\nPARAMETER temperature 0.2\nPARAMETER top_k 40\n"
        "PARAMETER repeat_penalty 1.1\n"
    )
    card = ollama(NAME, reports, SAMPLING, 2048)
    assert "ollama create tiny-chat-gguf -f Modelfile\nollama run tiny-chat-gguf\n" in card
    assert text in card
    assert "started with `OLLAMA_GO_TEMPLATE=0`" in card
    assert "llama-server" not in card


def test_tools_that_come_out_otherwise_are_said(made: making.Made) -> None:
    found = ("conversations", Verdict.PASS, "9 of 9"), ("tools", Verdict.SKIPPED, "1 of 5")
    card = ollama(NAME, [report(made, *found)], SAMPLING, 2048)
    assert "For tool calls use llama-server" in card
    assert "1 of 5 came out as the model's own template has them" in card


def test_other_conversations_make_none(made: making.Made) -> None:
    reports = [report(made, ("conversations", Verdict.SKIPPED, "3 of 9"))]
    assert modelfile(reports, SAMPLING, 2048) is None
    assert ollama(NAME, reports, SAMPLING, 2048).startswith(
        "Ollama is not recommended: of the conversations that were tried, 3 of 9"
    )


def test_what_nobody_looked_at_is_not_spoken_of(made: making.Made) -> None:
    for reports in ([], [report(made)], [report(made, ("conversations", Verdict.SKIPPED, None))]):
        assert modelfile(reports, SAMPLING, 2048) is None
        assert ollama(NAME, reports, SAMPLING, 2048) == ""


def test_a_file_in_parts_has_none(made: making.Made) -> None:
    single = report(made, ("conversations", Verdict.PASS, "9 of 9"))
    files = tuple(
        single.artifact.files[0].model_copy(update={"name": f"m-0000{n}-of-00002.gguf"}) for n in (1, 2)
    )
    parts = single.model_copy(update={"artifact": single.artifact.model_copy(update={"files": files})})
    assert modelfile([parts], SAMPLING, 2048) is None


def test_an_adapter_beside_the_file_is_named(made: making.Made) -> None:
    merged = report(made, ("conversations", Verdict.PASS, "9 of 9"))
    beside = merged.artifact.files[0].model_copy(update={"name": "tuned-lora.gguf"})
    apart = merged.model_copy(update={"artifact": merged.artifact.model_copy(update={"shared": (beside,)})})
    text = modelfile([apart], SAMPLING, 2048)
    assert text is not None
    assert text.splitlines()[1] == "ADAPTER ./tuned-lora.gguf"
    assert "ADAPTER" not in (modelfile([merged], SAMPLING, 2048) or "")
