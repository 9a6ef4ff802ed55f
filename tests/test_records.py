import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quantool.records import (
    Artifact,
    FileRecord,
    Finding,
    Gates,
    OutputPlan,
    PlannedFile,
    Report,
    Verdict,
    fingerprint,
    sha256_of,
)

FILE = FileRecord(name="m.gguf", bytes=3, sha256="ab")


def artifact(**changes: Any) -> Artifact:
    fields = {
        "output": "fake/Q8_0", "method": "fake", "level": "Q8_0", "folder": Path("x"), "files": (FILE, FILE),
        "bits_per_weight": 8.5, "seconds": 1.0,
    }  # fmt: skip
    return Artifact.model_validate({**fields, **changes})


def report(*verdicts: Verdict) -> Report:
    findings = tuple(
        Finding(check="c", metric="m", verdict=verdict, corpus=f"text{number}")
        for number, verdict in enumerate(verdicts)
    )
    return Report(artifact=artifact(), reference="r", findings=findings, seconds=1.0)


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ((), "SKIPPED"),
        (("SKIPPED", "SKIPPED"), "SKIPPED"),
        (("SKIPPED", "PASS"), "PASS"),
        (("PASS", "ANOMALOUS", "PASS"), "ANOMALOUS"),
        (("ANOMALOUS", "REGRESSION", "PASS"), "REGRESSION"),
    ],
)
def test_the_worst_finding_decides(verdicts: tuple[str, ...], together: str) -> None:
    assert report(*(Verdict(name) for name in verdicts)).verdict() is Verdict(together)


def test_what_must_not_be_published() -> None:
    assert [verdict.name for verdict in Verdict if verdict.fails] == ["REGRESSION", "ANOMALOUS"]


def test_finding_by_metric_and_corpus() -> None:
    made = report(Verdict.PASS, Verdict.REGRESSION)
    assert made.find("m") is made.findings[0]
    assert made.find("m", "text1") is made.findings[1]
    assert made.find("m", "text2") is None
    assert made.find("n") is None


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FILE.name = "n"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        FileRecord.model_validate({**FILE.model_dump(), "size": 3})


def test_size_of_an_artifact_counts_its_files_not_the_shared_ones() -> None:
    assert artifact(shared=(FILE,)).bytes() == 6


def test_a_report_survives_json() -> None:
    made = report(Verdict.PASS, Verdict.SKIPPED)
    assert Report.model_validate_json(made.model_dump_json()) == made


def test_gates_that_were_not_set_stay_unset_through_json() -> None:
    """Read back as None, an unset gate would be switched off."""
    gates = Gates(max_mean_kld=0.1, min_same_top_p=None)
    again = Gates.model_validate_json(gates.model_dump_json())
    assert again == gates
    assert again.model_fields_set == {"max_mean_kld", "min_same_top_p"}
    output = OutputPlan(
        id="a/b", method="a", level="b", options={}, engine="llama.cpp", repo="r", repo_id=None,
        files=(PlannedFile(name="f", bytes=1),), bits_per_weight=None, peak_ram=1, gates=gates,
    )  # fmt: skip
    assert (
        OutputPlan.model_validate_json(output.model_dump_json()).gates.model_fields_set
        == gates.model_fields_set
    )


@pytest.mark.parametrize("gates", [{"max_mean_kld": -1}, {"min_same_top_p": 1.1}, {"max_kld": 1}])
def test_impossible_gates(gates: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Gates.model_validate(gates)


def test_fingerprint_is_the_hash_of_the_canonical_json() -> None:
    text = json.dumps([{"a": 1, "b": [2, "c"]}], sort_keys=True)
    assert fingerprint({"b": [2, "c"], "a": 1}) == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprints_follow_every_value() -> None:
    kinds: list[Any] = [
        {"a": 1}, {"a": 2}, {"b": 1}, ["a", 1], "a", 1, None, True, FILE, Path("a/b"), {"x"}, (1, 2), [FILE],
    ]  # fmt: skip
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)
    assert fingerprint("a", "b") != fingerprint("ab")
    assert fingerprint(FILE) == fingerprint(FileRecord.model_validate(FILE.model_dump()))


def test_fingerprints_are_the_same_in_every_process() -> None:
    code = "from quantool.records import fingerprint as f; print(f({c for c in 'abcdefgh'}, {'x': frozenset('yz')}))"
    seeds = [{**os.environ, "PYTHONHASHSEED": seed} for seed in "1234"]
    runs = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        for env in seeds
    ]
    assert len({run.stdout for run in runs}) == 1


def test_nothing_without_a_json_form_gets_a_fingerprint() -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        fingerprint(object())


@pytest.mark.parametrize("size", [0, 5, 16, 17])
def test_sha256_of_a_file_read_in_chunks(tmp_path: Path, size: int) -> None:
    content = bytes(range(size))
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f", chunk=8) == hashlib.sha256(content).hexdigest()
