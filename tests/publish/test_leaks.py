"""Nothing is packed that names a folder of this machine (T8)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantool import pipeline
from quantool.config.load import load
from quantool.errors import PublicationError
from quantool.plugins import find
from quantool.plugins.contract import Case, Check
from quantool.publish.leaks import refuse_leaks
from quantool.records import Finding, Verdict
from quantool.runtime.progress import Progress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def looked_at(folder: Path, source: Path, home: Path, **texts: str) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    refuse_leaks(folder, names, texts, {"the home folder": home}, source)


@pytest.mark.parametrize(
    "text",
    [
        "a\nfrom /home/me/x",
        '"/home/me"',
        "(/home/me)",
        "path=/home/me,",
        "/home/me",
        "'/home/me/models/tiny'",
    ],
)
def test_a_path_is_found_wherever_it_stands(tmp_path: Path, source: Path, text: str) -> None:
    line = 1 + text.count("\n")
    with pytest.raises(
        PublicationError, match=f"README.md, line {line}: holds the home folder of this machine"
    ):
        looked_at(tmp_path / "out", source, Path("/home/me"), **{"README.md": text})


@pytest.mark.parametrize(
    "text",
    ["/home/men", "/home/me-too", "https://example.org/home/me/x", "~/home/me", "x/home/me", "/home/me.txt"],
)
def test_what_only_looks_like_it_is_no_leak(tmp_path: Path, source: Path, text: str) -> None:
    looked_at(tmp_path / "out", source, Path("/home/me"), **{"README.md": text})


def test_what_the_checkpoint_says_itself_is_public_already(tmp_path: Path, source: Path) -> None:
    """A vocabulary may hold the token ``/root``, which is a home as well."""
    (source / "tokenizer.json").write_text('{"/root": 17}')
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"/root": 17}')
    looked_at(folder, source, Path("/root"))
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(PublicationError, match=r"tokenizer\.json"):
        looked_at(folder, source, Path("/root"))


def test_links_and_other_scripts_are_followed(tmp_path: Path, source: Path) -> None:
    real = tmp_path / "réel"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    for text in (str(real), json.dumps(str(real)), str(link)):
        with pytest.raises(PublicationError):
            looked_at(tmp_path / "out", source, link, **{"README.md": f"in {text}/x"})


def test_the_root_of_the_file_system_is_no_secret(tmp_path: Path, source: Path) -> None:
    looked_at(tmp_path / "out", source, Path("/"), **{"README.md": "/usr/bin and /"})


def test_files_that_a_method_made_are_looked_at_too(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text('{"_name_or_path": "/home/me/models/tiny"}')
    with pytest.raises(PublicationError, match=r"config\.json, line 1"):
        looked_at(folder, source, Path("/home/me"))
    (folder / "config.json").unlink()
    (folder / "m.gguf").write_bytes(b"GGUF\x03\x00quantize.imatrix.file\x00/home/me/m.gguf\x00\xff")
    with pytest.raises(PublicationError, match=r"m\.gguf"):
        looked_at(folder, source, Path("/home/me"))


def test_a_file_that_was_uploaded_and_deleted_is_no_obstacle(tmp_path: Path, source: Path) -> None:
    refuse_leaks(tmp_path, ["gone.gguf"], {}, {"the home folder": Path("/home/me")}, source)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("where", ["model", "out", "."])
def test_a_finding_with_a_path_stops_the_packing(
    tmp_path: Path, config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As ``integrity/source_commit`` of a local checkpoint had on 0.3.0, and the log of an external llama-server."""

    def judge(case: Case, _progress: Progress) -> list[Finding]:
        leak = str(tmp_path / where) if where != "." else str(Path.cwd())
        return [
            Finding(check="fakecheck", metric="commit", verdict=Verdict.PASS, measured=leak, detail=case.name)
        ]

    monkeypatch.setattr("quantool.plugins.find.find_check", lambda _: Check("fakecheck", "", judge))
    job = load(config_file(), (), find).config
    with pytest.raises(PublicationError, match="of this machine"):
        pipeline.run(job, Progress(quiet=True))
    folder = tmp_path / "out" / "model-FAKE"
    assert not (folder / "SHA256SUMS").exists()
    assert not (folder / "quantool.json").exists()
    assert sorted(path.name for path in (tmp_path / "out" / "records").glob("*.report.json")) == [
        "fake-Q4_K_M.report.json", "fake-Q8_0.report.json",
    ]  # fmt: skip
