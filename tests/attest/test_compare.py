import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantool import pipeline
from quantool.attest.compare import as_markdown, changes
from quantool.attest.release import RECORD, read_release
from quantool.config.load import load
from quantool.errors import SourceError
from quantool.plugins import find
from quantool.runtime.progress import Progress

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def old(config_file: Callable[..., Path], tmp_path: Path) -> Path:
    pipeline.run(load(config_file(), ["repo_id=org/model-FAKE"], find).config, Progress(quiet=True))
    return tmp_path / "out" / "model-FAKE"


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(old, tmp_path / "new"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))


def told(old: Path, new: Path) -> list[tuple[str, str, str, str]]:
    found = changes(read_release(old), read_release(new))
    return [(change.kind, change.name, change.before, change.after) for change in found]


def test_the_same_release_has_no_changes(old: Path, new: Path) -> None:
    assert told(old, new) == []
    assert as_markdown(()) == "Nothing changed but, maybe, the bytes.\n"


def test_a_record_without_its_source_is_a_mistake_of_the_user(old: Path, new: Path) -> None:
    edit(new, lambda record: record["plan"]["source"].pop("files"))
    with pytest.raises(SourceError, match="no record of a release"):
        told(old, new)


def test_changes_are_told_by_kind(old: Path, new: Path) -> None:
    line = {
        "name": "w.{0-2}", "dtype": "BF16", "shape": [4], "fate": "quantized",
        "to": [{"name": "b.{0-2}", "dtype": "Q4_K", "shape": [4]}],
    }  # fmt: skip

    def before(record: dict[str, Any]) -> None:
        record["plan"]["outputs"][0]["ledger"] = {"tensors": [line]}

    def change(record: dict[str, Any]) -> None:
        other = line | {"to": [{"name": "b.{0-2}", "dtype": "Q6_K", "shape": [4]}]}
        record["plan"]["outputs"][0] |= {"ledger": {"tensors": [other]}}
        record["plan"]["outputs"][0]["options"]["bytes"] = 65
        record["plan"]["source"]["commit"] = "1" * 40
        record["plan"]["versions"]["gguf"] = "9.9"
        record["plan"]["config"]["seed"] = 7
        record["reports"][0]["findings"][0]["measured"] = 0.00271
        record["reports"][0]["artifact"]["bits_per_weight"] = 8.25
        record["plan"]["outputs"] = record["plan"]["outputs"][:1]
        record["reports"] = record["reports"][:1]

    edit(old, before)
    edit(new, change)
    gguf = read_release(old).plan["versions"]["gguf"]
    assert told(old, new) == [
        ("source", "commit", "-", "1" * 40),
        ("version", "gguf", gguf, "9.9"),
        ("configuration", "seed", "-", "7"),
        ("option", "fake/Q8_0 bytes", "64", "65"),
        ("output", "fake/Q4_K_M", "there", "-"),
        ("tensors", "fake/Q8_0 3 tensors", "Q4_K", "Q6_K"),
        ("figure", "fake/Q8_0 bits per weight", "8.00", "8.25"),
        ("figure", "fake/Q8_0 mean KLD", "0.0001", "0.00271"),
    ]


def test_the_command_prints_a_table_for_the_changelog(
    old: Path, new: Path, quantool: Callable[..., Any], tmp_path: Path
) -> None:
    edit(new, lambda record: record["plan"]["config"].update(seed=7))
    done = quantool("diff", old, new)
    assert done.code == 0, done.err
    assert done.out == ("| what | of | before | now |\n|---|---|---|---|\n| configuration | seed | - | 7 |\n")
    done = quantool("diff", old, new, "--json")
    assert json.loads(done.out) == [{"kind": "configuration", "name": "seed", "before": "-", "after": "7"}]
    assert quantool("diff", old, tmp_path / "nothing").code == 2
    (new / RECORD).write_text("{")
    assert quantool("diff", old, new).code == 2
