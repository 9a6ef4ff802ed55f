"""Sources on a Hub, served on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest

from quantool.config.schema import Config
from quantool.errors import DependencyError, QuantoolError, SourceError
from quantool.formats.safetensors import check_index
from quantool.hub.download import hub_errors
from quantool.records import Source
from quantool.runtime.progress import Progress
from quantool.source.resolve import resolve
from tests.checkpoint import write_checkpoint, write_json, write_shards
from tests.loopback_hub import Hub, Repository, serving

REPO = "org/some-model"
QUIET = Progress(quiet=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def _served() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


@pytest.fixture
def hub(_served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with one sharded repository; huggingface_hub asks it, with an empty cache."""
    point_to(_served.url, monkeypatch)
    folder = write_shards(tmp_path / "upstream")
    files = content(folder) | {
        "pytorch_model.bin": b"pickle",
        "modeling_own.py": b"",
        "original/consolidated.safetensors": b"other",
        "README.md": b"---\nlicense: apache-2.0\nlanguage: ca\n---\n",
    }
    _served.repositories = {REPO: Repository(files)}
    _served.asked.clear()
    return _served


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def ask(tmp_path: Path, *, weights: bool = False, progress: Progress = QUIET, **keys: Any) -> Source:
    config = Config.model_validate({"model_id": REPO, "cache_dir": tmp_path / "cache", **keys})
    return resolve(config, weights=weights, progress=progress)


def test_a_plan_reads_headers_and_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    source = ask(tmp_path)
    assert (source.model_id, source.name, source.commit) == (REPO, "some-model", "1" * 40)
    assert source.label() == f"{REPO}@{'1' * 40}"
    assert source.card.languages == ("ca",)
    assert source.facts.parameters == 32 * 8 * 2 + 64 + 8
    names = {file.name for file in source.files}
    assert {"model-00001-of-00002.safetensors", "README.md", "chat_template.jinja"} <= names
    assert not names & {"pytorch_model.bin", "modeling_own.py", "original/consolidated.safetensors"}
    ranges = [
        asked.range for asked in hub.asked if asked.path.endswith(".safetensors") and asked.method == "GET"
    ]
    assert len(ranges) == 2
    assert None not in ranges
    assert not list(source.folder.glob("*.safetensors"))


def test_a_run_fetches_the_weights_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    planned = ask(tmp_path)
    hub.asked.clear()
    source = ask(tmp_path, weights=True)
    assert set(hub.downloads()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert source == planned
    assert source.identity() == planned.identity()
    assert check_index(source.folder)
    assert {file.name for file in source.files} == {path.name for path in source.folder.iterdir()}
    hub.asked.clear()
    assert ask(tmp_path, weights=True) == source
    assert hub.downloads() == []


def test_headers_of_the_hub_are_those_of_the_files(hub: Hub, tmp_path: Path) -> None:
    from quantool.formats.safetensors import remote_headers

    files = hub.repositories[REPO].files
    sizes = {name: len(files[name]) for name in files if name.startswith("model-")}
    assert remote_headers(REPO, "main", sizes) == check_index(tmp_path / "upstream")
    with pytest.raises(SourceError, match="truncated"):
        remote_headers(REPO, "main", dict.fromkeys(sizes, 100))
    files["model-00001-of-00002.safetensors"] = b"version https://git-lfs"
    with pytest.raises(SourceError, match="not a safetensors file"):
        remote_headers(REPO, "main", sizes)


def test_the_download_is_shown_in_bytes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[float, float]] = []

    class Shown:
        def move(self, done: float, total: float) -> None:
            moves.append((done, total))

    class Watched(Progress):
        def bar(self, label: str, unit: str = "") -> Any:
            from contextlib import nullcontext

            assert (label, unit) == (f"fetch {REPO}", "B")
            return nullcontext(Shown())

    source = ask(tmp_path, weights=True, progress=Watched(quiet=True))
    total = sum(file.bytes for file in source.files if file.name.endswith(".safetensors"))
    assert moves[-1] == (total, total)


def test_code_is_fetched_only_when_trusted(hub: Hub, tmp_path: Path) -> None:
    ask(tmp_path)
    assert "modeling_own.py" not in hub.downloads()
    source = ask(tmp_path, trust_remote_code=True)
    assert (source.folder / "modeling_own.py").is_file()


def test_the_revision_is_pinned(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories[REPO]
    repository.branches = {"v2"}
    for revision in ("v2", "1" * 40):
        assert ask(tmp_path, revision=revision).commit == "1" * 40
    for revision in ("v3", "2" * 40):
        with pytest.raises(SourceError, match=f"{REPO} has no revision '{revision}'"):
            ask(tmp_path, revision=revision)


def test_another_tokenizer_comes_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other")
    (other / "chat_template.jinja").write_text("OTHER")
    hub.repositories["org/tokenizer"] = Repository(content(other), commit="3" * 40)
    hub.asked.clear()
    source = ask(tmp_path, tokenizer_name="org/tokenizer")
    assert source.facts.chat_template == "OTHER"
    assert source.tokenizer is not None
    assert (source.tokenizer / "tokenizer.json").is_file()
    assert not (source.tokenizer / "model.safetensors").exists()


def spoil(hub: Hub, name: str, change: bytes | None) -> None:
    files = hub.repositories[REPO].files
    files.pop(name)
    if change is not None:
        files[name] = change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", None, "no config.json"),
        ("model-00002-of-00002.safetensors", None, "1 of 2 shards are missing"),
        ("model.safetensors.index.json", None, "shards without"),
        ("tokenizer.json", None, "no tokenizer"),
        ("model-00001-of-00002.safetensors", b"\x02" + bytes(7) + b"{}", "no shard has it|truncated"),
    ],
)
def test_a_repository_that_cannot_be_used(
    hub: Hub, tmp_path: Path, name: str, change: bytes | None, said: str
) -> None:
    spoil(hub, name, change)
    with pytest.raises(SourceError, match=said):
        ask(tmp_path, weights=True)
    assert "pytorch_model.bin" not in hub.downloads()


def test_only_pickles_are_refused_without_a_download(hub: Hub, tmp_path: Path) -> None:
    for name in [name for name in hub.repositories[REPO].files if "safetensors" in name]:
        spoil(hub, name, None)
    with pytest.raises(SourceError, match="pickles"):
        ask(tmp_path, weights=True)
    assert "pytorch_model.bin" not in hub.downloads()


def refuse(tmp_path: Path, kind: type[QuantoolError], said: str, **keys: Any) -> QuantoolError:
    with pytest.raises(kind, match=said) as caught:
        ask(tmp_path, **keys)
    return caught.value


def test_a_repository_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    error = refuse(
        tmp_path, SourceError, "no repository 'org/nothing', or it is private", model_id="org/nothing"
    )
    assert "HF_TOKEN" in error.hint


def test_a_gated_repository_needs_the_token_and_never_shows_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO].gated = True
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        error = refuse(tmp_path, SourceError, f"{REPO} is gated")
        assert "accept its conditions" in error.hint
        assert "hf_" not in error.message + error.hint
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert ask(tmp_path, weights=True).commit == "1" * 40
    assert {asked.token for asked in hub.asked[-4:]} == {hub.token}


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.repositories[REPO].broken = status
    refuse(tmp_path, DependencyError, f"the Hub answers {status}")


def test_a_token_that_may_not_read(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[REPO].broken = 403
    refuse(tmp_path, DependencyError, "does not let this token read")


def test_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = ask(tmp_path, weights=True)
    point_to("http://127.0.0.1:9", monkeypatch)
    assert ask(tmp_path, weights=True) == cached
    error = refuse(tmp_path, DependencyError, "cannot reach the Hub", cache_dir=tmp_path / "empty")
    assert "network" in error.hint


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = ask(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(tmp_path, DependencyError, "HF_HUB_OFFLINE is set", cache_dir=tmp_path / "empty")
    refuse(tmp_path, DependencyError, "HF_HUB_OFFLINE is set")  # the headers are not in the cache
    refuse(tmp_path, DependencyError, "HF_HUB_OFFLINE is set", weights=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    ask(tmp_path, weights=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert ask(tmp_path, weights=True) == ask(tmp_path) == planned
    assert hub.asked == []


def test_a_cache_without_a_listing_is_enough_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(tmp_path, weights=True)
    other = tmp_path / "older" / "models--org--some-model"
    other.mkdir(parents=True)
    for part in ("snapshots", "blobs", "refs"):
        shutil.copytree(tmp_path / "cache" / other.name / part, other / part, symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = ask(tmp_path, weights=True, cache_dir=tmp_path / "older")
    assert source.files == whole.files


def test_a_disk_that_is_too_small(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    hub.asked.clear()
    error = refuse(tmp_path, DependencyError, r"to fetch, 10 B free", weights=True)
    assert "cache_dir" in error.hint
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (OSError(28, "No space left on device"), DependencyError, "the disk is full"),
        (OSError(13, "Permission denied"), DependencyError, "Permission denied"),
        (httpx.ReadTimeout("slow"), DependencyError, "ReadTimeout"),
    ],
)
def test_other_failures(raised: Exception, kind: type[QuantoolError], said: str) -> None:
    with pytest.raises(kind, match=said), hub_errors(REPO, None):
        raise raised


def test_the_environment_is_honoured(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are read when huggingface_hub is imported: two processes."""
    hub.repositories[REPO].gated = True
    code = (
        "import sys, json; from quantool.config.schema import Config; from quantool.runtime.progress import Progress\n"
        "from quantool.source.resolve import resolve\n"
        f"s = resolve(Config(model_id={REPO!r}), weights=True, progress=Progress())\n"
        "print(json.dumps([str(s.folder), s.commit]))"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    answers = []
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**environment, **settings, **more},
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(done.stdout))
        assert hub.token not in done.stderr
        assert "%|" not in done.stderr  # no bar but ours
        hub.repositories.clear()
    assert answers[0] == answers[1]
    assert answers[0][0].startswith(str(tmp_path / "home"))


def test_malformed_json_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    write_json(tmp_path / "index", {"weight_map": {"a": "../../x.safetensors"}})
    spoil(hub, "model.safetensors.index.json", (tmp_path / "index").read_bytes())
    refuse(tmp_path, SourceError, "no safetensors file beside it")
