import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from quantool.runtime.progress import Progress, Step, amount, span


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
        (2_000_000_000, "", "2.0 B"),
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


STEPS = [Step("make a", 10), Step("make b", 20), Step("judge a", 30)]


def test_one_line_a_step_without_a_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    with shown.whole():
        with shown.step("read the checkpoint"):
            clock[0] += 4
        shown.expect(STEPS)
        with shown.step("make a"), shown.bar("quantize a", "B") as bar:
            bar.move(1, 2)
            clock[0] += 20  # twice the estimate: the rest is expected to take twice its own
        with shown.step("make b"):
            shown.activity("a check")
            clock[0] += 40
        with shown.step("judge a"), shown.bar("score", "tok") as bar:
            clock[0] += 61
            bar.move(10, 20)
    assert capsys.readouterr().err.splitlines() == [
        "read the checkpoint",
        "[2/4] make a (4 s so far, about 60 s left)",
        "[3/4] make b (24 s so far, about 2 min left)",
        "[4/4] judge a (64 s so far, about 60 s left)",
        "[4/4] judge a: score 50 %, about 61 s left",
        "done in 2 min",
    ]


def test_a_step_that_nobody_expected_counts_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    with shown.whole():
        shown.expect(STEPS[:1])
        for name in ("make again", "make a"):
            with shown.step(name):
                pass
    assert [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        "[1/2] make again", "[2/2] make a", "done in 0 s",
    ]  # fmt: skip


def test_steps_that_need_not_be_taken_count_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    with shown.whole():
        shown.expect(STEPS)
        with shown.step("judge a"):
            pass
    assert capsys.readouterr().err.startswith("[3/3] judge a (0 s so far, about 30 s left)\n")


def test_a_run_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    with pytest.raises(ValueError, match="no"), shown.whole(), shown.step("make a"):
        raise ValueError("no")
    assert "done" not in capsys.readouterr().err
    shown.say("after")
    assert capsys.readouterr().err == "after\n"


def test_a_quiet_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(quiet=True)
    with shown.whole(), shown.step("make a"), shown.bar("quantize"):
        shown.activity("a check")
        shown.warn("two")
    assert capsys.readouterr() == ("", "warning: two\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5340, "89 min"),
        (5400, "1 h 30 min"),
        (86400, "24 h 0 min"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


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
                time.sleep(0.3)  # the line is drawn ten times a second
        shown.warn("end")

    return run


def test_bytes_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, stage("scan weights", "B", (5_000_000, 20_000_000)))
    assert "scan weights" in text
    assert "5.0 MB/20.0 MB  about " in text
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


def test_a_whole_run_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        shown = Progress()
        with shown.whole():
            shown.expect(STEPS)
            with shown.step("make a"), shown.bar("quantize a", "B") as bar:
                bar.move(5_000_000, 20_000_000)
                time.sleep(0.3)
                shown.warn("a thing")
            with shown.step("make b"):
                shown.activity("a check")
                time.sleep(0.3)

    text = on_terminal(monkeypatch, run)
    assert "[1/3] make a · quantize a" in text
    assert "5.0 MB/20.0 MB  about " in text
    assert "[2/3] make b · a check" in text
    assert "warning: a thing" in text
    kept = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line.rpartition("\x1b[2K")[2]) for line in text.splitlines()
    ]
    spinning = re.compile("[\u2800-\u28ff]")
    *above, last = [line.strip() for line in kept if line.strip() and not spinning.search(line)]
    assert above == ["warning: a thing"]
    assert re.fullmatch(r"done in \d+ s", last)


def test_steps_side_by_side_are_one_with_the_time_that_is_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress()
    expected = [Step("make a", 60.0), Step("make b", 60.0), Step("make c", 60.0), Step("pack", 10.0)]
    with progress.whole():
        progress.expect(expected)
        with progress.within("make a"):
            clock[0] += 5  # what all need
        course = progress._course
        assert course is not None
        with progress.together(["make a", "make b", "make c"]), ThreadPoolExecutor(3) as pool:
            entered, moved = threading.Barrier(3), threading.Barrier(4)

            def take(name: str, share: float) -> None:
                with progress.step(name), progress.bar("quantize", "tensors") as bar:
                    entered.wait(20)
                    bar.move(share, 1.0)
                    moved.wait(20)
                    moved.wait(20)

            shares = {"make a": 0.5, "make b": 0.25, "make c": 0.75}
            done = [pool.submit(take, name, share) for name, share in shares.items()]
            moved.wait(20)
            clock[0] += 50
            assert course.label() == "[1-3/4] "
            assert course.share() == ""
            assert sorted(course.activity.split(", ")) == ["a 48 %", "b 24 %", "c 71 %"]
            # 0.475 of the work in 50 s, and ten seconds of packing at the pace of the estimates
            assert course.left() == pytest.approx(50 * (1 - 0.475) / 0.475 + 10, rel=0.01)
            moved.wait(20)
            for each in done:
                each.result()
        with progress.step("pack"):
            pass
    lines = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "[1/4] make a"
    assert sorted(lines[1:4]) == ["[1-3/4] make a", "[1-3/4] make b", "[1-3/4] make c"]
    assert lines[4] == "[4/4] pack"


def test_a_step_goes_on_with_what_was_begun_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with progress.whole():
        progress.expect([Step("make a", 1.0), Step("make b", 1.0)])
        with progress.within("make a"):
            pass
        for name in ("make a", "make b"):
            with progress.step(name):
                pass
    lines = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["[1/2] make a", "[2/2] make b"]
