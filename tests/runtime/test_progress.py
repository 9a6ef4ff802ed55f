import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

import pytest

from quantool.runtime.progress import Progress, amount


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (999.7, "B", "1.0 kB"),
        (1000, "B", "1.0 kB"),
        (12_300_000, "B", "12.3 MB"),
        (999_949, "B", "999.9 kB"),
        (999_960, "B", "1.0 MB"),
        (999_999_999, "B", "1.0 GB"),
        (1_000_000_000_000, "B", "1000.0 GB"),
        (-2500, "B", "-2.5 kB"),
        (2_000_000_000, "", "2.0 G"),
        (7, "", "7"),
        (1500, "tok", "1.5 ktok"),
    ],
)
def test_amount(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


def test_plain_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    shown.say("one")
    shown.warn("two")
    with shown.bar("scan weights", "B") as bar:
        bar.move(1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    *lines, last = err.splitlines()
    assert lines == ["one", "warning: two", "scan weights …"]
    assert last.startswith("scan weights: ")
    assert last.endswith(" s")


def test_quiet_leaves_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(quiet=True)
    shown.say("one")
    shown.warn("two")
    with shown.bar("scan", "B") as bar:
        bar.move(1, 2)
    assert capsys.readouterr() == ("", "warning: two\n")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("quantool.runtime.progress.time.monotonic", lambda: now[0])
    return now


def test_a_long_stage_tells_every_fifteen_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress().bar("quantize", "B") as bar:
        for second in range(41):
            clock[0] = 100.0 + second
            bar.move(second * 1e6, 80e6)
    assert capsys.readouterr().err.splitlines() == [
        "quantize …",
        "quantize: 19 %, 1.0 MB/s, 65 s left",
        "quantize: 38 %, 1.0 MB/s, 50 s left",
        "quantize: 40.0 s",
    ]


@pytest.mark.parametrize(("done", "total"), [(0, 10), (10, 0), (0, 0)])
def test_no_guess_without_anything_to_divide(
    clock: list[float], capsys: pytest.CaptureFixture[str], done: float, total: float
) -> None:
    with Progress().bar("x") as bar:
        clock[0] += 100
        bar.move(done, total)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_stage_that_fails_does_not_say_that_it_took_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), Progress().bar("x"):
        raise ValueError("no")
    assert capsys.readouterr().err == "x …\n"


def on_terminal(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> str:
    """What ``action`` shows when standard error is a terminal of 100 columns."""
    read_end, write_end = pty.openpty()
    fcntl.ioctl(write_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with os.fdopen(write_end, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        action()
        stream.flush()
        monkeypatch.undo()
    shown = b""
    with suppress(OSError):  # EIO: all was read and nobody can write any more
        while part := os.read(read_end, 1 << 16):
            shown += part
    os.close(read_end)
    return shown.decode()


def stage(label: str, unit: str, *moves: tuple[float, float], quiet: bool = False) -> Callable[[], None]:
    def run() -> None:
        shown = Progress(quiet=quiet)
        with shown.bar(label, unit) as bar:
            for done, total in moves:
                bar.move(done, total)
        shown.warn("end")

    return run


def test_bytes_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, stage("scan weights", "B", (5_000_000, 20_000_000)))
    assert "5.0/20.0 MB" in text
    assert "\x1b[" in text
    *_, last, warning = text.splitlines()
    assert re.search(r"scan weights: \d+\.\d s$", last)
    assert warning == "warning: end"


def test_counts_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, stage("tokenize", "tok", (3.0, 10.0)))
    assert "3/10 tok" in text
    assert "None" not in text


def test_a_stage_that_never_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, stage("chat template", ""))
    assert "chat template" in text
    assert "None" not in text


def test_quiet_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_terminal(monkeypatch, stage("scan", "B", (1, 2), quiet=True)) == "warning: end\r\n"
