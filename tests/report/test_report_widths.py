"""A student with several widths in the report: the table, the curve, and what the answer makes of them."""

import pytest

from edgekd import report
from edgekd.report import charts, html, markdown, tables, terminal, units, views, widths

POINTS = {"student": (0.98, 4.0), "student@0.5": (0.95, 1.5), "student@0.25": (0.9, 0.6)}


@pytest.fixture
def slim(writer):
    """Three widths on one backend, in one comparison; the narrowest is measured on another one too."""
    writer.model("student", "distill", params=80_000, macs=12_000_000, accuracy=0.98)
    for number, (role, (accuracy, _)) in enumerate(POINTS.items()):
        writer.model(role, "width", params=80_000 >> 2 * number, macs=12_000_000 >> 2 * number, accuracy=accuracy)
    cells = [
        writer.cell("onnxruntime", "float32", role, middle_ms=middle, accuracy=accuracy)
        for role, (accuracy, middle) in POINTS.items()
    ]
    writer.comparison("onnxruntime", cells, [2.5, 6.0])
    writer.cell("openvino", "float32", "student@0.25", middle_ms=0.5, accuracy=0.9)
    return writer


def test_widths_stand_widest_first_with_what_they_cost(slim):
    found = tables.build(slim.save())
    assert [(entry["width"], entry["params"], entry["engines"]) for entry in found["widths"]] == [
        (1.0, 80_000, [0]),
        (0.5, 20_000, [1]),
        (0.25, 5_000, [2, 3]),
    ]
    rows = widths.view(found).rows
    assert [row[0] for row in rows] == ["1", "0.5", "0.25", "0.25"]
    assert [row[6] for row in rows] == ["–", "2.50× [2.45, 2.55]", "6.00× [5.88, 6.12]", "–"]
    assert rows[1][4] == "95.00 %"


def test_a_width_without_an_engine_keeps_its_row(slim):
    slim.model("student@0.75", "width", params=45_000, macs=7_000_000, accuracy=0.97)
    row = widths.view(tables.build(slim.save())).rows[1]
    assert row == ("0.75", "45.0 k", "7.00 M", "PyTorch", "97.00 %", "–", "–", "–")


def test_the_curve_goes_through_the_measured_engines(slim):
    found = tables.build(slim.save())
    (chart,) = charts.widths_curve(found)
    (line,) = chart.data  # of one point on openvino there is no curve
    assert line["name"] == "onnxruntime float32"
    assert line["text"] == ["0.25", "0.5", "1"]
    assert line["y"] == pytest.approx([90, 95, 98])
    assert line["x"] == [found["engines"][index]["latency_ms"]["p50"] for index in (2, 1, 0)]
    slim.data["cells"][1]["status"], slim.data["cells"][2]["status"] = "failed", "failed"
    assert charts.widths_curve(tables.build(slim.save())) == []


def test_every_printer_has_them(slim):
    found = report.write(slim.save())
    page = html.render(found)
    assert 'id="widths"' in page
    assert "Widths of the student" in markdown.render(found)
    assert "widths of the student" in terminal.lines(found)
    assert "student at width 0.5, cut out of the slimmable net" in page


def test_the_answer_is_the_full_width_unless_the_budget_chose_another(slim):
    found = tables.build(slim.save())
    assert found["answer"]["compressed"] == 0
    assert found["answer"]["reference"] is None, "a narrower width is nothing that the full one replaces"
    checks = [{"limit": "latency_ms", "allowed": 2.0, "measured": 1.5, "ok": True, "cell": 1}]
    slim.data["budget"] = {"limits": {"latency_ms": 2.0}, "checks": checks, "ok": True}
    found = tables.build(slim.save())
    assert (found["answer"]["compressed"], found["answer"]["reference"]) == (1, 0)
    assert found["answer"]["params"]["compressed"] == 20_000
    sentence = views.headline(found)
    assert sentence.startswith("The compressed student at width 0.5 (float32 on onnxruntime")
    assert "2.50× as fast as its full width" in sentence


def test_a_student_of_one_width_has_no_such_section(full):
    found = tables.build(full)
    assert found["widths"] == []
    assert 'id="widths"' not in html.render(found)


def test_names_of_widths():
    assert units.role("student@0.5") == "student at width 0.5"
    assert units.stage_title("student@0.5", "ptq") == "student at width 0.5, quantized after training"
    assert [widths.of_role(role) for role in ("student", "student@0.25", "student_alone", "teacher")] == [1.0, 0.25, None, None]
