from pathlib import Path

import pytest

from quantool.formats.safetensors import some
from quantool.records import Verdict
from quantool.validation._findings.builder import FindingBuilder, without_folders

BUILD = FindingBuilder("c")


def test_a_fact_passes_without_a_problem() -> None:
    passed = BUILD.fact("m", 1, note="all")
    assert (passed.check, passed.verdict, passed.detail) == ("c", Verdict.PASS, "all")
    found = BUILD.fact("m", 1, "two", 2, note="more", corpus="en")
    assert (found.verdict, found.reference, found.corpus) == (Verdict.REGRESSION, 2, "en")
    assert found.detail == "two; more"
    assert BUILD.equal("m", [1], [1], "x").verdict is Verdict.PASS
    assert BUILD.equal("m", [1], [2], "x").detail == "x"
    assert BUILD.fail("m", "gone").verdict is Verdict.REGRESSION
    assert BUILD.skip("m", "why").detail == "why"


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("failed to load model from /home/me/out/x.gguf", "failed to load model from x.gguf"),
        ("/tmp/build-1/ggml/src/ggml.c:77: GGML_ASSERT(a / b == 0)", "ggml.c:77: GGML_ASSERT(a / b == 0)"),
        ("see https://huggingface.co/org/model/tree/main", "see https://huggingface.co/org/model/tree/main"),
        ("it says <b>x</b> and and/or", "it says <b>x</b> and and/or"),
        ("'/a/b/config.json' is missing", "'config.json' is missing"),
        ("/my own folder/x.gguf: bad magic", "x.gguf: bad magic"),
    ],
)
def test_folders_of_this_machine_are_left_out(text: str, cut: str) -> None:
    assert without_folders(text, Path("/my own folder")) == cut


def test_some() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdef"), 2) == "a, b and 4 more"
