import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantool import gates, pipeline
from quantool.config.load import load
from quantool.config.schema import Config
from quantool.errors import (
    ConfigError,
    DependencyError,
    PublicationError,
    QuantizationError,
    SourceError,
)
from quantool.pipeline import RunResult
from quantool.plugins import find
from quantool.plugins.contract import Case, Check
from quantool.plugins.find import find_check
from quantool.plugins.keys import Depends
from quantool.publish.packed_folder import outgoing_files, read_packed_folder, require_publishable
from quantool.records import Artifact, FileRecord, Finding, Plan, Report, Verdict, sha256_of
from quantool.run import judging
from quantool.runtime.progress import Progress
from tests.checkpoint import tensors

Write = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("plugin")

ALL = ["made Q8_0", "made Q4_K_M", "judged fake/Q8_0", "judged fake/Q4_K_M"]


def run(path: Path, *overrides: str) -> RunResult:
    return pipeline.run(load(path, overrides, find).config, Progress(quiet=True))


def done(folder: Path) -> list[str]:
    """What was really done since the last time."""
    note = folder / "out" / "done.txt"
    lines = note.read_text().splitlines() if note.is_file() else []
    note.unlink(missing_ok=True)
    return lines


def test_a_run_ends_with_a_folder_to_publish(tmp_path: Path, config_file: Write) -> None:
    outcome = run(config_file())
    assert done(tmp_path) == ALL
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        ".quantool", "junit.xml", "logs", "model-FAKE", "plan.json", "records", "report.json", "report.md",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "model-FAKE").iterdir()) == [
        "README.md", "SHA256SUMS", "model-Q4_K_M.gguf", "model-Q8_0.gguf", "plots", "provenance.json", "quantool.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "records").iterdir()) == [
        "fake-Q4_K_M.artifact.json", "fake-Q4_K_M.report.json",
        "fake-Q8_0.artifact.json", "fake-Q8_0.report.json",
    ]  # fmt: skip
    assert outcome.failed == ()
    assert Plan.model_validate_json((out / "plan.json").read_text()) == outcome.plan
    kept = Report.model_validate_json((out / "records" / "fake-Q8_0.report.json").read_text())
    assert kept == outcome.reports[0]


def test_numbers_belong_to_the_bytes_that_are_published(tmp_path: Path, config_file: Write) -> None:
    for report in run(config_file()).reports:
        (file,) = report.artifact.files
        assert file.sha256 == sha256_of(report.artifact.folder / file.name)
        finding = report.find("mean_kld", "text")
        assert finding is not None
        assert finding.measured == float((report.artifact.folder / file.name).read_text())


def test_weights_are_hashed_and_looked_at(tmp_path: Path, config_file: Write) -> None:
    source = run(config_file()).plan.source
    weights = next(file for file in source.files if file.name == "model.safetensors")
    assert weights.sha256 == sha256_of(tmp_path / "model" / "model.safetensors")
    assert source.max_abs == max(float(np.abs(tensor).max()) for tensor in tensors().values())


def test_a_second_run_does_nothing_again(tmp_path: Path, config_file: Write) -> None:
    path = config_file()
    first = run(path)
    done(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "model-FAKE").glob("*.gguf")}
    second = run(path)
    assert done(tmp_path) == []
    assert second.reports == first.reports
    assert {file: file.stat().st_mtime_ns for file in before} == before
    planned, machine = pipeline.plan_here(load(path, (), find).config, Progress(quiet=True))
    assert machine.done == ("download", "scan", "fake/Q8_0", "fake/Q4_K_M")
    assert machine.peak_disk == 0
    assert planned == second.plan == first.plan


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"only": "Q4_K_M", "divergence": 0.002}, ["made Q4_K_M", "judged fake/Q4_K_M"]),
        ({"levels": ("Q8_0",)}, []),
        ({"divergence": 0.0002}, ALL),
    ],
)
def test_only_what_changed_is_done_again(
    tmp_path: Path, config_file: Write, change: dict[str, object], again: list[str]
) -> None:
    run(config_file(only="none"))
    done(tmp_path)
    first = {"only": "none"} if "levels" in change else {}
    run(config_file(**{**first, **change}))
    assert done(tmp_path) == again


@pytest.mark.parametrize(("change", "kept"), [({}, True), ({"divergence": 0.0002}, False)])
def test_new_files_are_not_judged_by_the_hashes_of_old_ones(
    tmp_path: Path,
    config_file: Write,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    kept: bool,
) -> None:
    run(config_file())
    judge = judging.judge
    seen: list[bool] = []

    def watched(
        cases: Sequence[Case], artifacts: Sequence[Artifact], progress: Progress
    ) -> tuple[Report, ...]:
        seen.extend((artifact.folder / "SHA256SUMS").is_file() for artifact in artifacts)
        return judge(cases, artifacts, progress)

    monkeypatch.setattr(judging, "judge", watched)
    run(config_file(**change))
    assert seen == [kept, kept]
    assert (tmp_path / "out" / "model-FAKE" / "SHA256SUMS").is_file()


def test_another_repository_gets_what_was_made_for_the_first(tmp_path: Path, config_file: Write) -> None:
    path = config_file(("Q8_0",))
    first = run(path)
    done(tmp_path)
    second = run(path, "repo_id=us/other")
    assert done(tmp_path) == []
    assert [report.artifact.folder for report in second.reports] == [tmp_path / "out" / "other"]
    assert (tmp_path / "out" / "other" / "model-Q8_0.gguf").read_text() == "0.0001\n"
    publishable(tmp_path / "out" / "other")
    assert second.reports[0].findings == first.reports[0].findings


def test_a_new_level_is_all_that_is_made(tmp_path: Path, config_file: Write) -> None:
    run(config_file(("Q8_0",)))
    done(tmp_path)
    run(config_file())
    assert done(tmp_path) == ["made Q4_K_M", "judged fake/Q4_K_M"]


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("validation.gates.Q8_0.max_mean_kld=0.5", ["judged fake/Q8_0"]),
        ("validation.max_tokens=1024", ["judged fake/Q8_0", "judged fake/Q4_K_M"]),
        ("seed=3", []),
    ],
)
def test_what_the_checks_depend_on_is_judged_again(
    tmp_path: Path, config_file: Write, override: str, again: list[str]
) -> None:
    path = config_file()
    run(path)
    done(tmp_path)
    run(path, override)
    assert done(tmp_path) == again


def test_a_check_that_declares_nothing_depends_on_everything(
    tmp_path: Path, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    undeclared = replace(find_check("fakecheck"), depends=None)
    monkeypatch.setattr("quantool.plugins.find.find_check", lambda _name: undeclared)
    path = config_file(("Q8_0",))
    run(path)
    done(tmp_path)
    run(path)
    assert done(tmp_path) == []
    run(path, "seed=3")
    assert done(tmp_path) == ["judged fake/Q8_0"]
    run(path, "seed=3", "private=false")
    assert done(tmp_path) == []


def test_checks_are_kept_one_by_one(
    tmp_path: Path, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate of one check, or a check more, does not do the others again."""
    first = find_check("fakecheck")

    def noted(case: Case, progress: Progress) -> list[Finding]:
        with (case.workspace.root / "done.txt").open("a") as note:
            note.write("second\n")
        return [Finding(check="second", metric="m", verdict=Verdict.PASS)]

    second = Check("second", "", noted, depends=Depends(fields=("seed",)))
    monkeypatch.setattr(
        "quantool.plugins.find.find_check", {"fakecheck": first, "second": second}.__getitem__
    )
    path = config_file(("Q8_0",))
    config = load(path, (), find).config

    def judged(**keys: object) -> list[str]:
        settings = config.validation.model_copy(update={"checks": ("fakecheck", "second")})
        pipeline.run(config.model_copy(update={"validation": settings, **keys}), Progress(quiet=True))
        return done(tmp_path)

    run(path)
    assert done(tmp_path) == ["made Q8_0", "judged fake/Q8_0"]
    assert judged() == ["second"]
    assert judged(seed=3) == ["second"]
    (tmp_path / "held-out.txt").write_text("Other text to measure on.\n")
    assert judged(seed=3) == ["judged fake/Q8_0"]


def test_another_text_is_judged_again(tmp_path: Path, config_file: Write) -> None:
    path = config_file()
    run(path)
    done(tmp_path)
    (tmp_path / "held-out.txt").write_text("Other text to measure on.\n")
    run(path)
    assert done(tmp_path) == ["judged fake/Q8_0", "judged fake/Q4_K_M"]


def test_a_text_that_may_have_changed_unseen_is_judged_again(
    tmp_path: Path, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set on the Hub has no identity."""
    path = config_file(("Q8_0",))
    run(path)
    done(tmp_path)
    monkeypatch.setattr("quantool.texts.corpus.identity", lambda _corpus: None)
    run(path)
    run(path)
    assert done(tmp_path) == ["judged fake/Q8_0"] * 2


def test_a_file_that_somebody_touched_is_made_again(tmp_path: Path, config_file: Write) -> None:
    path = config_file()
    run(path)
    done(tmp_path)
    (tmp_path / "out" / "model-FAKE" / "model-Q8_0.gguf").write_text("0.00012\n")
    run(path)
    assert done(tmp_path) == ["made Q8_0", "judged fake/Q8_0"]


def same_time(path: Path, content: bytes) -> None:
    """Change bytes so that size and modification time tell nothing."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def publishable(folder: Path) -> None:
    packed = read_packed_folder(folder)
    require_publishable(packed, allow_regression=False)
    outgoing_files(packed, Progress(quiet=True), hash_large=True)


def test_a_byte_that_flipped_unseen_is_found_by_rehashing(tmp_path: Path, config_file: Write) -> None:
    """T10: publish refuses such a file and says what to do; that must help."""
    path = config_file()
    config = load(path, (), find).config
    first = run(path)
    done(tmp_path)
    file = tmp_path / "out" / "model-FAKE" / "model-Q8_0.gguf"
    same_time(file, b"0.0002\n")
    run(path)
    assert done(tmp_path) == []
    with pytest.raises(PublicationError, match=r"model-Q8_0\.gguf") as refused:
        publishable(file.parent)
    assert "--rehash" in refused.value.hint
    result = pipeline.run(config, Progress(quiet=True), rehash=True)
    assert done(tmp_path) == ["made Q8_0", "judged fake/Q8_0"]
    assert [report.artifact.files for report in result.reports] == [
        report.artifact.files for report in first.reports
    ]
    publishable(file.parent)


def test_a_byte_of_the_checkpoint_that_flipped_unseen_is_found_by_rehashing(
    tmp_path: Path, config_file: Write
) -> None:
    path = config_file()
    config = load(path, (), find).config
    before = run(path).plan.source
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    same_time(weights, bytes(content))
    assert run(path).plan.source == before
    after = pipeline.run(config, Progress(quiet=True), rehash=True).plan.source
    assert [file.sha256 for file in after.files if file.name == weights.name] == [sha256_of(weights)]


def test_another_checkpoint_is_another_run(tmp_path: Path, config_file: Write) -> None:
    path = config_file()
    run(path)
    done(tmp_path)
    save_file(
        {name: 2 * tensor for name, tensor in tensors().items()}, tmp_path / "model" / "model.safetensors"
    )
    outcome = run(path)
    assert done(tmp_path) == [
        "judged fake/Q8_0",
        "judged fake/Q4_K_M",
    ]  # the fake method does not read weights
    assert outcome.plan.source.max_abs == 2 * max(
        float(np.abs(tensor).max()) for tensor in tensors().values()
    )


def test_a_folder_that_was_moved_goes_on_where_it_is(tmp_path: Path, config_file: Write) -> None:
    path = config_file()
    run(path)
    done(tmp_path)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    outcome = run(path, f"output_path={moved}")
    assert not (moved / "done.txt").exists()
    assert {report.artifact.folder for report in outcome.reports} == {moved / "model-FAKE"}
    records = [
        Report.model_validate_json(file.read_text()) for file in (moved / "records").glob("*.report.json")
    ]
    assert {record.artifact.folder for record in records} == {moved / "model-FAKE"}


def test_a_gate_that_is_not_met(tmp_path: Path, config_file: Write) -> None:
    outcome = run(config_file(only="Q8_0", divergence=0.01))
    assert [report.artifact.level for report in outcome.failed] == ["Q8_0"]
    assert outcome.failed[0].verdict() is Verdict.REGRESSION
    record = json.loads((tmp_path / "out" / "records" / "fake-Q8_0.report.json").read_text())
    assert record["findings"][0]["verdict"] == "REGRESSION"
    assert (tmp_path / "out" / "model-FAKE" / "quantool.json").is_file()


def test_a_check_that_cannot_be_loaded_is_found_before_anything_is_made(
    tmp_path: Path, config_file: Write
) -> None:
    settings = '{"checks": ["fakecheck", "wrong"]}'
    with pytest.raises(ConfigError, match="registered as check 'wrong' but is not one"):
        run(config_file(), f"validation={settings}")
    assert done(tmp_path) == []


def test_what_nothing_could_judge_has_not_passed(
    tmp_path: Path, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = find_check("fakecheck")
    monkeypatch.setattr(
        "quantool.plugins.find.find_check", lambda _name: type(check)("fakecheck", "", lambda *_: [])
    )
    outcome = run(config_file(("Q8_0",)))
    assert [report.verdict() for report in outcome.failed] == [Verdict.SKIPPED]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, config_file: Write) -> None:
    path = config_file()
    broken = tensors()
    broken["lm_head.weight"][3, 4] = np.nan
    save_file(broken, tmp_path / "model" / "model.safetensors")
    for _ in range(2):  # a rerun must not take the scan for done
        with pytest.raises(SourceError, match=r"lm_head\.weight \(1 NaN, 0 Inf\)"):
            run(path)
    assert done(tmp_path) == []


def test_a_disk_that_is_too_small_is_found_before_anything_is_made(
    tmp_path: Path, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(bytes=10**15)
    with pytest.raises(DependencyError, match=r"the run writes 2000000\.0 GB"):
        run(path)
    assert done(tmp_path) == []
    assert not (tmp_path / "out" / "model-FAKE").exists()


def test_file_names_that_collide_are_refused_before_anything_is_made(
    tmp_path: Path, config_file: Write
) -> None:
    with pytest.raises(ConfigError, match="would both write model-FAKE/x"):
        run(config_file(file="x"))
    assert done(tmp_path) == []


def test_a_method_that_fails_keeps_what_was_finished(tmp_path: Path, config_file: Write) -> None:
    with pytest.raises(QuantizationError, match="exit code 1"):
        run(config_file(ending="bug"))
    assert done(tmp_path) == ["made Q8_0"]
    leftovers = [path.name for path in (tmp_path / "out").rglob("*") if "part" in path.name]
    assert leftovers == []
    assert not (tmp_path / "out" / "model-FAKE" / "model-Q8_0.gguf").exists()


def test_a_finished_level_survives_the_failure_of_the_next(tmp_path: Path, config_file: Write) -> None:
    run(config_file(("Q8_0",)))
    done(tmp_path)
    with pytest.raises(QuantizationError):
        run(config_file(only="Q4_K_M", ending="bug"))
    assert done(tmp_path) == ["made Q4_K_M"]
    run(config_file(only="Q4_K_M"))
    assert done(tmp_path) == ["made Q4_K_M", "judged fake/Q4_K_M"]


def test_judging_a_file_of_somebody_else(tmp_path: Path, config_file: Write) -> None:
    config_file()
    config = Config.model_validate(
        {
            "model_id": str(tmp_path / "model"),
            "output_path": tmp_path / "out",
            "validation": {
                "checks": ["fakecheck"],
                "corpora": [{"name": "text", "path": tmp_path / "held-out.txt"}],
            },
        }
    )
    theirs = tmp_path / "theirs.gguf"
    theirs.write_text("0.5\n")
    artifact = Artifact(
        output="given/Q8_0", method="given", level="Q8_0", folder=tmp_path, bits_per_weight=8, seconds=0,
        files=(FileRecord(name=theirs.name, bytes=4, sha256=sha256_of(theirs)),),
    )  # fmt: skip

    def judged() -> Report:
        limits = [gates.default_gates("Q8_0")]
        (report,) = pipeline.validate([artifact], "llama.cpp", config, limits, Progress(quiet=True))
        return report

    first = judged()
    assert first.verdict() is Verdict.REGRESSION
    assert first.reference == str(tmp_path / "model")
    assert done(tmp_path) == ["judged given/theirs.gguf"]
    assert judged() == first
    assert done(tmp_path) == []
    kept = (tmp_path / "out" / "records" / "given-theirs.gguf.report.json").read_text()
    assert Report.model_validate_json(kept) == first
