"""Slurm: what is sent, what is refused before anything is, and a real one on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from quantool import __version__, submitting
from quantool.cluster import slurm as slurm_engine
from quantool.cluster.local import LocalScheduler
from quantool.cluster.marks import forget_marks, read_order, save_order
from quantool.cluster.resources import GIB, Resources
from quantool.cluster.scheduler import StageOrder
from quantool.cluster.slurm import SlurmScheduler, limit_minutes
from quantool.config.cluster import Cluster
from quantool.errors import ConfigError, DependencyError
from quantool.run import stages
from quantool.run.preparing import planned_to_submit
from quantool.runtime import claims, gpus
from quantool.runtime.progress import Progress
from quantool.runtime.versions import versions
from quantool.runtime.workspace import Workspace
from tests.one_node import OneNode, missing, one_node

pytest.importorskip("submitit")
real = pytest.mark.skipif(bool(missing()), reason=missing() or "there")
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "POLL", 0.3)


def scheduler(tmp_path: Path, **cluster: Any) -> SlurmScheduler:
    return SlurmScheduler(Cluster.model_validate({"slurm": {}, **cluster}), tmp_path)


def order(stage: str, *after: str, gpus: int = 0, seconds: float = 60.0) -> StageOrder:
    work = stages.StageJob("/output", stage)
    return StageOrder(stage, work, Resources(8, 16 * GIB, gpus, seconds), after)


# --- a site's commands, played by scripts


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put scripts for commands of Slurm's first on the path; by default a site of one partition with four GPUs a node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def play(**scripts: str) -> None:
        usual = {
            "sinfo": "echo 'acc*|80|512000|gpu:hopper:4(S:0-1)|3-00:00:00'",
            "squeue": "true",
            "sbatch": "true",
            "srun": f"""echo '{json.dumps({"host": "as01", "quantool": __version__, "sees": True})}'""",
        }
        for name, script in (usual | scripts).items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    play()
    return play


def test_nodes_are_what_the_partition_says_under_what_the_configuration_says(
    tmp_path: Path, site: Callable[..., None]
) -> None:
    node = scheduler(tmp_path).node()
    assert (node.cpus, node.memory, node.gpus) == (80, 512000 << 20, 4)
    node = scheduler(tmp_path, cpus_per_node=40, memory_per_node="1T", gpus_per_node=2).node()
    assert (node.cpus, node.memory, node.gpus) == (40, 1 << 40, 2)
    site(sinfo="echo 'gpp*|112+|256000+|(null)|infinite'; echo 'acc|80|512000|gpu:4|1:00:00'")
    assert scheduler(tmp_path).node().gpus == 0  # without a name it is the default partition
    site(sinfo="true")
    with pytest.raises(ConfigError, match="partition acc has no nodes"):
        scheduler(tmp_path, slurm={"partition": "acc"}).node()


def test_the_partitions_limit_holds(tmp_path: Path, site: Callable[..., None]) -> None:
    assert scheduler(tmp_path).node().minutes == 3 * 24 * 60
    assert scheduler(tmp_path, slurm={"time": "1:00:00"}).node().minutes == 60
    assert "#SBATCH --time=4320\n" in scheduler(tmp_path).scripts([order("make", seconds=1e6)])
    site(sinfo="echo 'acc*|80|512000|gpu:4|infinite'")
    assert scheduler(tmp_path).node().minutes is None


def test_a_partition_without_gpus(tmp_path: Path, site: Callable[..., None]) -> None:
    site(sinfo="echo 'gpp*|112|256000|(null)|infinite'")
    with pytest.raises(ConfigError, match=r"gpus_per_node is 4, but nodes of partition gpp have no GPUs"):
        scheduler(tmp_path, slurm={"partition": "gpp"}, gpus_per_node=4).node()


def test_a_script_has_what_the_site_and_the_stage_ask_for(tmp_path: Path, site: Callable[..., None]) -> None:
    cluster = {
        "account": "bsc01", "qos": "acc_bench", "time": "4:00:00", "reservation": "quiet",
        "options": {"exclusive": True}, "setup": ["module load cuda"],
    }  # fmt: skip
    script = scheduler(tmp_path, slurm=cluster).scripts([order("reference", "source", gpus=4)])
    assert script.startswith("# === reference (after source) ===\n#!/bin/bash\n")
    lines = script.splitlines()
    for line in (
        "--account=bsc01", "--qos=acc_bench", "--time=4:00:00", "--reservation=quiet", "--exclusive", "--mem=16G",
        "--cpus-per-task=8", "--gpus-per-node=4", "--requeue", "--kill-on-invalid-dep=yes", "--job-name='quantool reference'",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    assert {"export HF_HUB_OFFLINE=1", "module load cuda"} <= {*lines}
    assert scheduler(tmp_path).scripts([order("make", seconds=3600)]).count("#SBATCH --time=190") == 1


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("4:00:00", 240), ("1-12", 2160), ("1-12:30", 2190), ("2:30", 3), ("0:20", 1), ("1-00:00:30", 1441)],
)  # fmt: skip
def test_limits_as_slurm_writes_them(text: str, minutes: int) -> None:
    assert limit_minutes(text) == minutes
    assert Cluster.model_validate({"slurm": {"time": text}}).slurm is not None


REFUSED = (
    "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
)


@pytest.mark.parametrize(
    ("scripts", "code", "told"),
    [
        ({"sbatch": f"echo '{REFUSED}' >&2; exit 1"}, 2, "Slurm refuses such jobs: Batch job submission failed: Invalid account"),
        ({"sinfo": "echo 'acc*|80|512000|(null)|infinite'"}, 2, "cluster.gpus_per_node is 4, but nodes of partition (default) have no GPUs"),
        ({"srun": """echo '{"host": "as01", "quantool": "0.2.9", "sees": true}'"""}, 3, f"quantool is {__version__} here and 0.2.9 on as01"),
        ({"srun": f"""echo '{{"host": "as01", "quantool": "{__version__}", "sees": false}}'"""}, 3, "as01 does not see"),
        ({"srun": "echo 'srun: error: execve(): No such file' >&2; exit 2"}, 3, "a compute node cannot run quantool: execve(): No such file"),
        ({"squeue": "true", "sinfo": "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1"}, 3, "Unable to contact slurm controller"),
        ({"sinfo": "echo 'acc*|80|1024|gpu:4|infinite'"}, 2, "of memory, a node has 1.1 GB"),
    ],
    ids=["account", "gpus", "version", "folder", "environment", "controller", "memory"],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_sent(
    config_file: Write, quantool: Callable[..., Any], site: Callable[..., None], tmp_path: Path,
    scripts: dict[str, str], code: int, told: str,
) -> None:  # fmt: skip
    site(**scripts)
    cluster = '{"slurm": {"account": "bsc01"}, "gpus_per_node": 4}'
    ended = quantool("submit", config_file(), "--set", f"cluster={cluster}", "-q")
    assert ended.code == code, ended.err
    assert told in ended.err
    assert read_order(Workspace(tmp_path / "out")) is None


def test_what_slurm_refuses_while_stages_are_sent_is_said_and_what_was_sent_is_known(
    config_file: Write, quantool: Callable[..., Any], site: Callable[..., None], tmp_path: Path
) -> None:
    full = "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    once = f"""case $1 in --test-only) exit 0;; esac
mkdir {tmp_path}/sent 2>/dev/null && echo 'Submitted batch job 71' || {{ echo '{full}' >&2; exit 1; }}"""
    site(sbatch=once)
    ended = quantool("submit", config_file(), "--set", "cluster={slurm: {}}", "-q")
    assert ended.code == 3, ended.err
    assert "Slurm did not take make fake/Q8_0, make fake/Q4_K_M: QOSMaxSubmitJobPerUserLimit" in ended.err
    known = read_order(Workspace(tmp_path / "out"))
    assert known is not None
    assert [stage.job for stage in known.stages] == ["71", *[None] * 5]


def test_commands_that_hang(
    tmp_path: Path,
    site: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(slurm_engine, "PATIENCE", 0.2)
    site(srun="exec sleep 60")
    scheduler(tmp_path).check([order("source")], Progress())
    assert "no node was probed, the first job does it" in capsys.readouterr().err
    site(sbatch="exec sleep 60")
    with pytest.raises(DependencyError, match="sbatch did not answer"):
        scheduler(tmp_path).check([order("source")], Progress())


def test_a_probe_that_gets_no_node_leaves_it_to_the_first_job(
    tmp_path: Path, site: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    site(srun="echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1")
    scheduler(tmp_path).check([order("source")], Progress())
    assert (
        "the first job does it (Unable to allocate resources: Requested nodes are busy)"
        in capsys.readouterr().err
    )


def test_without_slurm(
    config_file: Write, quantool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = quantool("submit", config_file(), "--set", "cluster={slurm: {account: a}}")
    assert (ended.code, "there is no Slurm here" in ended.err) == (3, True)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "the configuration names no cluster"),
        (["cluster={slurm: {}, local: {}}"], "give one of slurm, local and engine"),
        (["cluster={gpus_per_node: 4}"], "give one of slurm, local and engine"),
        (["cluster={slurm: {time: soon}}"], "must match"),
        (["cluster={slurm: {acount: a}}"], "account"),
        (["cluster={engine: slrm}"], "did you mean slurm"),
        (["cluster={slurm: {}}", "device=cuda:0,1"], "names GPUs of one machine"),
        (
            ["cluster={slurm: {}}", "disk_bounded=true", "push_to_hub=true", "repo_id=a/b"],
            "uploads level by level",
        ),
    ],
)
def test_bad_input(config_file: Write, quantool: Callable[..., Any], overrides: list[str], told: str) -> None:
    ended = quantool("submit", config_file(), *(word for each in overrides for word in ("--set", each)))
    assert (ended.code in (2, 3), told in ended.err) == (True, True), ended.err


def test_gpus_are_the_nodes_and_not_the_login_nodes(
    config_file: Write,
    quantool: Callable[..., Any],
    site: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    here = gpus.capabilities()

    def planned(*given: Any, **named: Any) -> Any:
        seen.append(len(gpus.capabilities()))
        return planned_to_submit(*given, **named)

    monkeypatch.setattr(submitting, "planned_to_submit", planned)
    assert quantool("submit", config_file(), "--dry-run", "--set", "cluster={slurm: {}}", "-q").code == 0
    assert (seen, gpus.capabilities()) == ([4], here)


def test_a_plugin(config_file: Write, quantool: Callable[..., Any], plugin: Path) -> None:
    entry = "\n[quantool.clusters]\nlsf = quantool_fake_cluster:made\n"
    (plugin / "quantool_lsf-1.0.dist-info").mkdir(exist_ok=True)
    (plugin / "quantool_lsf-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: quantool-lsf\nVersion: 1.0\n"
    )
    (plugin / "quantool_lsf-1.0.dist-info" / "entry_points.txt").write_text(entry)
    (plugin / "quantool_fake_cluster.py").write_text(
        "from quantool.cluster.resources import NodeShape\n"
        "class Lsf:\n"
        "    def node(self): return NodeShape(8, 1 << 36, 0)\n"
        "    def states(self, jobs): return {}\n"
        "    def scripts(self, orders): return 'bsub ' + ' '.join(order.stage for order in orders)\n"
        "def made(cluster, output): return Lsf()\n"
    )
    ended = quantool("submit", config_file(), "--dry-run", "--set", "cluster={engine: lsf}", "-q")
    assert ended.out.startswith("bsub source make fake/Q8_0")


# --- stages by themselves


def ordered(config_file: Write, quantool: Callable[..., Any], tmp_path: Path) -> Path:
    """An output folder in which a run was ordered and finished."""
    assert quantool("run", config_file(), "-q").code == 0
    return tmp_path / "out"


def test_a_stage_of_another_version_is_refused(
    config_file: Write, quantool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ordered(config_file, quantool, tmp_path)
    known = versions()
    with monkeypatch.context() as changed:
        changed.setattr(stages, "versions", lambda: known | {"torch": "1.0"})
        ended = quantool("stage", output, "make fake/Q8_0")
    assert (ended.code, "the run was planned with torch" in ended.err) == (3, True)
    assert submitting.look(output)[1].note.startswith("the run was planned with torch")
    ended = quantool("stage", output, "make fake/Q2_K")
    assert (ended.code, "the plan has no stage" in ended.err) == (3, True)


def lasting(folder: Path) -> dict[str, bytes]:
    """The files of a packed folder that are the same in every run: not those that say how long it took."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.name: path.read_bytes()
        for path in files
        if path.name not in ("quantool.json", "SHA256SUMS", "provenance.json")
    }


def test_stages_one_by_one_make_what_a_run_makes(
    config_file: Write, quantool: Callable[..., Any], tmp_path: Path
) -> None:
    output = ordered(config_file, quantool, tmp_path)
    expected = lasting(output / "model-FAKE")
    known = read_order(Workspace(output))
    assert known is not None
    forget_marks(Workspace(output), [stage.name for stage in known.stages])
    early = quantool("stage", output, "judge fake/Q8_0")
    assert (early.code, "judge fake/Q8_0 needs make fake/Q8_0, which is not done" in early.err) == (3, True)
    for path in (output / "model-FAKE").glob("*.*"):
        path.unlink()
    (output / "done.txt").unlink()
    for stage in known.stages:
        assert quantool("stage", output, stage.name).code == 0
    assert lasting(output / "model-FAKE") == expected
    assert (output / "done.txt").read_text().splitlines().count("made Q8_0") == 1


def test_a_folder_that_this_machine_has_not_is_said_by_status(
    config_file: Write, quantool: Callable[..., Any], tmp_path: Path
) -> None:
    output = ordered(config_file, quantool, tmp_path)
    known = read_order(Workspace(output))
    assert known is not None
    save_order(Workspace(output), known.model_copy(update={"folder": str(tmp_path / "elsewhere")}))
    ended = quantool("stage", output, "make fake/Q8_0")
    assert (ended.code, "elsewhere, which cannot be entered here" in ended.err) == (3, True), ended.err
    assert "which cannot be entered here" in submitting.look(output)[1].note


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("model.norm"), "this should not happen: KeyError: 'model.norm'"),
        (OSError(5, "Input/output error", "/gpfs/a"), "Input/output error: /gpfs/a"),
    ],
    ids=["fault", "disk"],
)
def test_what_nobody_foresaw_in_a_stage_is_said_by_status(
    config_file: Write,
    quantool: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
) -> None:
    output = ordered(config_file, quantool, tmp_path)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(stages, "graph_of", fail)
    assert quantool("stage", output, "make fake/Q8_0").code != 0
    failed = submitting.look(output)[1]
    assert (failed.phase.value, failed.note) == ("failed", told)


def test_what_was_made_is_published_as_the_newest_submission_says(
    config_file: Write, quantool: Callable[..., Any], site: Callable[..., None], tmp_path: Path
) -> None:
    output = ordered(config_file, quantool, tmp_path)
    wanted = ("--set", "cluster={slurm: {}}", "--set", "private=false", "--set", "repo_id=org/model-FAKE")
    told = quantool("submit", config_file(), *wanted, "-q")
    assert told.out.startswith("nothing to send: everything is done"), (told.out, told.err)
    known = read_order(Workspace(output))
    assert known is not None
    assert (known.engine, known.config["private"]) == ("slurm", False)
    assert {each.phase.value for each in submitting.look(output)} == {"done"}


def test_publishing_waits_for_the_claims_of_stages_that_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LAPSE", 1.0)
    monkeypatch.setattr(claims, "POLL", 0.02)
    workspace = Workspace(tmp_path)
    killed = replace(claims.Holder.myself(), host="as17", space="another node's")
    workspace.claims.mkdir(parents=True)
    (workspace.claims / "stage pack a.claim").write_text(json.dumps(asdict(killed)))
    with pytest.raises(DependencyError, match="on as17"), workspace.lock():
        pass
    submitting._wait_for_claims(workspace)
    with workspace.lock():
        assert "stage pack a" not in workspace.holders()


# --- this machine's own GPUs


def test_local_stages_wait_for_theirs_and_a_failed_one_holds_back_what_follows(
    config_file: Write,
    quantool: Callable[..., Any],
    begin: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    path = config_file()
    wanted = json.loads(path.read_text())
    del wanted["method"], wanted["quant_level"], wanted["quantization_config"]
    wanted["quantizations"] = [
        {"method": "fake", "quant_level": "Q8_0", "repo_id": "org/good"},
        {
            "method": "fake",
            "quant_level": "Q4_K_M",
            "repo_id": "org/bad",
            "quantization_config": {"ending": "refuse"},
        },
    ]
    wanted["cluster"] = {"local": {"jobs": 2}}
    path.write_text(json.dumps(wanted))
    sent = begin("submit", path, "-q")  # a process of its own: what it leaves behind is nobody's child
    _, told = sent.communicate(timeout=60)
    assert sent.returncode == 0, told
    waited = quantool("status", tmp_path / "out", "--wait", "-q")
    assert waited.code == 6, waited.err
    assert "make fake/Q4_K_M: the Hub is closed (2 more stages are not done)" in waited.err
    assert "come back tomorrow" in waited.err
    phases = {each.name: each.phase.value for each in submitting.look(tmp_path / "out")}
    assert phases == {
        "source": "done", "make fake/Q8_0": "done", "make fake/Q4_K_M": "failed", "judge fake/Q8_0": "done",
        "judge fake/Q4_K_M": "held back", "pack good": "done", "pack bad": "held back",
    }  # fmt: skip
    assert (tmp_path / "out" / "good" / "SHA256SUMS").is_file()


def test_slots_of_this_machine(tmp_path: Path) -> None:
    local = LocalScheduler(
        Cluster.model_validate({"local": {}, "gpus_per_node": 4, "cpus_per_node": 32}), tmp_path
    )
    assert (local.slots, local.node().cpus, local.node().gpus) == (4, 8, 1)
    assert local.states([str(os.getpid()), "none"]) == {}


# --- a real Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    with one_node(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def here(slurm: OneNode, monkeypatch: pytest.MonkeyPatch) -> OneNode:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    return slurm


@real
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ("{slurm: {partition: nope}}", "partition nope has no nodes"),
        ("{slurm: {partition: main}, gpus_per_node: 4}", "nodes of partition main have no GPUs"),
        ("{slurm: {partition: main, options: {gpus: 4}}}", "Invalid generic resource"),
        (
            "{slurm: {partition: short, time: '1:00:00'}}",
            "is 1:00:00, but the partition allows no more than 5 min",
        ),
        ("{slurm: {}, cpus_per_node: 4000}", "Requested node configuration is not available"),
    ],
)
def test_slurm_itself_refuses(
    here: OneNode, config_file: Write, quantool: Callable[..., Any], tmp_path: Path, cluster: str, told: str
) -> None:
    ended = quantool("submit", config_file(), "--set", f"cluster={cluster}", "-q")
    assert (ended.code, told in ended.err) == (2, True), ended.err
    assert here.ask("squeue", "-h") == ""


@real
@pytest.mark.slurm
def test_a_run_on_a_real_slurm(
    here: OneNode, config_file: Write, quantool: Callable[..., Any], tmp_path: Path
) -> None:
    """Held, asked for again, one stage cancelled, sent again; in the end the same as ``quantool run``."""
    alone = tmp_path / "alone"
    run = quantool("run", config_file(), "-q", "--set", f"output_path={alone}")
    words = ("submit", config_file(), "-q", "--set", "cluster={slurm: {partition: main}}")
    here.ask("scontrol", "update", "partitionname=main", "state=down")
    ended = quantool(*words)
    assert (ended.code, "sent 6 stages" in ended.out) == (0, True), ended.err
    second = quantool(*words)
    assert "nothing to send: 6 stages are on their way already" in second.out
    other = quantool(*words, "--set", "seed=7")
    assert (other.code, "stages of another configuration are on their way" in other.err) == (3, True)
    locked = [stage.job for stage in submitting.look(tmp_path / "out") if stage.name == "make fake/Q4_K_M"]
    here.ask("scancel", *locked)
    here.ask("scontrol", "update", "partitionname=main", "state=up")
    failed = quantool("status", tmp_path / "out", "--wait", "-q")
    assert (failed.code, "make fake/Q4_K_M: it has no job" in failed.err) == (4, True), failed.err
    assert (tmp_path / "out" / "done.txt").read_text().splitlines() == ["made Q8_0", "judged fake/Q8_0"]
    third = quantool(*words)
    assert "sent 3 stages" in third.out, third.out
    waited = quantool("status", tmp_path / "out", "--wait", "-q")
    assert (waited.code, waited.out) == (0, run.out), waited.err
    assert sorted((tmp_path / "out" / "done.txt").read_text().splitlines()) == sorted(
        (alone / "done.txt").read_text().splitlines()
    )
    assert lasting(tmp_path / "out" / "model-FAKE") == lasting(alone / "model-FAKE")
    assert quantool(*words).out.startswith("nothing to send: everything is done")


@real
@pytest.mark.slurm
def test_a_requeued_job_goes_on(
    here: OneNode, config_file: Write, quantool: Callable[..., Any], tmp_path: Path
) -> None:
    words = (
        "submit",
        config_file(("Q8_0",), ending="wait"),
        "-q",
        "--set",
        "cluster={slurm: {partition: main}}",
    )
    assert quantool(*words).code == 0

    def begun() -> str:
        until = time.monotonic() + 60
        while not (tmp_path / "out" / "pid.txt").exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        return (tmp_path / "out" / "pid.txt").read_text()

    first = begun()
    (tmp_path / "out" / "pid.txt").unlink()
    (job,) = re.findall(r"^(\d+) RUNNING$", here.ask("squeue", "-h", "-o", "%i %T"), re.MULTILINE)
    here.ask("scontrol", "requeue", job)
    assert begun() != first  # the same job, begun again; the claim of the killed one held nobody up
    assert not Path(f"/proc/{first}").exists()
    here.ask("scancel", "-u", "root")
