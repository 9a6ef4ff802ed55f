"""What ``quantool verify`` finds of a release that was damaged, or attacked by somebody who recomputes every hash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest

from quantool import pipeline
from quantool.attest.release import CANARY, PROVENANCE, RECORD, SIGNATURE, SUMS
from quantool.attest.verify import Scope, is_proven, verify
from quantool.errors import ConfigError
from tests.attest import releases
from tests.attest.attacks import ATTACKS, attack
from tests.attest.releases import FOLDER, GGUF, config, copy_of, failed, flips, keys, proven, released
from tests.loopback import content
from tests.loopback_hub import Repository
from tests.pushing import WritableHub

pytestmark = pytest.mark.e2e

FLIPS = 15
"""Of each release; ``python -m tests.attest.releases 1000`` is the whole campaign."""
MISSED_WITHOUT_A_SIGNATURE = {
    "one tensor in 4 bits, type kept", "one tensor in 6 bits, type kept", "the same figure in report and card",
    "words in the card",
}  # fmt: skip
SAMPLE = {
    "a system line in the template": {"metadata Q8_0", "template Q8_0"},
    "two tokens swapped": {"metadata Q8_0", "tokens Q8_0"},
    "K permuted": {"divergence Q8_0"},
    "a file of another level": {"tensors Q8_0", "metadata Q8_0", "divergence Q8_0", "record"},
    "a failed finding": {"record"},
    "another recipe": {PROVENANCE},
    "a file of code, listed": {"names", PROVENANCE},
    "a norm scaled by 1.02": {"divergence BF16"},
}
"""Attacks that the suite makes, and the proofs that fail of an unsigned release."""


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(released() / GGUF, tmp_path / GGUF))


def test_a_sound_release_is_proven_by_name(gguf: Path) -> None:
    made = {entry.name: entry.outcome for entry in proven(gguf, trust=True, level="Q4_K_M")}
    assert made == dict.fromkeys(
        ["signature", "hashes", "names", "record", PROVENANCE]
        + [f"{name} Q4_K_M" for name in ("tensors", "metadata", "tokens", "template", "divergence")],
        "ok",
    )


@pytest.mark.parametrize("release", [GGUF, FOLDER])
def test_every_flipped_byte_is_found(release: str, tmp_path: Path) -> None:
    assert flips(release, range(FLIPS), tmp_path) == []


@pytest.mark.parametrize("name", SAMPLE)
def test_an_attack_with_recomputed_hashes_is_rejected(name: str, tmp_path: Path) -> None:
    plain, signed = attack(name, tmp_path)
    assert set(plain) == SAMPLE[name]
    assert "signature" in signed


def test_the_attacks_are_as_many_as_the_issue_wants() -> None:
    assert len(ATTACKS) - len(MISSED_WITHOUT_A_SIGNATURE) >= 18
    assert ATTACKS.keys() >= MISSED_WITHOUT_A_SIGNATURE | SAMPLE.keys()


def test_what_is_missing_or_more_is_named(gguf: Path) -> None:
    (gguf / "plots").mkdir(exist_ok=True)
    (gguf / "mmproj-other.gguf").write_bytes(b"GGUF")
    (gguf / "notes.txt.bak").write_text("mine")
    (gguf / ".gitattributes").write_text("*.gguf filter=lfs\n")
    (lost,) = gguf.glob("*-Q4_K_M.gguf")
    lost.unlink()
    made = {entry.name: entry for entry in proven(gguf, replays=False)}
    assert [entry.name for entry in made.values() if entry.outcome == "FAILED"] == [
        "hashes",
        "names",
        "tensors Q4_K_M",
    ]
    assert made["hashes"].detail == f"{lost.name} is missing"
    assert made["names"].detail == "mmproj-other.gguf is not part of the release"


def test_a_level_alone_needs_no_other_file(gguf: Path) -> None:
    (other,) = gguf.glob("*-Q4_K_M.gguf")
    other.unlink()
    made = proven(gguf, trust=True, level="Q8_0", replays=False)
    assert is_proven(made)
    assert next(entry.detail for entry in made if entry.name == "hashes").startswith("5 of 6 files")
    with pytest.raises(ConfigError, match="no output of level Q3_K_M"):
        proven(gguf, level="Q3_K_M")


def test_a_folder_without_a_release_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no quantool\.json"):
        verify(tmp_path, Scope(), making.QUIET)


def test_an_unsigned_release_is_not_called_signed(gguf: Path) -> None:
    (gguf / SIGNATURE).unlink()
    assert {entry.name: entry.outcome for entry in proven(gguf, replays=False)}["signature"] == "not checked"
    assert failed(proven(gguf, trust=True, replays=False)) == ["signature"]


def test_somebody_elses_signature_and_that_of_other_files_are_rejected(gguf: Path, tmp_path: Path) -> None:
    shutil.copy(released() / FOLDER / SIGNATURE, gguf / SIGNATURE)
    assert failed(proven(gguf, replays=False)) == ["signature"]
    assert failed(proven(gguf, trust=True, replays=False)) == ["signature"]


def test_a_damaged_canary_is_a_failed_proof(gguf: Path) -> None:
    content = json.loads((gguf / CANARY).read_text())
    del content["canary"]["gguf/Q8_0"]["top"]
    (gguf / CANARY).write_text(json.dumps(content))
    releases.recompute(gguf)
    (gguf / SIGNATURE).unlink()
    assert failed(proven(gguf, level="Q8_0")) == ["canary Q8_0"]


def test_records_that_cannot_be_read_are_failed_proofs(gguf: Path) -> None:
    (gguf / RECORD).write_text('{"plan": {}, "plan": {}}')
    assert failed(proven(gguf, replays=False)) == ["hashes", "record"]
    (gguf / SUMS).write_text("what?\n")
    assert failed(proven(gguf, replays=False)) == ["hashes"]


def test_the_command_ends_as_validate_does(gguf: Path, quantool: Callable[..., Any], tmp_path: Path) -> None:
    (file,) = gguf.glob("*-Q8_0.gguf")
    done = quantool("verify", file, "--key", keys()[1], "-q")
    assert done.code == 0, done.err
    assert "Q4_K_M" not in done.out
    assert [line.split()[0] for line in done.out.splitlines()][:3] == ["signature", "hashes", "names"]
    with file.open("r+b") as content:
        content.seek(-5, 2)
        content.write(b"\0\1\2\3")
    done = quantool("verify", gguf, "--json", "--no-replay", "-q")
    assert done.code == 5
    answer = json.loads(done.out)
    assert not answer["verified"]
    assert [entry["name"] for entry in answer["proofs"] if entry["outcome"] == "FAILED"] == ["hashes"]
    assert f"{gguf} is not what was released" in done.err
    assert quantool("verify", tmp_path / "nothing").code == 2
    assert quantool("verify", gguf, "--key", tmp_path / "nothing").code == 2


def test_a_rerun_packs_the_same_bytes_signature_included(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (released() / GGUF).rglob("*") if path.is_file()}
    pipeline.run(config(released()), making.QUIET)
    assert {path: path.read_bytes() for path in (released() / GGUF).rglob("*") if path.is_file()} == before


def test_a_release_without_a_signer_loses_an_old_signature(tmp_path: Path) -> None:
    with copy_of(GGUF, tmp_path) as folder:
        assert (folder / SIGNATURE).is_file()
    output = Path(shutil.copytree(released(), tmp_path / "out"))
    unsigned = config(output).model_copy(update={"sign": None})
    pipeline.run(unsigned, making.QUIET)
    assert not (output / GGUF / SIGNATURE).exists()


def test_of_a_repository_no_other_level_is_fetched(
    hub: WritableHub, quantool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    files = content(released() / GGUF)
    hub.repositories["org/tiny"] = Repository(files | {".gitattributes": b"*.gguf filter=lfs\n"})
    words = ("--level", "Q4_K_M", "--key", keys()[1], "--no-replay", "-q")
    done = quantool("verify", "org/tiny", *words)
    assert done.code == 0, done.out + done.err
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert {name for name in fetched if name.endswith(".gguf")} == {
        name for name in files if name.endswith("Q4_K_M.gguf")
    }
    changed = next(name for name in files if name.endswith("Q4_K_M.gguf"))
    hub.repositories["org/tiny"] = Repository(files | {changed: files[changed][:-1] + b"?"}, commit="2" * 40)
    done = quantool("verify", "org/tiny@main", *words)
    assert (done.code, f"{changed} was changed" in done.out) == (5, True), done.out + done.err
    assert quantool("diff", released() / GGUF, "org/tiny").out == "Nothing changed but, maybe, the bytes.\n"
    assert quantool("verify", "org/none", "-q").code == 2
