"""Whatever stops a run, the next one goes on where it stopped and ends with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantool.runtime.workspace import Workspace
from tests import kills
from tests.conftest import dies
from tests.e2e.conftest import PATIENCE, Ended, Run, chat, wait_until, workers, write

pytestmark = pytest.mark.e2e

Q8, Q4 = "tiny-5.2M-chat-Q8_0.gguf", "tiny-5.2M-chat-Q4_K_M.gguf"
MATRIX = "tiny-5.2M-chat-imatrix.gguf"
ALWAYS = (
    "plan.json",
    "order.json",
    "README.md",
    "Modelfile",
    "quantool.json",
    "canary.json",
    "provenance.json",
    "SHA256SUMS",
    ".artifact.json",
    ".report.json",
    "lock",
)
OF_ALL_LEVELS = re.compile(
    r"report\.(json|md)|junit\.xml|.*/plots/.*\.png|\.quantool/(stages/plots-|stages/base-scores-|work/base-scores/|stages/findings-.*-(integrity|generation)-).*"
)


@pytest.fixture
def undisturbed(runs: Callable[[str], tuple[Run, Ended]]) -> Run:
    run, ended = runs("chat")
    assert ended.code == 0, ended.err
    return run


@pytest.fixture
def copied(undisturbed: Run, tmp_path: Path) -> Run:
    """The finished run, moved elsewhere."""
    shutil.copytree(undisturbed.output, tmp_path / "out", symlinks=True)
    return changed(undisturbed, tmp_path / "out")


def changed(run: Run, output: Path, **settings: Any) -> Run:
    """The same run with other settings."""
    return Run(
        write(output.parent, output.name, **run.settings | {"output_path": str(output)} | settings), run.cache
    )


def stamps(run: Run) -> dict[str, int]:
    """When each file that a stage made was last written."""
    return {
        str(path.relative_to(run.output)): path.stat().st_mtime_ns
        for path in run.output.rglob("*")
        if path.is_file() and not path.name.endswith(ALWAYS) and not {"logs", "marks"} & set(path.parts)
    }


def contents(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.folder.glob("*.gguf")}


def leftovers(run: Run) -> list[Path]:
    return list(run.output.rglob("*.part"))


def test_rerun_does_nothing(copied: Run) -> None:
    before, logs = (
        stamps(copied),
        {path.name: path.stat().st_size for path in (copied.output / "logs").iterdir()},
    )
    planned = json.loads(copied.finish("--json", command="plan").out)
    assert {output["id"] for output in planned["outputs"]} <= set(planned["machine"]["done"])
    ended = copied.finish()
    assert ended.code == 0, ended.err
    assert ended.stages == []
    assert stamps(copied) == before
    assert {path.name: path.stat().st_size for path in (copied.output / "logs").iterdir()} == logs
    assert "PASS" in ended.out


def test_added_level_is_the_only_one_made(copied: Run) -> None:
    more = changed(copied, copied.output, quant_level=["Q8_0", "Q5_K_S", "Q4_K_M"])
    before = {name: stamp for name, stamp in stamps(copied).items() if not OF_ALL_LEVELS.fullmatch(name)}
    ended = more.finish()
    assert ended.code == 0, ended.err
    assert ended.stages == ["gguf-Q5_K_S.perplexity", "quantize-Q5_K_S"]
    assert stamps(more).items() >= before.items()
    assert "tiny-5.2M-chat-Q5_K_S.gguf" in (more.folder / "SHA256SUMS").read_text()


def test_changed_option_remakes_the_levels_and_not_the_base(copied: Run) -> None:
    options = chat()["quantization_config"] | {"tensor_types": {"ffn_down": "q8_0"}}
    ended = changed(copied, copied.output, quantization_config=options).finish()
    assert ended.code == 0, ended.err
    assert ended.stages == [
        "gguf-Q4_K_M.perplexity",
        "quantize-Q4_K_M",
        "quantize-Q8_0",
    ]  # Q8_0 has the same bytes


def test_damaged_files_are_made_again(undisturbed: Run, copied: Run) -> None:
    with (copied.folder / Q8).open("r+b") as file:
        file.truncate(100_000)
    (copied.folder / Q4).unlink()
    ended = copied.finish()
    assert ended.code == 0, ended.err
    assert ended.stages == ["quantize-Q4_K_M", "quantize-Q8_0"]  # the same bytes: their scores hold
    assert contents(copied) == contents(undisturbed)


def test_lost_base_is_made_again_only_when_a_level_needs_it(undisturbed: Run, copied: Run) -> None:
    before = stamps(copied)
    shutil.rmtree(copied.output / ".quantool/work/base-f16")
    assert copied.finish().stages == []
    (copied.folder / Q8).unlink()
    ended = copied.finish()
    assert ended.stages == ["converter", "gguf-Q8_0.perplexity", "quantize-Q8_0"]
    assert contents(copied) == contents(undisturbed)
    assert not {Q4, MATRIX} & {
        Path(name).name for name, stamp in stamps(copied).items() if before.get(name) != stamp
    }


def sign(run: Run, stage: str) -> Callable[[], object]:
    """Whether ``stage`` is in the middle of its work: what it writes is there, or its announcement is in the log."""
    work = run.output / ".quantool/work"

    def has_bytes(path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size > 0
        return False

    return {
        "tokenizing": (run.output / "logs/imatrix.log").is_file,
        "converting": lambda: has_bytes(work / ".base-f16.part/base.gguf"),
        "imatrix": lambda: "llama_context" in (run.output / "logs/imatrix.log").read_text(),
        "quantizing": lambda: has_bytes(run.folder / f".{Q8}.part"),
        "second level": lambda: has_bytes(run.folder / f".{Q4}.part"),
        "reference": lambda: any(work.rglob("*.part")),
        "packaging": (run.folder / "README.md").exists,
    }[stage]


STAGES = ("tokenizing", "converting", "imatrix", "quantizing", "second level", "reference", "packaging")


def test_killed_in_every_stage_ends_with_the_same_bytes(undisturbed: Run, tmp_path: Path) -> None:
    run = changed(undisturbed, tmp_path / "out")
    for stage in STAGES:
        child = run.start()
        wait_until(sign(run, stage), child, stage)
        orphans = workers(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL, stage
        assert all(dies(orphan, 5) for orphan in orphans), stage
        unfinished = {"quantizing": Q8, "second level": Q4}.get(stage)
        assert unfinished is None or not (run.folder / unfinished).exists()
    ended = run.finish()
    assert ended.code == 0, ended.err
    assert ended.stages == []  # the last kill came when all was made and judged
    assert contents(run) == contents(undisturbed)
    assert set(contents(run)) == {Q8, Q4, MATRIX}
    assert not leftovers(run)
    listed = {line for line in (run.folder / "SHA256SUMS").read_text().splitlines() if ".gguf" in line}
    assert listed == {
        line for line in (undisturbed.folder / "SHA256SUMS").read_text().splitlines() if ".gguf" in line
    }


def test_random_kills_end_with_the_same_bytes(undisturbed: Run, tmp_path: Path) -> None:
    """``python -m tests.kills`` is the long form, with FP8 and AWQ."""
    run, tally = changed(undisturbed, tmp_path / "out"), kills.Tally()
    count = kills.chain(
        run.file, undisturbed.output, run.output, run.cache, tally, random.Random(2), kills=6, span=10
    )
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.runs == 1
    assert count >= 2, tally.ends
    print(tally)


def test_what_kills_must_not_leave_is_seen(undisturbed: Run, copied: Run) -> None:
    """A file cut off, a record cut off, a stage done again and an unfinished file: each is a fault."""
    expected, before = kills.contents(undisturbed.output), kills.finished(copied.output)
    assert kills.half_named(copied.output, expected) == []
    assert kills.findings(copied.output) == kills.findings(undisturbed.output)
    with (copied.folder / Q8).open("r+b") as file:
        file.truncate(100_000)
    report = next((copied.output / "records").glob("*.report.json"))
    report.write_bytes(report.read_bytes()[:100])
    assert kills.half_named(copied.output, expected) == [
        str(path.relative_to(copied.output)) for path in (copied.folder / Q8, report)
    ]
    redone = {name for name, known in kills.finished(copied.output).items() if before[name] != known}
    assert redone == {str(copied.folder / Q8)}
    (copied.folder / f".{Q4}.part").touch()
    assert kills.parts(copied.output) == [f"{copied.folder.name}/.{Q4}.part"]


def test_interrupt_ends_at_once_and_says_what_is_kept(undisturbed: Run, tmp_path: Path) -> None:
    run = changed(undisturbed, tmp_path / "out")
    child = run.start()
    wait_until(sign(run, "converting"), child, "converting")
    orphans = workers(child.pid)
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=PATIENCE)
    took = time.monotonic() - started
    print(f"interrupted in {took:.2f} s")
    assert took < 3
    assert child.returncode == 130
    assert "finished stages are kept" in err
    assert "Traceback" not in err
    assert all(dies(orphan) for orphan in orphans)
    assert not leftovers(run)


def test_second_run_in_the_same_folder_is_refused(copied: Run) -> None:
    before = stamps(copied)
    with Workspace(copied.output).lock():
        ended = copied.finish()
    assert ended.code == 3
    assert f"in use by another quantool run (process {os.getpid()})" in ended.err
    assert stamps(copied) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB: enough for the run, when nothing else fills it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves nothing free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return filler


def test_full_disk_names_the_file_and_loses_nothing(undisturbed: Run, small_disk: Path) -> None:
    settings = {
        "quant_level": ["Q8_0"],
        "quantization_config": chat()["quantization_config"] | {"imatrix": False},
        "validation": chat()["validation"] | {"checks": ["integrity"]},
    }
    run = changed(undisturbed, small_disk / "out", **settings)
    child = run.start()
    wait_until((small_disk / "out/.quantool/work/.base-f16.part").is_dir, child, "the conversion")
    filler = fill(small_disk)
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 3, err
    assert "No space left on device" in err
    assert "base.gguf" in err
    refused = run.finish()
    assert refused.code == 3
    assert "Traceback" not in refused.err
    filler.unlink()
    ended = run.finish()
    assert ended.code == 0, ended.err
    base = ".quantool/work/base-f16/base.gguf"
    assert (run.output / base).read_bytes() == (undisturbed.output / base).read_bytes()
    assert Q8 in (run.folder / "SHA256SUMS").read_text()
    assert not leftovers(run)
