"""How a checkpoint reaches the folder to publish: nothing goes but what a record names."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantool.errors import DependencyError, QuantizationError, SourceError
from quantool.formats.safetensors import INDEX
from quantool.methods._artifacts import files
from quantool.methods._artifacts.files import checkpoint_folder, relative_files
from quantool.plugins.contract import Job
from quantool.runtime.workspace import Workspace

SINGLE = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class FakeJob:
    """What ``checkpoint_folder`` uses of a job."""

    workspace: Workspace
    output: Any
    folder: Path


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path)
    with workspace.lock():
        yield workspace


def job(workspace: Workspace, output: str = "fp8/FP8", repo: str = "repo") -> Job:
    made: Any = FakeJob(workspace, SimpleNamespace(id=output), workspace.root / repo)
    return made  # type: ignore[no-any-return]


def write(folder: Path, names: tuple[str, ...], value: float = 1.0) -> None:
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.full((4,), value)}, folder / name)
    if len(names) > 1:
        weights = ", ".join(f'"t{number}": "{name}"' for number, name in enumerate(names))
        (folder / INDEX).write_text(f'{{"weight_map": {{{weights}}}}}')
    (folder / "config.json").write_text(f'{{"value": {value}}}')


def make(wanted: Job, names: tuple[str, ...], value: float = 1.0, key: str = "key") -> None:
    with checkpoint_folder(wanted) as part:
        write(part, names, value)
        found = relative_files(part)
    wanted.workspace.keep(wanted.output.id, key, [wanted.folder / name for name in found], {})


def test_what_a_user_put_there_stays(workspace: Workspace) -> None:
    make(job(workspace), (SINGLE,))
    folder = workspace.root / "repo"
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "mine.png").write_text("mine")
    (folder / "model-Q8_0.gguf").write_text("made by another method")
    make(job(workspace), (SINGLE,), 2.0)
    assert relative_files(folder) == [
        "config.json", "model-Q8_0.gguf", SINGLE, "notes.txt", "plots/mine.png",
    ]  # fmt: skip
    assert (folder / "config.json").read_text() == '{"value": 2.0}'
    assert not list(workspace.work.iterdir())


def test_what_the_earlier_artifact_had_and_this_one_lacks_goes(workspace: Workspace) -> None:
    make(job(workspace), SHARDS)
    make(job(workspace), (SINGLE,), 2.0)
    assert relative_files(workspace.root / "repo") == ["config.json", SINGLE]


def test_weights_of_another_level_in_the_same_folder_go(workspace: Workspace) -> None:
    """A level that the user replaced by another under the same repo_id: its index would name the old weights."""
    make(job(workspace, "fp16/BF16-safetensors"), SHARDS)
    make(job(workspace, "awq/W4A16"), (SINGLE,), 2.0)
    assert relative_files(workspace.root / "repo") == ["config.json", SINGLE]
    make(job(workspace, "fp8/FP8", "other"), SHARDS)
    assert relative_files(workspace.root / "repo") == ["config.json", SINGLE]


def test_a_failure_leaves_the_earlier_artifact(workspace: Workspace) -> None:
    make(job(workspace), SHARDS)

    def fail() -> None:
        with checkpoint_folder(job(workspace)) as part:
            write(part, (SINGLE,), 2.0)
            raise QuantizationError("no")

    with pytest.raises(QuantizationError):
        fail()
    assert relative_files(workspace.root / "repo") == sorted(["config.json", INDEX, *SHARDS])
    assert workspace.recall("fp8/FP8", "key") == {}
    assert not list(workspace.work.iterdir())


def test_a_run_killed_between_two_files_is_made_good(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are known to be ours although the artifact was never finished."""
    move = files.move

    def die(source: Path, target: Path) -> None:
        if target.name == SHARDS[1]:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(files, "move", die)
    with pytest.raises(KeyboardInterrupt):
        make(job(workspace), SHARDS)
    assert SHARDS[0] in relative_files(workspace.root / "repo")
    assert workspace.recall("fp8/FP8", "key") is None
    monkeypatch.undo()
    make(job(workspace), (SINGLE,))
    assert relative_files(workspace.root / "repo") == ["config.json", SINGLE]


def test_strange_weights_are_named_and_kept(workspace: Workspace) -> None:
    folder = workspace.root / "repo"
    folder.mkdir()
    save_file({"x": torch.ones(2)}, folder / "model-mine.safetensors")
    with pytest.raises(SourceError, match=r"weights that quantool did not write: .*model-mine"):
        make(job(workspace), SHARDS)
    assert (folder / "model-mine.safetensors").is_file()
    assert workspace.recall("fp8/FP8", "key") is None


def test_a_full_disk_is_no_bug(workspace: Workspace) -> None:
    def fill() -> None:
        with checkpoint_folder(job(workspace)) as part:
            (part / "model.safetensors").symlink_to("/dev/full")
            (part / "model.safetensors").write_bytes(b"x" * 1_000_000)

    with pytest.raises(DependencyError, match="No space left"):
        fill()
    assert not list(workspace.work.iterdir())


def test_a_folder_on_another_disk_is_copied_to(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def across(path: Path, target: Path) -> Path:
        if path.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", across)
    make(job(workspace), SHARDS)
    assert relative_files(workspace.root / "repo") == sorted(["config.json", INDEX, *SHARDS])
    assert not list(workspace.work.iterdir())
