from __future__ import annotations

from quantool.methods._compressed.cuda import fp8_warning


def test_hopper_and_ada_need_no_warning() -> None:
    assert fp8_warning([(9, 0), (8, 9)]) is None


def test_older_gpus_and_none_are_told() -> None:
    assert "8.0" in (fp8_warning([(9, 0), (8, 0)]) or "")
    assert "none here" in (fp8_warning([]) or "")
