"""Numbers as text."""

import pytest

from edgekd.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.0001234, "0.000123"),
        (0.05, "0.0500"),
        (0.257, "0.257"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (99.96, "100.0"),
        (1234.5, "1234"),
        (-0.0312, "-0.0312"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert units.number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.98611, "98.61 %"), (0, "0.00 %"), (1, "100.00 %"), (None, "–")])
def test_shares_are_percent(value, text):
    assert units.percent(value) == text


def test_only_shares_are_shown_as_percent():
    assert units.metric({"name": "accuracy", "value": 0.5}) == "50.00 %"
    assert units.metric({"name": "psnr", "value": 31.256}) == "31.26"
    assert units.metric(None) == "–"
    assert units.difference(-0.0139, "accuracy") == "−1.39 points"
    assert units.difference(0.25, "psnr") == "+0.25"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "–"), (None, "–"), (1, "0.000977 KiB"), (70_000, "68.4 KiB"), (2**20, "1.00 MiB")]
)
def test_sizes(value, text):
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(10, "10"), (1000, "1.00 k"), (272_474, "272 k"), (40_800_000, "40.8 M"), (4.1e9, "4.10 G")]
)
def test_counts(value, text):
    assert units.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(1.26, "1.3 s"), (119.9, "119.9 s"), (125, "2 min 5 s"), (None, "–")])
def test_durations(value, text):
    assert units.seconds(value) == text


def test_moments():
    assert units.moment("2026-01-02T03:04:05Z") == "2026-01-02 03:04 UTC"
    assert units.moment("yesterday") == "yesterday"
    assert units.moment(None) is None


def test_intervals_and_factors():
    assert units.ratio(7.142) == "7.14×"
    assert units.interval([0.994, 12.06]) == "[0.994, 12.1]"
    assert units.interval(None) == "–"


def test_plain_text_has_one_line_and_no_controls():
    assert units.plain("a\n\tb\x1b[31m\u202ec\u2028 ") == "a b [31m c"


@pytest.mark.parametrize(
    ("role", "stage", "title"),
    [
        ("teacher", "teacher", "teacher"),
        ("student_alone", "student_alone", "student alone"),
        ("student", "quantize", "student, quantized"),
        ("student", "ptq", "student, quantized after training"),
        ("student", "other", "student, other"),
    ],
)
def test_titles_of_checkpoints(role, stage, title):
    assert units.stage_title(role, stage) == title
