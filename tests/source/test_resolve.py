from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantool.config.schema import Config
from quantool.errors import ConfigError, SourceError
from quantool.records import Source, sha256_of
from quantool.runtime.progress import Progress
from quantool.source import chat_template
from quantool.source.resolve import overlay, resolve
from tests.checkpoint import TEMPLATE, write_checkpoint, write_json, write_shards

QUIET = Progress(quiet=True)


def local(model_id: str | Path, **keys: Any) -> Source:
    return resolve(Config(model_id=str(model_id), **keys), weights=True, progress=QUIET)


def test_a_local_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "my-model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("optimizer.pt", "modeling_x.py", "tokenizer_x.py", "notes.txt", "tokenizer.bin"):
        (folder / name).write_bytes(b"not part of it")
    source = local(folder)
    assert (source.model_id, source.name, source.commit, source.folder) == (
        str(folder),
        "my-model",
        None,
        folder,
    )
    assert source.label() == str(folder)
    assert source.card.license == "mit"
    assert source.generation == {"eos_token_id": [2, 0], "temperature": 0.6}
    assert source.facts.eos_token_ids == (2, 0)
    assert source.facts.chat_template == TEMPLATE
    assert source.notes == ()
    sizes = {file.name: file.bytes for file in source.files}
    assert sizes == {
        name: (folder / name).stat().st_size
        for name in (
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }
    for file in source.files:
        assert file.sha256 == (None if file.name.endswith(".safetensors") else sha256_of(folder / file.name))


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("m", "./m", "~/m"):
        source = local(written)
        assert (source.model_id, source.name, source.folder) == (written, "m", tmp_path / "m")


def test_its_own_code_is_listed_only_when_trusted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (tmp_path / "own.py").write_text("")
    with pytest.raises(SourceError, match="auto_map"):
        local(tmp_path)
    source = local(tmp_path, trust_remote_code=True)
    assert source.trust_remote_code
    assert "own.py" in {file.name for file in source.files}


def test_a_tokenizer_with_its_own_code(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.T", None]}})
    assert local(tmp_path).facts.vocabulary == 32
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(SourceError, match="the tokenizer needs Python code"):
        local(tmp_path)


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("./none", "./none does not exist"),
        ("/no/such/folder", "does not exist"),
        ("~/none-such", "does not exist"),
        ("a/b/c", "neither a folder here nor a Hub id"),
        ("what is this", "neither a folder here nor a Hub id"),
    ],
)
def test_a_model_id_that_cannot_be_one(model_id: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        local(model_id)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match="is a file"):
        local(tmp_path / "model.gguf")


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="revision 'main'"):
        local(write_checkpoint(tmp_path), revision="main")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_file_that_must_be_there(tmp_path: Path, name: str, said: str) -> None:
    (write_checkpoint(tmp_path) / name).unlink()
    with pytest.raises(SourceError, match=said):
        local(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_malformed_file_names_the_line(tmp_path: Path, name: str) -> None:
    (write_checkpoint(tmp_path) / name).write_text("{\n")
    with pytest.raises(SourceError, match=f"{name}:2:1: not JSON"):
        local(tmp_path)


def test_a_snapshot_in_the_cache_knows_its_id_and_commit(tmp_path: Path) -> None:
    commit = "ab" * 20
    folder = write_checkpoint(tmp_path / "models--org--some-name" / "snapshots" / commit)
    source = local(folder)
    assert (source.model_id, source.name, source.commit) == ("org/some-name", "some-name", commit)
    assert local(folder, revision=commit) == source


def test_identity_follows_content_not_place(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one")
    first = local(one).identity()
    json.dumps(first)
    moved = one.rename(tmp_path / "two")
    assert local(moved).identity() == first
    weights = moved / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    os.utime(weights, ns=(stamp, stamp + 1))
    assert local(moved).identity() != first
    os.utime(weights, ns=(stamp, stamp))
    (moved / "chat_template.jinja").write_text(TEMPLATE.replace("\n", " ", 1))
    assert local(moved).identity() != first


def test_another_tokenizer_is_laid_over_the_model(tmp_path: Path) -> None:
    model, other = write_checkpoint(tmp_path / "model"), write_checkpoint(tmp_path / "other")
    (model / "added_tokens.json").write_text("{}")
    (model / "README.md").write_text("the model's")
    (other / "README.md").write_text("not this one")
    (other / "tokenizer.model").write_bytes(b"pieces")
    (other / "chat_template.jinja").write_text("OTHER")
    source = local(model, tokenizer_name=str(other))
    assert source.facts.chat_template == "OTHER"
    assert source.facts.has_sentencepiece
    assert source.identity() != local(model).identity()
    for _ in range(2):
        laid = overlay(source, tmp_path / "work" / "overlay")
        assert {path.name for path in laid.folder.iterdir()} == {file.name for file in source.files}
        assert "added_tokens.json" not in {path.name for path in laid.folder.iterdir()}
        for file in laid.files:
            origin = other if file.name.startswith(("tokenizer", "chat")) else model
            assert (laid.folder / file.name).resolve() == origin / file.name
    assert laid.identity() == source.identity()
    plain = local(model)
    assert overlay(plain, tmp_path / "unused") is plain
    assert not (tmp_path / "unused").exists()


def test_another_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty has no tokenizer"):
        local(write_checkpoint(tmp_path / "model"), tokenizer_name=str(tmp_path / "empty"))


def test_resolving_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from quantool.config.schema import Config; from quantool.runtime.progress import Progress; import quantool.source.resolve as s;"
        f"s.resolve(Config(model_id={str(write_checkpoint(tmp_path))!r}), weights=True, progress=Progress(quiet=True));"
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "added_tokens.json",
        "generation_config.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a":' * 5000, "nested more than 64 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of more than 40 digits"),
        (b'{"\xff": 1}', "not UTF-8"),
    ],
)
def test_a_json_file_that_would_harm_whoever_reads_it(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (write_checkpoint(tmp_path) / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"{name}: {said}"):
        local(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_sampling_that_is_no_number(tmp_path: Path, number: str) -> None:
    (write_checkpoint(tmp_path) / "generation_config.json").write_text(f'{{"temperature": {number}}}')
    with pytest.raises(SourceError, match=rf"generation_config\.json: .*{number}"):
        local(tmp_path)


def test_a_template_that_does_not_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (write_checkpoint(tmp_path) / "chat_template.jinja").write_text(loops)
    with pytest.raises(
        SourceError, match=r"chat_template\.jinja: the chat template does not end within 1 s of processor"
    ):
        local(tmp_path)
