"""What users of 0.2.0 have runs unchanged."""

from __future__ import annotations

from collections.abc import Callable

import making
import pytest

from tests.e2e.conftest import Ended, Run

pytestmark = pytest.mark.e2e


def test_gguf_example_of_0_2_0_runs(runs: Callable[[str], tuple[Run, Ended]]) -> None:
    _, ended = runs("legacy")
    assert ended.code == 0, ended.err
    output = making.room() / "runs/legacy"
    assert [line.split()[0] for line in ended.out.splitlines()[1:]] == [
        "tiny-5.2M-chat-Q4_K_M.gguf",
        "tiny-5.2M-chat-Q3_K_S.gguf",
    ]
    (told,) = [line for line in ended.err.splitlines() if "keys without effect" in line]
    assert all(key in told for key in ("metrics", "verbose", "log_dir"))
    assert (output / "test_gguf" / "SHA256SUMS").is_file()
    assert making.keys(output / "test_gguf" / "tiny-5.2M-chat-Q3_K_S.gguf")["general.file_type"] == 11
