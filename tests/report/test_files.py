import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from quantool import gates, pipeline
from quantool.config.load import load
from quantool.plugins import find
from quantool.plugins.contract import Check
from quantool.records import Artifact, FileRecord, Finding, Report, Verdict, sha256_of
from quantool.report.files import as_junit, as_markdown, as_record, verdict_of, write_report
from quantool.runtime.progress import Progress

QUIET = Progress(quiet=True)
PASSED = Finding(check="perplexity", metric="mean_kld", verdict=Verdict.PASS, corpus="en", measured=0.01,
                 error=0.002, threshold=0.055, detail="fine")  # fmt: skip
FAILED = Finding(check="perplexity", metric="mean_kld", verdict=Verdict.REGRESSION, corpus="eu", measured=0.0712,
                 reference=0.0, error=0.002, threshold=0.055, detail="beyond the limit\nsecond line")  # fmt: skip
BETTER = Finding(check="perplexity", metric="ln_ppl_ratio", verdict=Verdict.ANOMALOUS, measured=-0.2)
SKIPPED = Finding(check="chat_template", metric="ids", verdict=Verdict.SKIPPED, detail="a base model")


def report(*findings: Finding, level: str = "Q4_K_M") -> Report:
    artifact = Artifact(
        output=f"gguf/{level}", method="gguf", level=level, folder=Path("out"), bits_per_weight=4.8, seconds=1,
        files=(FileRecord(name=f"m-{level}.gguf", bytes=7, sha256="ab" * 32),),
    )  # fmt: skip
    return Report(artifact=artifact, reference="org/m", findings=findings, seconds=1.5)


def junit(*reports: Report) -> ET.Element:
    return parsed(as_junit(reports, {}))


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 - our own


def test_what_was_done_to_the_reference_is_said_once() -> None:
    made = report(PASSED).model_copy(update={"prepared": "quantized again from FP8"})
    text = as_markdown([made, made], {}, {})
    assert text.count("Quantized again from FP8.") == 1
    assert "gain from" not in as_markdown([report(PASSED)], {}, {})


# ---- JUnit


def test_a_suite_for_each_artifact_and_a_case_for_each_finding() -> None:
    root = junit(report(PASSED, FAILED, SKIPPED), report(PASSED, BETTER, level="Q8_0"))
    assert root.tag == "testsuites"
    counts = ("name", "tests", "failures", "skipped", "errors", "time")
    assert [root.get(name) for name in counts] == ["quantool", "5", "2", "1", "0", "3.000"]
    assert [[suite.get(name) for name in counts] for suite in root] == [
        ["gguf/Q4_K_M", "3", "1", "1", "0", "1.500"],
        ["gguf/Q8_0", "2", "1", "0", "0", "1.500"],
    ]
    cases = [(case.get("classname"), case.get("name")) for case in root[0].iter("testcase")]
    assert cases == [
        ("gguf.Q4_K_M.perplexity", "mean_kld [en]"),
        ("gguf.Q4_K_M.perplexity", "mean_kld [eu]"),
        ("gguf.Q4_K_M.chat_template", "ids"),
    ]


def test_failures_say_what_was_measured() -> None:
    first, second = junit(report(FAILED, BETTER)).iter("failure")
    assert first.attrib == {"message": "REGRESSION: beyond the limit", "type": "REGRESSION"}
    assert first.text == (
        "measured: 0.0712\nstandard error: 0.002\nreference: 0\nthreshold: 0.055\nbeyond the limit\nsecond line"
    )
    assert second.attrib == {"message": "ANOMALOUS: ln_ppl_ratio -0.2", "type": "ANOMALOUS"}


def test_what_was_skipped_says_why() -> None:
    silent = SKIPPED.model_copy(update={"detail": ""})
    reasons = [found.get("message") for found in junit(report(PASSED, SKIPPED, silent)).iter("skipped")]
    assert reasons == ["a base model", "no reason was given"]


def test_same_names_are_told_apart() -> None:
    """GitLab takes two cases of one name for one test."""
    names = [case.get("name") for case in junit(report(PASSED, PASSED, SKIPPED, PASSED)).iter("testcase")]
    assert names == ["mean_kld [en]", "mean_kld [en] (2)", "ids", "mean_kld [en] (3)"]


@pytest.mark.parametrize("findings", [(), (SKIPPED,)])
def test_what_nothing_could_judge_is_not_green(findings: tuple[Finding, ...]) -> None:
    root = junit(report(*findings))
    assert root.get("failures") == "1"
    assert [found.get("message") for found in root.iter("failure")] == ["nothing could be judged"]


@pytest.mark.parametrize("verdict", [Verdict.REGRESSION, Verdict.SKIPPED, Verdict.PASS])
def test_any_text_is_legal_xml(verdict: Verdict) -> None:
    detail = "<s> & \"x\" ]]> \x00\x1b[0m \ud800 \ufffe 😀 'é'"
    (case,) = junit(report(SKIPPED.model_copy(update={"verdict": verdict, "detail": detail})))[0].findall(
        "testcase[@name='ids']"
    )
    told = (case[0].get("message") or "") + (case[0].text or "")
    assert "<s> & \"x\" ]]> \\x00\\x1b[0m \\ud800 \\ufffe 😀 'é'" in told


def test_seconds_of_a_check_are_those_of_its_findings_together() -> None:
    timed = report(PASSED, FAILED, SKIPPED).model_copy(
        update={"check_seconds": {"perplexity": 1.0, "chat_template": 0.5}}
    )
    root = junit(timed)
    assert [case.get("time") for case in root.iter("testcase")] == ["0.500", "0.500", "0.500"]
    assert root[0].get("time") == "1.500"


def test_a_check_that_did_not_run_is_skipped_with_the_reason() -> None:
    root = parsed(as_junit([report(PASSED)], {"needle": "validation.needle is not set"}))
    assert (root.get("tests"), root.get("skipped")) == ("2", "1")
    (case,) = root[0].findall("testcase[@name='did not run']")
    assert case.get("classname") == "gguf.Q4_K_M.needle"
    assert [found.get("message") for found in case] == ["validation.needle is not set"]


def test_a_count_stands_in_full() -> None:
    counted = PASSED.model_copy(update={"measured": 5245184.0})
    told = junit(report(counted)).findtext(".//system-out")
    assert told is not None
    assert told.startswith("measured: 5245184\n")


# ---- JSON and Markdown


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([(PASSED,), (PASSED, SKIPPED)], "PASS"),
        ([(PASSED,), (SKIPPED,)], "SKIPPED"),
        ([(BETTER,), (SKIPPED,)], "ANOMALOUS"),
        ([(BETTER,), (FAILED,)], "REGRESSION"),
        ([], "SKIPPED"),
    ],
)
def test_the_worst_verdict_is_that_of_all(findings: list[tuple[Finding, ...]], verdict: str) -> None:
    assert verdict_of([report(*found) for found in findings]) == verdict


def test_the_record_can_be_read_back() -> None:
    made = report(PASSED, FAILED)
    record = json.loads(json.dumps(as_record([made], ["m/plots/corpora.png"])))
    assert (record["verdict"], record["plots"]) == ("REGRESSION", ["m/plots/corpora.png"])
    (entry,) = record["reports"]
    assert entry.pop("verdict") == "REGRESSION"
    assert Report.model_validate(entry) == made


def test_failures_stand_verbatim_in_the_page() -> None:
    fenced = FAILED.model_copy(update={"detail": "expected\n```\n<s> {{ x }}\n```"})
    text = as_markdown([report(PASSED, fenced)], {}, {})
    assert text.startswith("# quantool: REGRESSION\n")
    block = text.partition("````text\n")[2].partition("\n````\n")[0]
    assert block.startswith(
        "Q4_K_M: REGRESSION in perplexity: mean_kld 0.0712 ± 0.0020 on eu, limit 0.055\n\n"
    )
    assert block.endswith("```\n<s> {{ x }}\n```")
    assert "What failed" not in as_markdown([report(PASSED)], {}, {})


def test_the_page_shows_the_plots_where_they_lie() -> None:
    text = as_markdown(
        [report(PASSED)], {"my model/": ("plots/corpora.png",), "": ("plots/size-kld.png",)}, {}
    )
    assert "](my%20model/plots/corpora.png)" in text
    assert "](plots/size-kld.png)" in text


# ---- the files


def test_same_files_are_not_touched(tmp_path: Path) -> None:
    write_report([report(PASSED)], tmp_path, [], {})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {"report.json", "report.md", "junit.xml"}
    write_report([report(PASSED)], tmp_path, [], {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    write_report([report(FAILED)], tmp_path, [], {})
    assert all(path.stat().st_mtime_ns != stamp for path, stamp in before.items())


def test_a_run_leaves_its_verdict(tmp_path: Path, config_file: Callable[..., Path]) -> None:
    job = load(config_file(only="Q8_0", divergence=0.01), (), find).config
    pipeline.run(job, QUIET)
    out = tmp_path / "out"
    record = json.loads((out / "report.json").read_text())
    assert record["verdict"] == "REGRESSION"
    assert record["plots"] == ["model-FAKE/plots/size-kld.png", "model-FAKE/plots/corpora.png"]
    assert all((out / name).is_file() for name in record["plots"])
    assert {entry["artifact"]["folder"] for entry in record["reports"]} == {"model-FAKE"}
    assert "](model-FAKE/plots/size-kld.png)" in (out / "report.md").read_text()
    root = parsed((out / "junit.xml").read_text())
    assert [(suite.get("name"), suite.get("failures")) for suite in root] == [
        ("fake/Q8_0", "1"),
        ("fake/Q4_K_M", "0"),
    ]


def test_a_second_run_changes_no_byte(tmp_path: Path, config_file: Callable[..., Path]) -> None:
    job = load(config_file(), (), find).config

    def ran() -> dict[Path, bytes]:
        pipeline.run(job, QUIET)
        state = {
            "lock",
            "plan.json",
            "order.json",
            "marks",
        }  # process, free disk, time left and times of the moment
        files = [
            path for path in (tmp_path / "out").rglob("*") if path.is_file() and not state & {*path.parts}
        ]
        return {path: path.read_bytes() for path in files}

    assert ran() == ran()


def test_judging_one_artifact_leaves_the_same_files(
    tmp_path: Path, config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load(config_file(), (), find).config
    theirs = tmp_path / "theirs.gguf"
    theirs.write_text("0.5\n")
    artifact = Artifact(
        output="given/Q8_0", method="given", level="Q8_0", folder=tmp_path, bits_per_weight=8, seconds=0,
        files=(FileRecord(name=theirs.name, bytes=4, sha256=sha256_of(theirs)),),
    )  # fmt: skip
    monkeypatch.setattr(
        "quantool.plugins.find.find_check", lambda _: Check("two", "", lambda *_: [PASSED, FAILED])
    )
    limits = [gates.default_gates("Q8_0")]
    pipeline.validate([artifact], "llama.cpp", job, limits, QUIET)
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text())["plots"] == ["plots/corpora.png"]
    assert "](plots/corpora.png)" in (out / "report.md").read_text()
    assert (out / "plots" / "corpora.png").is_file()
    assert [suite.get("name") for suite in parsed((out / "junit.xml").read_text())] == ["given/Q8_0"]
