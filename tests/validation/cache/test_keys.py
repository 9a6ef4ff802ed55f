from __future__ import annotations

from pathlib import Path

from quantool.validation._cache.keys import stamp


def test_a_split_file_is_known_by_all_its_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(b"x" * number)
    (tmp_path / "other.gguf").write_bytes(b"y")
    assert [one[1] for one in stamp(tmp_path / "m-00001-of-00002.gguf")] == [1, 2]
    assert [one[1] for one in stamp(tmp_path / "other.gguf")] == [1]


def test_a_moved_folder_is_the_same_and_a_changed_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "one" / "plots").mkdir(parents=True)
    (tmp_path / "one" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "one" / "plots" / "a.png").write_bytes(b"y")
    before = stamp(tmp_path / "one")
    assert [name for name, *_ in before] == ["model.safetensors", "plots/a.png"]
    moved = (tmp_path / "one").rename(tmp_path / "two")
    assert stamp(moved) == before
    (moved / "model.safetensors").write_bytes(b"xx")
    assert stamp(moved) != before
