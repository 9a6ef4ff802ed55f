import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from quantool import pipeline
from quantool.config.load import load
from quantool.errors import PublicationError
from quantool.pipeline import RunResult
from quantool.plugins import find
from quantool.publish.package import pack
from quantool.publish.packed_folder import outgoing_files, read_packed_folder
from quantool.records import FileRecord, Finding, Verdict
from quantool.runtime.progress import Progress
from quantool.runtime.workspace import Workspace

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def outcome(config_file: Callable[..., Path]) -> RunResult:
    return pipeline.run(load(config_file(), ["repo_id=org/model-FAKE"], find).config, Progress(quiet=True))


@pytest.fixture
def folder(tmp_path: Path, outcome: RunResult) -> Path:
    return tmp_path / "out" / "model-FAKE"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sums_hold_for_all_that_is_published(folder: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    checked = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert checked == [
        "README.md", "model-Q4_K_M.gguf", "model-Q8_0.gguf", "plots/corpora.png", "plots/size-kld.png",
        "provenance.json", "quantool.json",
    ]  # fmt: skip


def test_the_record_holds_plan_and_reports(folder: Path, outcome: RunResult) -> None:
    record = json.loads((folder / "quantool.json").read_text())
    assert [output["id"] for output in record["plan"]["outputs"]] == ["fake/Q8_0", "fake/Q4_K_M"]
    assert [report["verdict"] for report in record["reports"]] == ["PASS", "PASS"]
    (finding,) = record["reports"][1]["findings"]
    assert (finding["metric"], finding["measured"], finding["threshold"]) == ("mean_kld", 0.0001, 0.055)
    files = {file.name: file.sha256 for file in outcome.plan.source.files}
    assert {file["name"]: file["sha256"] for file in record["plan"]["source"]["files"]} == files
    assert record["plan"]["versions"] == outcome.plan.versions


def test_no_folder_of_this_machine_is_published(tmp_path: Path, folder: Path) -> None:
    for name, content in contents(folder).items():
        assert str(tmp_path).encode() not in content, name
    assert str(Path.home()) not in (folder / "quantool.json").read_text()


def test_every_repository_gets_its_own(tmp_path: Path, outcome: RunResult) -> None:
    second = outcome.plan.outputs[1].model_copy(update={"repo": "other"})
    plan = outcome.plan.model_copy(update={"outputs": (outcome.plan.outputs[0], second)})
    workspace = Workspace(tmp_path / "apart")
    for repo, level in (("model-FAKE", "Q8_0"), ("other", "Q4_K_M")):
        (workspace.root / repo).mkdir(parents=True)
        shutil.copy(tmp_path / "out" / "model-FAKE" / f"model-{level}.gguf", workspace.root / repo)
    packed = pack(plan, outcome.reports, workspace)
    assert packed == tuple(map(read_packed_folder, (workspace.root / "model-FAKE", workspace.root / "other")))
    for repo, level in (("model-FAKE", "Q8_0"), ("other", "Q4_K_M")):
        record = json.loads((workspace.root / repo / "quantool.json").read_text())
        assert [output["level"] for output in record["plan"]["outputs"]] == [level]
        assert [report["artifact"]["level"] for report in record["reports"]] == [level]
        assert f"model-{level}.gguf" in (workspace.root / repo / "SHA256SUMS").read_text()


def test_a_shared_file_stands_once(tmp_path: Path, outcome: RunResult, folder: Path) -> None:
    matrix = FileRecord(name="model-imatrix.gguf", bytes=1, sha256="ab" * 32)
    reports = [
        report.model_copy(update={"artifact": report.artifact.model_copy(update={"shared": (matrix,)})})
        for report in outcome.reports
    ]
    pack(outcome.plan, reports, Workspace(tmp_path / "out"))
    assert (folder / "SHA256SUMS").read_text().count("model-imatrix.gguf") == 1
    assert (folder / "README.md").read_text().count("- importance matrix: `model-imatrix.gguf`") == 1


def test_a_modelfile_is_packed_where_ollama_was_found_equal(
    tmp_path: Path, outcome: RunResult, folder: Path
) -> None:
    equal = Finding(check="ollama", metric="conversations", verdict=Verdict.PASS, measured="9 of 9")
    reports = [
        report.model_copy(update={"findings": (*report.findings, equal)}) for report in outcome.reports
    ]
    (packed,) = pack(outcome.plan, reports, Workspace(tmp_path / "out"))
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./model-Q8_0.gguf\nPARAMETER num_ctx ")
    assert packed.sums["Modelfile"] == hashlib.sha256(text.encode()).hexdigest()
    assert read_packed_folder(folder).sums["Modelfile"] == packed.sums["Modelfile"]
    sums = (folder / "SHA256SUMS").read_text()
    other = text.replace("num_ctx", "num_keep")
    (folder / "Modelfile").write_text(other)
    changed = hashlib.sha256(other.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text(sums.replace(packed.sums["Modelfile"], changed))
    with pytest.raises(PublicationError, match="disagree: Modelfile"):
        read_packed_folder(folder)
    pack(outcome.plan, outcome.reports, Workspace(tmp_path / "out"))
    assert "Modelfile" not in (folder / "SHA256SUMS").read_text()


def test_a_folder_whose_signing_failed_cannot_be_published(
    tmp_path: Path, outcome: RunResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PublicationError("sigstore does not sign")

    monkeypatch.setattr("quantool.publish.package.sign", refuse)
    (folder / "model.sig").write_text("of the release before")
    signed = outcome.plan.model_copy(update={"config": outcome.plan.config | {"sign": {"keyless": True}}})
    more = Finding(check="size", metric="bits", verdict=Verdict.PASS, measured=8.0)
    changed = [report.model_copy(update={"findings": (*report.findings, more)}) for report in outcome.reports]
    with pytest.raises(PublicationError, match="sigstore"):
        pack(signed, changed, Workspace(tmp_path / "out"))
    with pytest.raises(PublicationError, match="not what was judged"):
        outgoing_files(read_packed_folder(folder), Progress(quiet=True), hash_large=False)


def test_files_that_nobody_made_are_left_alone(tmp_path: Path, outcome: RunResult, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    pack(outcome.plan, outcome.reports, Workspace(tmp_path / "out"))
    assert "notes.txt" not in (folder / "SHA256SUMS").read_text()
    assert (folder / "notes.txt").read_text() == "mine"


def test_packing_again_changes_nothing(tmp_path: Path, outcome: RunResult, folder: Path) -> None:
    before = contents(folder)
    pack(outcome.plan, outcome.reports, Workspace(tmp_path / "out"))
    assert contents(folder) == before


def test_a_level_alone_takes_the_plots_of_two_with_it(
    tmp_path: Path, outcome: RunResult, folder: Path
) -> None:
    assert "](plots/size-kld.png)" in (folder / "README.md").read_text()
    plan = outcome.plan.model_copy(update={"outputs": outcome.plan.outputs[:1]})
    pack(plan, outcome.reports[:1], Workspace(tmp_path / "out"))
    for name in ("README.md", "SHA256SUMS"):
        assert "plots/" not in (folder / name).read_text()
    assert list((folder / "plots").iterdir()) == []
