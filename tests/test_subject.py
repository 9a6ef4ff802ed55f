import shutil
from pathlib import Path

import pytest

from quantool.errors import ConfigError
from quantool.records import sha256_of
from quantool.subject import artifact_of
from tests.checkpoint import tensors, write_checkpoint, write_shards


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


def test_the_shards_of_a_gguf_belong_together(tmp_path: Path, gguf_file: Path) -> None:
    names = [f"tiny-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for name in names:
        shutil.copyfile(gguf_file, tmp_path / name)
    artifact, _ = artifact_of(tmp_path / names[0])
    assert [file.name for file in artifact.files] == names
    assert artifact.level == "Q8_0"
    assert artifact.bits_per_weight == 24.0
    with pytest.raises(ConfigError, match="is not the first shard") as caught:
        artifact_of(tmp_path / names[1])
    assert caught.value.hint == f"give {names[0]}"
    (tmp_path / names[2]).unlink()
    with pytest.raises(ConfigError, match=f"lacks {names[2]}$"):
        artifact_of(tmp_path / names[0])


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


def test_a_folder_of_several_files(tmp_path: Path) -> None:
    for name in ("b-Q8_0.gguf", "a-Q4_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"is no artifact but holds a-Q4_0\.gguf, b-Q8_0\.gguf"):
        artifact_of(tmp_path)


def test_a_folder_with_one_file(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(ConfigError, match=f"is no artifact but holds {gguf_file.name}$") as caught:
        artifact_of(gguf_file.parent)
    assert caught.value.hint == "name one of the files"


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
    with pytest.raises(ConfigError, match=r"a-Q8_0\.gguf is not a GGUF file"):
        artifact_of(tmp_path / "a-Q8_0.gguf")


def test_a_file_that_was_cut_off(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "a-Q8_0.gguf").write_bytes(gguf_file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"a-Q8_0\.gguf is not a GGUF file"):
        artifact_of(tmp_path / "a-Q8_0.gguf")


def test_a_file_without_weights(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "vocabulary-F16.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="holds no tensors"):
        artifact_of(tmp_path / "vocabulary-F16.gguf")
