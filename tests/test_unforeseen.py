import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ended

pytestmark = pytest.mark.usefixtures("plugin")

Command = Callable[..., Ended]


def test_what_nobody_foresaw_is_one_line_and_a_file(
    tmp_path: Path, config_file: Callable[..., Path], quantool: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, the file that was at hand, and the traceback in the run's logs."""

    def packed(*_: object, **_earlier: object) -> None:
        read = tmp_path / "model" / "config.json"
        raise KeyError(f"no key\nin {read.name}")

    monkeypatch.setattr("quantool.pipeline.pack", packed)
    ended = quantool("run", config_file(("Q8_0",)), "--quiet")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    log = tmp_path / "out" / "logs" / "traceback.log"
    error, hint = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert error.startswith(f"error: this should not happen ({tmp_path}/model/config.json): KeyError: ")
    assert str(log) in hint
    assert "raise KeyError" in log.read_text()


def test_without_an_output_folder_the_traceback_goes_to_a_temporary_file(
    quantool: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> None:
        raise RecursionError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("quantool.doctor.examine", broken)
    ended = quantool("doctor")
    assert (ended.code, ended.out) == (1, "")
    match = re.search(r"the traceback is in (\S+);", ended.err)
    assert match is not None
    assert Path(match[1]).parent == tmp_path
    assert "RecursionError" in Path(match[1]).read_text()
