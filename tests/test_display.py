import io
import json

import pytest
from rich.console import Console

from edgekd.display import Display

RECORD = {"epoch": 1, "terms": {"task": 0.51234, "kd": 1.5}, "val": 0.875, "images_per_s": 1234.5}


@pytest.fixture
def plain():
    """A display that writes to a file, and what it has written."""
    stream = io.StringIO()
    return Display(console=Console(file=stream, width=80, highlight=False)), stream


@pytest.fixture
def terminal():
    """A display on a terminal of 100 columns."""
    stream = io.StringIO()
    return Display(console=Console(file=stream, width=100, force_terminal=True, highlight=False, color_system=None)), stream


def test_lines_go_to_standard_error_and_stay_whole(capsys):
    display = Display()
    display.say("a line of " + "many " * 60 + "words")
    display.warn("look")
    display.stage("teacher", "teacher")
    display.stage("distill", "student")
    display.reused("01-teacher-0a1b2c3d4e5f")
    display.trained("distill", "accuracy", 0.87654, 12.34)
    display.close()
    out, err = capsys.readouterr()
    assert out == ""  # for results
    assert err.splitlines() == [
        "a line of " + "many " * 60 + "words",
        "warning: look",
        "teacher",
        "distill (student)",
        "reused 01-teacher-0a1b2c3d4e5f",
        "  distill: accuracy 0.8765 on the test split, 12.3 s",
    ]


def test_quiet_is_silent(capsys, tmp_path):
    display = Display(quiet=True)
    display.say("x")
    display.warn("x")
    display.stage("distill", "student")
    display.step("01-distill", 1, 10, 50)
    display.epoch("01-distill", 1, RECORD)
    display.trained("distill", "accuracy", 0.5, 1.0)
    display.cell({"backend_name": "null", "precision": "int8", "role": "student", "status": "failed", "reason": "x"}, tmp_path)
    display.close()
    assert capsys.readouterr() == ("", "")


def test_brackets_in_messages_are_text(plain):
    display, stream = plain
    display.say("weights[0] and [red]this[/red]")
    display.warn("[/] closes nothing, and \\")
    display.cell(
        {"backend_name": "null", "precision": "int8", "role": "student", "status": "skipped", "reason": "shape [1, 3] [bold]"},
        None,
    )
    assert stream.getvalue().splitlines() == [
        "weights[0] and [red]this[/red]",
        "warning: [/] closes nothing, and \\",
        "  null int8 (student): skipped: shape [1, 3] [bold]",
    ]


def test_engines(plain, tmp_path):
    display, stream = plain
    (tmp_path / "05-bench-x").mkdir()
    record = {"latency_ms": {"p50": 1.23456}, "metric": {"name": "accuracy", "value": 0.9}, "size_bytes": 20480}
    (tmp_path / "05-bench-x" / "record.json").write_text(json.dumps(record))
    cell = {"backend_name": "openvino", "precision": "int8", "role": "student", "status": "measured", "bench": "05-bench-x"}
    display.cell({**cell, "reason": None}, tmp_path)
    display.cell({**cell, "status": "failed", "reason": "the library refused"}, tmp_path)
    assert stream.getvalue().splitlines() == [
        "  openvino int8 (student): p50 1.235 ms, accuracy 0.9000, 20 KiB",
        "  openvino int8 (student): failed: the library refused",
    ]


def test_without_a_terminal_epochs_are_lines_at_intervals_and_the_last_one_always(plain, monkeypatch):
    display, stream = plain
    now = [1000.0]
    monkeypatch.setattr("edgekd.display.time.monotonic", lambda: now[0])
    for epoch in range(1, 11):
        display.step("01-teacher", epoch, 10, 50)
        display.epoch("01-teacher", 10, {**RECORD, "epoch": epoch})
        now[0] += Display.EVERY_S / 4
    shown = [line.split()[2] for line in stream.getvalue().splitlines()]
    assert shown == ["1/10", "6/10", "10/10"]
    assert stream.getvalue().splitlines()[0] == "  01-teacher epoch 1/10 task 0.5123 kd 1.5000 val 0.8750 1234 images/s"
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_epochs_move_a_bar_that_leaves_no_trace(terminal):
    display, stream = terminal
    display.stage("distill", "student")
    for step in range(1, 4):
        display.step("01-distill", step, 4, 50 * step)
    display.epoch("01-distill", 2, RECORD)
    display.step("01-distill", 4, 4, 200)
    display.say("next")
    text = stream.getvalue()
    assert "01-distill" in text
    assert "4/4" in text
    assert "val 0.8750" in text
    assert "images/s" in text
    assert text.rstrip().endswith("next")  # below where the bar was
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h") < text.index("next")  # the cursor is hidden, and comes back
    display.close()
    display.close()  # closing twice is nothing


def test_another_training_is_another_bar_and_a_resumed_one_begins_where_it_stopped(terminal):
    display, stream = terminal
    display.step("01-teacher", 1, 4, 50)
    display.step("02-distill", 31, 40, 50)
    display.close()
    text = stream.getvalue()
    assert "30/40" in text
    assert "0/40" not in text.replace("30/40", "")


def test_closing_after_an_error_gives_the_cursor_back(terminal):
    display, stream = terminal

    def interrupted():
        try:
            display.step("01-teacher", 1, 4, 50)
            raise KeyboardInterrupt
        finally:
            display.close()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
