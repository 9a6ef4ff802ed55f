"""Records of a release that somebody else wrote: what packing never writes is a failed proof, not a traceback."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest

from quantool import pipeline
from quantool.attest.release import CANARY, RECORD, SIGNATURE, SUMS, read_release
from quantool.attest.signature import Trust
from quantool.attest.target import locate
from quantool.attest.verify import Scope, verify
from quantool.config.load import load
from quantool.errors import ConfigError, SourceError
from quantool.plugins import find
from quantool.records import Finding, Verdict
from quantool.validation.canary import CanaryRecord
from tests.attest.releases import failed
from tests.loopback import content
from tests.loopback_hub import Repository
from tests.pushing import WritableHub

PASSED = Finding(check="canary", metric="noise", verdict=Verdict.PASS, measured=0.0001)


@pytest.fixture
def release(
    config_file: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two outputs of the fake method, made once and copied."""
    made = tmp_path_factory.getbasetemp() / "release-of-somebody"
    if not made.exists():
        wanted = load(config_file(), ["repo_id=org/model-FAKE"], find).config
        pipeline.run(wanted, making.QUIET)
        shutil.copytree(tmp_path / "out" / "model-FAKE", made)
    return Path(shutil.copytree(made, tmp_path / "release"))


def rewrite(folder: Path, **texts: str) -> None:
    """Files by their stem with another content, and SHA256SUMS anew."""
    for stem, text in texts.items():
        (folder / f"{stem}.json").write_text(text)
    listed = {line.split("  ", 1)[1] for line in (folder / SUMS).read_text().splitlines()}
    names = sorted(listed | {f"{stem}.json" for stem in texts})
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    (folder / SUMS).write_text(
        "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / RECORD).read_text())
    change(record)
    rewrite(folder, quantool=json.dumps(record))


def fails(folder: Path, *, replays: bool = False) -> list[str]:
    return failed(verify(folder, Scope(replays=replays), making.QUIET))


def test_files_of_two_outputs_of_one_level_are_both_read(release: Path) -> None:
    edit(release, lambda record: record["reports"][1]["artifact"].update(level="Q8_0"))
    for name in ("model-Q8_0.gguf", "model-Q4_K_M.gguf"):
        content = (release / name).read_bytes()
        (release / name).write_bytes(content + b"?")
        made = {entry.name: entry for entry in verify(release, Scope(replays=False), making.QUIET)}
        assert made["hashes"].detail == f"{name} was changed"
        (release / name).write_bytes(content)


def test_of_a_level_that_a_repository_lacks_nothing_is_fetched(
    release: Path, hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repositories["org/fake"] = Repository(content(release))
    with pytest.raises(ConfigError, match="no output of level Q8_1"):
        locate("org/fake", ("Q8_1",), making.QUIET)
    assert not [*(tmp_path / "cache").rglob("*.gguf")]
    folder, _ = locate("org/fake", ("Q8_0",), making.QUIET)
    assert [path.name for path in folder.glob("*.gguf")] == ["model-Q8_0.gguf"]


@pytest.mark.parametrize("place", [".hidden/m.Q8_0.gguf", ".cache/m.Q8_0.gguf", ".hidden.json"])
def test_what_an_engine_may_load_is_named_in_hidden_folders_too(release: Path, place: str) -> None:
    assert "names" not in fails(release)
    (release / place).parent.mkdir(exist_ok=True)
    (release / place).write_bytes(b"GGUF")
    assert "names" in fails(release)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["plan"].update(config=3),
        lambda record: record["plan"].update(versions=["1"]),
        lambda record: record["plan"].pop("source"),
        lambda record: record["reports"][0]["artifact"].update(files=[]),
        lambda record: record["reports"].append(record["reports"][0]),
    ],
)
def test_a_record_of_no_release_is_a_failed_proof(release: Path, change: Callable[..., Any]) -> None:
    edit(release, change)
    assert fails(release) == ["record"]
    with pytest.raises(SourceError, match=RECORD):
        read_release(release)


@pytest.mark.parametrize(
    "left", ['{"canary": 3}', "[]", '{"canary": {"fake/Q8_0": 1}}', '{"canary": {"fake/Q8_0": {}}}']
)
def test_what_no_check_left_is_a_failed_proof(release: Path, left: str) -> None:
    rewrite(release, canary=left)
    assert {"canary Q8_0", CANARY} & set(fails(release, replays=True))


def test_what_is_left_of_an_unknown_check_is_not_checked(release: Path) -> None:
    rewrite(release, canary='{"../canary": {"fake/Q8_0": {}}}')
    made = {entry.name: entry for entry in verify(release, Scope(), making.QUIET)}
    assert made["../canary Q8_0"].detail == "this quantool replays no ../canary"


def test_a_canary_that_was_taken_away_is_missed(release: Path) -> None:
    assert "canary Q8_0" not in fails(release, replays=True)
    edit(release, lambda record: record["reports"][0]["findings"].append(PASSED.model_dump(mode="json")))
    assert "canary Q8_0" in fails(release, replays=True)


def test_what_was_changed_is_not_replayed(release: Path) -> None:
    rewrite(release, canary="{}")
    (release / CANARY).write_text("{ }")
    made = {entry.name: entry for entry in verify(release, Scope(), making.QUIET)}
    assert made["canary Q8_0"].detail == "not run: canary.json is not the one that was released"


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_log_probabilities_that_are_none_are_refused(value: float) -> None:
    kept = {
        "engine": "llama.cpp", "versions": {}, "files": {}, "keys": {}, "texts": [], "chats": [],
        "ids": [1], "noise": 0.0,
    }  # fmt: skip
    assert CanaryRecord.model_validate(kept | {"top": [[[3, -0.5]]]}).top == (((3, -0.5),),)
    with pytest.raises(ValueError, match="top"):
        CanaryRecord.model_validate(kept | {"top": [[[3, value]]]})


def test_a_signature_over_nameless_files_is_refused(release: Path) -> None:
    payload = json.dumps({"predicate": {"resources": [{"name": 1, "digest": "00"}]}}).encode()
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "dsseEnvelope": {"payload": base64.b64encode(payload).decode()},
    }
    (release / SIGNATURE).write_text(json.dumps(bundle))
    assert "signature" in fails(release)


@pytest.mark.parametrize(
    "trust",
    [
        Trust(issuer="https://example.org"),
        Trust(identity="me@example.org"),
        Trust(identity="", issuer="https://example.org"),
        Trust(Path("key.pem"), "me@example.org", "https://example.org"),
    ],
)
def test_who_is_trusted_is_said_wholly(release: Path, trust: Trust) -> None:
    with pytest.raises(ConfigError, match="--identity"):
        verify(release, Scope(trust, replays=False), making.QUIET)
