import json
import shutil
from pathlib import Path

import pytest

from quantool.errors import ConfigError, SourceError
from quantool.given_artifacts import artifact_of, artifacts_of
from quantool.records import sha256_of
from tests.checkpoint import tensors, write_checkpoint, write_shards
from tests.gguf_bytes import write_shards as write_gguf_shards


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of two tensors: 64 elements of 32 bits and 64 of 16."""
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("a", np.zeros((2, 32), np.float32))
    writer.add_tensor("b", np.zeros((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("tiny-Q8_0.gguf", "Q8_0"),
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("model.q4_k_m.gguf", "Q4_K_M"),
        ("model_iq2_xxs.gguf", "IQ2_XXS"),
        ("a-BF16.gguf", "BF16"),
        ("a-F16.gguf", "F16"),
        ("a-TQ1_0.gguf", "TQ1_0"),
        ("a-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Q6_K.gguf", "Q6_K"),
    ],
)
def test_the_level_of_a_gguf_is_read_from_its_name(
    tmp_path: Path, gguf_file: Path, name: str, level: str
) -> None:
    shutil.copyfile(gguf_file, tmp_path / name)
    artifact, engine = artifact_of(tmp_path / name)
    assert (artifact.level, artifact.output, engine) == (level, f"given/{level}", "llama.cpp")


def test_what_a_gguf_holds(gguf_file: Path) -> None:
    artifact, _ = artifact_of(gguf_file)
    (file,) = artifact.files
    assert (file.name, file.bytes) == (gguf_file.name, gguf_file.stat().st_size)
    assert file.sha256 == sha256_of(gguf_file)
    assert artifact.folder == gguf_file.parent
    assert artifact.bits_per_weight == 24.0


def test_a_level_that_is_said_comes_first(gguf_file: Path) -> None:
    assert artifact_of(gguf_file, "Q4_0")[0].level == "Q4_0"


@pytest.mark.parametrize("name", ["model.gguf", "tiny-instruct.gguf", "salamandra-2b.gguf"])
def test_a_name_without_a_level(tmp_path: Path, gguf_file: Path, name: str) -> None:
    shutil.copyfile(gguf_file, tmp_path / name)
    with pytest.raises(ConfigError, match="no level can be read") as caught:
        artifact_of(tmp_path / name)
    assert "--level" in caught.value.hint


def test_the_shards_of_a_gguf_belong_together(tmp_path: Path) -> None:
    paths = write_gguf_shards(tmp_path, "tiny-Q8_0", [["a", "b"], ["c"], ["d"]])
    artifact, _ = artifact_of(paths[0])
    assert [file.name for file in artifact.files] == [path.name for path in paths]
    assert artifact.level == "Q8_0"
    assert artifact.bits_per_weight == 32.0
    with pytest.raises(SourceError, match="is not the first shard") as caught:
        artifact_of(paths[1])
    assert caught.value.hint == f"give {paths[0].name}"
    shutil.copyfile(paths[0], paths[2])
    with pytest.raises(SourceError, match=r"number 3 of 3 by its name, but its split\.no is 0"):
        artifact_of(paths[0])
    paths[2].unlink()
    with pytest.raises(SourceError, match=f"there is no {paths[2].name}$"):
        artifact_of(paths[0])


def test_a_folder_for_transformers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny-FP8_DYNAMIC")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    artifact, engine = artifact_of(folder)
    assert (artifact.level, engine) == ("FP8_DYNAMIC", "transformers")
    assert {file.name for file in artifact.files} == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    stored = tensors().values()
    assert artifact.bits_per_weight == 8 * sum(t.nbytes for t in stored) / sum(t.size for t in stored)


def test_a_folder_of_shards(tmp_path: Path) -> None:
    artifact, _ = artifact_of(write_shards(tmp_path / "tiny"), "W4A16")
    assert artifact.level == "W4A16"
    assert (
        artifact.bits_per_weight
        == artifact_of(write_checkpoint(tmp_path / "one"), "W4A16")[0].bits_per_weight
    )


@pytest.fixture
def repository(tmp_path: Path, gguf_file: Path) -> Path:
    """What a download of a published folder holds: two levels, one of them in shards, and all that lies beside."""
    write_gguf_shards(tmp_path, "tiny-Q8_0", [["a"], ["b"]])
    for name in ("tiny-F16.gguf", "tiny-imatrix.gguf"):
        shutil.copyfile(gguf_file, tmp_path / name)
    (tmp_path / "README.md").write_text("# tiny")
    return tmp_path


def record(folder: Path, levels: dict[str, list[str]]) -> None:
    reports = [
        {"artifact": {"level": level, "files": [{"name": name} for name in names]}}
        for level, names in levels.items()
    ]
    (folder / "quantool.json").write_text(json.dumps({"reports": reports}))


def test_every_model_of_a_folder(repository: Path) -> None:
    found = artifacts_of(repository)
    assert [(one.level, [file.name for file in one.files], engine) for one, engine in found] == [
        ("F16", ["tiny-F16.gguf"], "llama.cpp"),
        ("Q8_0", ["tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"], "llama.cpp"),
    ]
    assert artifacts_of(repository / "tiny-F16.gguf") == [artifact_of(repository / "tiny-F16.gguf")]


def test_levels_are_those_that_were_recorded(repository: Path) -> None:
    (repository / "tiny-F16.gguf").rename(repository / "tiny.gguf")
    with pytest.raises(ConfigError, match="no level can be read from the name 'tiny'"):
        artifacts_of(repository)
    shards = [file.name for file in sorted(repository.glob("tiny-Q8_0-*"))]
    record(repository, {"BF16": ["tiny.gguf"], "Q8_0": shards})
    assert [one.level for one, _ in artifacts_of(repository)] == ["Q8_0", "BF16"]
    record(repository, {"BF16": ["another.gguf"]})  # says nothing of these files
    (repository / "tiny.gguf").rename(repository / "tiny-Q6_K.gguf")
    assert [one.level for one, _ in artifacts_of(repository)] == ["Q6_K", "Q8_0"]
    assert artifacts_of(repository / "tiny-Q6_K.gguf", "F16")[0][0].level == "F16"


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"reports": [{}]}', '{"reports": [{"artifact": 1}]}', "[" * 100_000]
)
def test_a_record_that_is_damaged(repository: Path, text: str) -> None:
    (repository / "quantool.json").write_text(text)
    with pytest.raises(ConfigError, match=r"quantool\.json is damaged") as caught:
        artifacts_of(repository)
    assert "remove it" in caught.value.hint


def test_one_level_cannot_be_said_of_several(repository: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--level Q4_0 is one level, but .* holds tiny-F16\.gguf, tiny-Q8_0"
    ):
        artifacts_of(repository, "Q4_0")
    for name in repository.glob("tiny-Q8_0-*"):
        name.unlink()
    assert [one.level for one, _ in artifacts_of(repository, "Q4_0")] == ["Q4_0"]


def test_a_shard_that_a_folder_lacks(repository: Path) -> None:
    (repository / "tiny-Q8_0-00002-of-00002.gguf").unlink()
    with pytest.raises(SourceError, match=r"there is no tiny-Q8_0-00002-of-00002\.gguf"):
        artifacts_of(repository)


def test_a_downloaded_folder_for_transformers(tmp_path: Path) -> None:
    """A snapshot's folder is named after the commit, and the client leaves files of its own there."""
    folder = write_checkpoint(tmp_path / "1111111111111111111111111111111111111111")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "CACHEDIR.TAG").touch()
    (folder / ".gitattributes").touch()
    record(folder, {"FP8_DYNAMIC": ["config.json", "model.safetensors"]})
    ((artifact, engine),) = artifacts_of(folder)
    assert (artifact.level, engine) == ("FP8_DYNAMIC", "transformers")
    assert not [file.name for file in artifact.files if file.name.startswith(".")]


@pytest.mark.parametrize("name", ["nothing", "text.txt", "folder", "nothing.gguf", "folder.gguf"])
def test_what_is_no_artifact(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.gguf").mkdir()
    said = "does not exist" if name.startswith("nothing") else "is no artifact"
    with pytest.raises(ConfigError, match=f"{name} {said}") as caught:
        artifact_of(tmp_path / name)
    assert ".gguf file" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all, just text"])
def test_a_file_that_only_has_the_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a-Q8_0.gguf").write_bytes(content)
    with pytest.raises(SourceError, match=r"a-Q8_0\.gguf is not a GGUF file"):
        artifact_of(tmp_path / "a-Q8_0.gguf")


def test_a_file_that_was_cut_off(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "a-Q8_0.gguf").write_bytes(gguf_file.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"a-Q8_0\.gguf is damaged or cut off: 'b' ends at byte"):
        artifact_of(tmp_path / "a-Q8_0.gguf")


def test_a_file_without_weights(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "vocabulary-F16.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match="holds no tensors"):
        artifact_of(tmp_path / "vocabulary-F16.gguf")
