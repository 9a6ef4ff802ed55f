import hashlib
import os
from pathlib import Path

from quantool.attest.digests import BLOCK, sha256_of_files


def test_every_length_is_hashed_as_hashlib_does(tmp_path: Path) -> None:
    contents = {
        f"{size}.bin": os.urandom(64) * (size // 64) + b"x" * (size % 64)
        for size in (0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size

    found = sha256_of_files(tmp_path, [*contents, "missing"], advance)
    assert found == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()} | {
        "missing": None
    }
    assert done == sum(map(len, contents.values()))
    assert sha256_of_files(tmp_path, []) == {}
