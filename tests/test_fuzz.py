from __future__ import annotations

import pytest

from tests import fuzz


@pytest.mark.e2e
@pytest.mark.parametrize("reader", sorted(fuzz.READERS))
def test_bad_input_is_refused_without_a_traceback(reader: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A few of the cases that ``python -m tests.fuzz`` runs by the thousand."""
    assert fuzz.main(["--cases", "15", "--reader", reader]) == 0, capsys.readouterr().out


def test_the_harness_counts_what_is_bad(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(dice: object, folder: object) -> None:
        raise RecursionError

    def hungry(dice: object, folder: object) -> None:
        assert bytearray(b"x" * (256 << 20)).count(1) == 0

    monkeypatch.setattr(fuzz, "READERS", {"broken": (broken, 1), "hungry": (hungry, 1)})
    assert fuzz.main(["--cases", "2", "--reader", "broken"]) == 1
    assert "broken: 2 TRACEBACK" in capsys.readouterr().out
    assert fuzz.main(["--cases", "1", "--reader", "hungry"]) == 0
    monkeypatch.setattr(fuzz, "MEMORY", 64 << 20)
    assert fuzz.main(["--cases", "1", "--reader", "hungry"]) == 1
    assert "hungry: 1 MEMORY" in capsys.readouterr().out
