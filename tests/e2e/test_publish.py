"""Real levels on a Hub on loopback: published whole, downloaded afresh, and judged from the download."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import making
import pytest

from quantool.records import sha256_of
from tests.e2e.conftest import DOCS, PATIENCE, WIDE, quantool
from tests.loopback import child
from tests.loopback_hub import Fault, Repository, sha256
from tests.pushing import WritableHub

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own PUT
]

GGUF, FP8 = "org/tiny-GGUF", "org/tiny-FP8-dynamic"
CANARY = "hf_canaryOfTheTest0123456789"


@pytest.fixture
def hub(hub: WritableHub) -> WritableHub:
    """The Hub, with a token that would be seen wherever it turned up."""
    hub.token = CANARY
    return hub


def job(folder: Path, **keys: Any) -> Path:
    """GGUF levels and an FP8 checkpoint of the tiny chat model, each for a repository."""
    wanted = {
        "model_id": str(making.TINY),
        "output_path": str(folder / "out"),
        "push_to_hub": True,
        "quantizations": [
            {
                "method": "gguf",
                "quant_level": ["Q8_0", "Q4_K_M"],
                "quantization_config": making.QWEN2,
                "repo_id": GGUF,
            },
            {"method": "fp8", "quant_level": "FP8_DYNAMIC", "repo_id": FP8},
        ],
        "validation": {
            "max_tokens": 512,
            "context": 128,
            "corpora": [DOCS],
            "gates": WIDE,
            "checks": ["perplexity", "integrity"],
        },
        **keys,
    }
    (folder / "job.yaml").write_text(json.dumps(wanted))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its output for the others."""
    return tmp_path_factory.mktemp("published")


def start(hub: WritableHub, folder: Path, cache: Path, *words: object, **variables: str) -> Any:
    own = {"XDG_CACHE_HOME": str(cache), "OMP_WAIT_POLICY": "PASSIVE", **variables}
    return child(hub, folder, *words, **own)


def test_a_run_that_is_killed_while_it_uploads_ends_with_what_downloads_prove(
    hub: WritableHub, cache: Path, kept: Path, tmp_path: Path
) -> None:
    arrived, release = threading.Event(), threading.Event()

    def stall() -> None:
        arrived.set()
        release.wait(PATIENCE)

    file = job(kept)
    hub.faults = [Fault("PUT /objects/", "none"), Fault("PUT /objects/", "drop", before=stall)]
    with start(hub, kept, cache, file, HF_HUB_DISABLE_XET="1") as run:
        while not arrived.wait(1):
            assert run.poll() is None, run.communicate()
        run.send_signal(signal.SIGKILL)
        told = list(run.communicate(timeout=10))
    release.set()
    assert set(hub.repositories[GGUF].files) == {".gitattributes"}
    first = next(iter(hub.objects))
    with start(hub, kept, cache, file, HF_HUB_DISABLE_XET="1") as run:
        told += run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, told[-1]
    assert hub.put(first) == 1
    assert len(hub.objects) == len({asked.path for asked in hub.sent("PUT")}) == 3
    for repo_id in (GGUF, FP8):
        assert len(hub.sent("POST", f"{repo_id}/commit/main")) == 1
        found = download(repo_id, tmp_path / repo_id.partition("/")[2])
        assert_sums(found)
    assert_judged(cache, tmp_path, file, tmp_path / "tiny-GGUF")
    assert_judged(cache, tmp_path, file, tmp_path / "tiny-FP8-dynamic", "--level", "FP8_DYNAMIC")
    assert CANARY not in "".join(told)
    assert [path for path in kept.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []


def download(repo_id: str, place: Path) -> Path:
    """A fresh download."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, local_dir=place, token=CANARY))


def assert_sums(folder: Path) -> None:
    """The download is what SHA256SUMS and the record in it say."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {line[66:]: line[:64] for line in lines} == {
        line[66:]: sha256_of(folder / line[66:]) for line in lines
    }
    record = json.loads((folder / "quantool.json").read_text())
    assert {report["verdict"] for report in record["reports"]} == {"PASS"}
    named = {file["name"] for report in record["reports"] for file in report["artifact"]["files"]}
    assert named <= {line[66:] for line in lines}


def assert_judged(cache: Path, folder: Path, file: Path, artifact: Path, *words: str) -> None:
    command = (
        "validate",
        artifact,
        "--reference",
        making.TINY,
        "--config",
        file,
        "--output",
        folder / "judged",
    )
    run = quantool(*map(str, (*command, *words)), cache=cache)
    out, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, err
    assert "PASS" in out


def test_levels_that_go_through_xet_one_by_one(
    hub: WritableHub, cache: Path, kept: Path, tmp_path: Path
) -> None:
    """Everything was made and judged before: what is left is upload, deletion, and one commit a repository."""
    import hf_xet  # type: ignore[import-untyped]

    if not (kept / "out" / "report.json").is_file():
        pytest.skip("the run that this one continues did not end")
    shutil.copytree(kept / "out", tmp_path / "out", symlinks=True)
    hub.cas = tmp_path / "cas"
    hub.cas.mkdir()
    heavy = [path for path in (tmp_path / "out").glob("*/*") if path.suffix in (".gguf", ".safetensors")]
    assert len(heavy) == 3
    for path in heavy:
        hub.xet[sha256_of(path)] = hf_xet.hash_files([str(path)])[0].hash
    file = job(tmp_path, disk_bounded=True, publish={"tag": "v1"})
    hub.faults = [Fault(f"POST .*{FP8}/commit/", status=500)]
    for code in (6, 0):
        with start(hub, tmp_path, cache, file) as run:
            out, err = run.communicate(timeout=PATIENCE)
        assert run.returncode == code, err
        assert "score" not in err
        assert CANARY not in out + err
        assert [path for path in heavy if path.exists()] == []
    assert hub.sent("PUT") == []
    for repo_id in (GGUF, FP8):
        repository: Repository = hub.repositories[repo_id]
        assert repository.tags == {"v1": repository.commit}
        found = download(repo_id, tmp_path / repo_id.partition("/")[2])
        assert_sums(found)
        assert {path.name: sha256(repository.files[path.name]) for path in found.glob("*.gguf")} == {
            path.name: sha256_of(path) for path in found.glob("*.gguf")
        }
