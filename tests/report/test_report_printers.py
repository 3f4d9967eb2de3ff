"""Markdown, HTML and terminal print the same data, whatever text is in it, and the page needs no network."""

import html.parser
import json
import re
import subprocess
import sys

import plotly.graph_objects
import pytest

from edgekd import report
from edgekd.report import charts, facts, markdown, terminal, views
from edgekd.report.html import cards, script_json
from edgekd.report.views import Table, table


class Page(html.parser.HTMLParser):
    """What a browser would see: elements, text outside scripts, and the contents of scripts by type."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self.scripts, self.open = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes).get("type"), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            kind, content = self.scripts[-1]
            self.scripts[-1] = (kind, content + data)
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all_text(self):
        return " ".join(" ".join(self.text).split())


def outputs(run):
    found = report.write(run)
    page = Page((run / "report" / "report.html").read_text(encoding="utf-8"))
    return found, page, (run / "report" / "report.md").read_text(encoding="utf-8")


def all_charts(found):
    makers = (
        charts.accuracy_against_latency,
        charts.latencies,
        charts.comparisons,
        charts.validation,
        charts.terms,
        charts.layers,
    )
    return [chart for maker in makers for chart in maker(found)]


def unescaped(markdown_text):
    for character in "\\`*_|[]":
        markdown_text = markdown_text.replace("\\" + character, character)
    return markdown_text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_every_engine_says_the_same_everywhere(full):
    found, page, md = outputs(full)
    text, plain_md, shown = page.all_text(), unescaped(md), "\n".join(report.lines(found))
    for engine in found["engines"]:
        if engine["latency_ms"]:
            p50, p99 = (f"{engine['latency_ms'][key]:#.3g}" for key in ("p50", "p99"))
            accuracy, memory = f"{100 * engine['metric']['value']:.2f} %", f"{engine['peak_memory_mib']:.1f}"
            md_row = next(
                line
                for line in plain_md.splitlines()
                if line.startswith(f"| {engine['backend']} | {engine['role']} | {engine['precision']} |")
            )
            line = next(
                line
                for line in shown.splitlines()
                if line.split()[:3] == [engine["backend"], engine["role"], engine["precision"]]
            )
            for value in (p50, p99, accuracy, memory):
                assert value in md_row
                assert value in line
                assert value in text
        else:
            assert engine["reason"] in text
            assert engine["reason"] in plain_md
            assert engine["reason"].split()[0] in shown


def test_every_table_is_in_markdown_and_html(full):
    found, page, md = outputs(full)
    text, plain_md = page.all_text(), " ".join(unescaped(md).split())
    for view in (
        views.answer,
        views.models,
        views.engines,
        views.comparisons,
        views.budget,
        views.layers,
        views.skipped,
        views.parity,
    ):
        content = view(found)
        assert content
        for row in content.rows:
            assert "| " + " | ".join(row) + " |" in plain_md
    for view in (views.models, views.engines, views.comparisons, views.budget, views.layers, views.skipped, views.parity):
        for row in view(found).rows:
            assert " ".join(row) in text
    for view in (facts.environment, facts.data, facts.reproduce):
        for name, value in view(found).rows:
            assert f"{name} {value}" in text
    for engine in found["engines"]:
        for name, value in facts.of_engine(engine).rows:
            assert f"{name} {value}" in text


def test_the_answer_comes_first(full):
    found, page, md = outputs(full)
    sentence = "The compressed student (int8 on onnxruntime, 1 thread) runs 7.14× as fast as the teacher [6.86, 7.43], "
    sentence += "at 97.50 % accuracy (−1.39 points), in a file 15.7× smaller."
    assert views.headline(found) == sentence
    assert sentence in page.all_text()
    assert sentence in unescaped(md)
    assert " ".join(report.lines(found)[:2]) == sentence


def test_a_speedup_that_is_no_quotient_of_the_latencies_says_so(full, writer):
    found, page, md = outputs(full)
    assert views.latency_note(found) in page.all_text()
    assert views.latency_note(found) in unescaped(md)
    writer.data["comparisons"] = []
    assert views.latency_note(report.write(writer.save())) is None


def test_the_cards_show_the_answer(full):
    _, page, _ = outputs(full)
    text = page.all_text()
    assert "Accuracy 97.50 % −1.39 points was 98.89 %" in text
    assert "Size 68.4 KiB 15.7× smaller was 1.05 MiB" in text
    assert "Energy – not read: this system has no energy counter (powercap)" in text


@pytest.mark.parametrize(("name", "title"), [("accuracy", "Accuracy"), ("mIoU", "mIoU"), ("mAP50", "mAP50")])
def test_a_metrics_card_has_its_name(name, title, full):
    found, _, _ = outputs(full)
    found["answer"]["metric"]["name"] = name
    assert cards(found)[0]["title"] == title


def test_the_page_asks_no_network_for_anything(full):
    _, page, _ = outputs(full)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    style = re.search(r"<style>(.*?)</style>", (full / "report" / "report.html").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_in_the_page_once_and_only_where_something_is_drawn(full, writer):
    _, page, _ = outputs(full)
    assert sum(len(content) > 1_000_000 for _, content in page.scripts) == 1
    writer.data |= {"models": [], "cells": [], "comparisons": [], "budget": None}
    _, page, _ = outputs(writer.save())
    assert all(len(content) < 1_000_000 for _, content in page.scripts)


def test_hostile_text_stays_text(full, writer, hostile):
    writer.data |= {
        "name": hostile,
        "recipe_text": f"# {hostile}\n```\n</code></pre></script>",
        "command": hostile,
        "recipe_path": hostile,
    }
    writer.data["warnings"].append(hostile)
    writer.data["models"][3]["title"] = hostile
    writer.data["data"]["kind"] = hostile
    writer.data["environment"]["cpu"]["model"] = hostile
    writer.data["environment"]["backends"]["openvino"]["reason"] = hostile
    writer.data["cells"][2]["backend_name"] = hostile
    writer.model("student", hostile[:8], params=1, macs=1, accuracy=0.5, terms=("task", "</script><script>alert(1)//"))
    found, page, md = outputs(writer.save())
    assert not any(
        "alert(" in content for kind, content in page.scripts if kind != "application/json" and len(content) < 1_000_000
    )
    specs = [content for kind, content in page.scripts if kind == "application/json"]
    assert len(specs) == len(all_charts(found))
    assert [json.loads(spec)["data"] for spec in specs]
    assert page.all_text().count('<script>alert("x")</script>') >= 8
    outside = re.sub(r"^(`{3,}).*?^\1$", "", md, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", md.replace(hostile, ""))
    assert not re.search(r"[\x00-\x1f\x7f]", "".join(report.lines(found)))


def test_the_recipes_fence_is_longer_than_any_in_it():
    assert markdown.fenced("a ```` b", "yaml") == "`````yaml\na ```` b\n`````"


def test_script_json_cannot_end_its_element():
    value = {"</script>": ["<!--", "]]>", "&amp;"]}
    assert json.loads(script_json(value)) == value
    assert not set(script_json(value)) & set("<>&")


def test_a_lone_surrogate_in_a_reason_does_not_stop_the_report(writer):
    writer.data["warnings"] = ["bad \ud800 byte"]
    writer.data["recipe_text"] = "\ud800"
    _, page, _ = outputs(writer.save())
    assert "bad byte" in page.all_text()


def test_charts_are_what_plotly_accepts(full):
    found = report.write(full)
    drawn = all_charts(found)
    assert len(drawn) == 1 + 2 + 2 + 1 + 5 + 1
    for chart in drawn:
        text = json.dumps({"data": chart.data, "layout": chart.layout})
        for name in charts.COLORS:
            text = text.replace(f'"@{name}"', '"#123456"')
        assert '"@' not in text
        plotly.graph_objects.Figure(json.loads(text))  # raises on a property that plotly does not know


def test_charts_draw_the_reports_numbers(full):
    found = report.write(full)
    points = {trace["name"]: (trace["x"], trace["y"]) for trace in charts.accuracy_against_latency(found)[0].data}
    for engine in found["engines"][:6]:
        assert points[engine["title"]] == ([engine["latency_ms"]["p50"]], [100 * engine["metric"]["value"]])
    low, high = (10**end for end in charts.latencies(found)[0].layout["xaxis"]["range"])
    assert low < found["engines"][2]["latency_ms"]["min"] < found["engines"][0]["latency_ms"]["p99"] < high
    forest = charts.comparisons(found)[0].data[0]
    assert (forest["x"], forest["y"]) == ([2.5, 0.35], ["student int8", "teacher float32"])
    assert forest["error_x"]["array"] == pytest.approx([0.05, 0.007])
    curves = charts.validation(found)[0].data
    assert [curve["x"] for curve in curves] == [[1, 2, 3, 4]] * 3 + [[5, 6, 7, 8], [9, 10, 11, 12]]
    before, kept = charts.layers(found)[0].data
    assert (before["y"], kept["y"]) == ([16, 32, 64], [16, 24, 40])


def test_a_float_model_its_integers_and_hybrid_bits_in_float_are_told_apart():
    assert len({charts.color("student", precision) for precision in ("float32", "int8", "hybrid")}) == 3
    assert charts.color("student", "float16") == charts.color("student", "float32")  # the same model


def test_charts_leave_the_null_backend_out(writer):
    writer.cell("null", "float32", "student", middle_ms=0.001)
    assert all_charts(report.write(writer.save())) == []


def test_colors_of_charts_are_defined_for_light_and_dark(full):
    report.write(full)
    source = (full / "report" / "report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    for name in charts.COLORS:
        assert len(re.findall(rf"--chart-{name}:", style)) == 2
    used = set(re.findall(r'"@(\w+)"', "".join(content for kind, content in Page(source).scripts if kind == "application/json")))
    assert used <= set(charts.COLORS)
    assert "teacher" in used


def test_tables_have_headers_that_say_what_they_head(full):
    _, page, _ = outputs(full)
    headers = [attributes for tag, attributes in page.elements if tag == "th"]
    assert len(headers) > 50
    assert {attributes.get("scope") for attributes in headers} == {"col", "row"}
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert sum(tag == "caption" for tag, _ in page.elements) == tables > 5
    drawn = [attributes for tag, attributes in page.elements if attributes.get("role") == "img"]
    assert all(attributes["aria-label"] for attributes in drawn)
    assert len(drawn) == 12


def test_links_lead_to_sections(full):
    _, page, _ = outputs(full)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert len(targets) == 11
    assert targets <= ids


def test_lines_fit_the_terminal(full, writer):
    long = "x" * 300 + " " + "word " * 60
    writer.cell("tensorrt_rtx", "int8", "student", status="failed", reason=long)
    writer.data["warnings"].append(long)
    lines = report.lines(report.write(writer.save()))
    assert max(map(len, lines)) <= terminal.WIDTH
    assert sum("x" * 50 in line for line in lines) >= 2


def test_a_wide_table_loses_text_and_no_numbers():
    content = table("name|value >", [("n" * 200, "1234567890"), ("short", "5")])
    lines = list(terminal.table(content))
    assert [len(line) for line in lines] == [terminal.WIDTH] * 3
    assert lines[1].endswith("…  1234567890")
    assert lines[2].endswith(" 5")


def test_a_table_without_columns_keeps_its_alignment():
    content = Table(("a", "b", "c"), [("1", "2", "3")], frozenset({2})).without("b")
    assert (content.columns, content.rows, content.numeric) == (("a", "c"), [("1", "3")], frozenset({1}))


def test_an_invalid_measurement_is_marked(full):
    found, _, md = outputs(full)
    assert any(row[:4] == ("openvino", "student", "int8", "invalid") for row in views.engines(found).rows)
    assert "openvino: student int8: the CPU's clock moved by 14%" in unescaped(md)


def test_a_comparison_that_is_invalid_says_so(writer):
    cells = [writer.cell("onnxruntime", precision, "student") for precision in ("float32", "int8")]
    writer.comparison("onnxruntime", cells, [2.0], valid=False)
    found, page, _ = outputs(writer.save())
    assert views.comparisons(found).rows[0][4] == "faster (invalid)"
    assert "the comparison on onnxruntime is invalid" in page.all_text()


@pytest.mark.parametrize(
    ("ok", "checks", "expected"),
    [
        (True, [{"limit": "latency_ms", "allowed": 2.0, "measured": 1.0, "ok": True, "cell": 0}], "budget: met"),
        (False, [], "budget: not met, because no engine of the student was measured"),
    ],
)
def test_the_budget_in_one_line(writer, ok, checks, expected):
    writer.cell("onnxruntime", "float32", "student")
    writer.data["budget"] = {"limits": {"latency_ms": 2.0}, "checks": checks, "ok": ok}
    found, page, md = outputs(writer.save())
    assert expected in report.lines(found)
    assert expected.capitalize() in page.all_text()
    assert expected in md


def test_a_missed_budget_names_what_is_missed(full):
    found = report.write(full)
    assert "budget: missed, 1 of 3 limits" in report.lines(found)
    assert [row[3] for row in views.budget(found).rows] == ["missed", "met", "met"]


@pytest.mark.parametrize("kind", ["unfinished", "failed"])
def test_a_run_that_did_not_finish_says_so_before_anything_else(writer, kind):
    writer.data["finished"] = None
    writer.data["doing"] = "distill"
    if kind == "failed":
        writer.data["steps"].append({"status": "failed", "reason": "not finite", "stage": "distill"})
    found, page, md = outputs(writer.save())
    expected = {
        "unfinished": "This run is not finished: it was interrupted, or is still running (last finished step: none)",
        "failed": "This run failed at distill: not finite",
    }[kind]
    assert report.lines(found)[0] == expected
    assert expected in page.all_text()
    assert md.splitlines()[2] == f"**{expected}**"


def test_reports_need_no_training_library(full):
    """A report is also written on a device that has neither torch nor pydantic."""
    code = """
import sys
for name in ("torch", "pydantic", "lightning_fabric", "torchmetrics"):
    sys.modules[name] = None
from pathlib import Path
from edgekd import report
print(len(report.lines(report.write(Path(sys.argv[1])))))
"""
    done = subprocess.run([sys.executable, "-c", code, str(full)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_the_precision_audit_is_shown_for_every_int8_engine(full):
    """What each layer runs in, from engine.json alone."""
    data, page, md = outputs(full)
    engine = next(engine for engine in data["engines"] if engine["precision"] == "int8" and engine["audit"])
    assert views.precision_share(engine) == "75 %"
    shown = views.audit(engine)
    assert shown.rows == [
        ("stem.0", "Conv", "int8", "int8", "QLinearConv", "75.0 %", "50.0 %", "3.20"),
        ("fc", "Conv", "int8", "float32", "Gemm", "25.0 %", "50.0 %", "3.20"),
    ]
    assert views.precision_share({**engine, "audit": {"layers": [], "reason": "built, not inspected"}}) == "–"
    assert ("precision audit", "not here") in facts.of_engine({**engine, "audit": {"layers": [], "reason": "not here"}}).rows
    assert f"Precision audit of {engine['title']}" in unescaped(md)
    for row in shown.rows:
        assert " ".join(row) in page.all_text()


def test_a_ladder_reads_the_same_everywhere(writer, full):
    writer.ladder()
    writer.save()
    found, page, md = outputs(full)
    text, plain_md, shown = page.all_text(), unescaped(md), "\n".join(report.lines(found))
    for output in (text, plain_md, shown):
        assert "int8 with 1 layer in float is within 0.5 points of the float model: the step 'keep in float'." in output
        assert "97.50 %" in output  # the float model
        assert "6.50" in output
        assert "80.00 %" in output
    row = next(line for line in plain_md.splitlines() if line.startswith("| keep in float"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["keep in float", "stage1.conv", "97.20 %", "0.300", "80.00 %", "1.2 s", "yes"]
    assert "| stage1.conv | 1.25e-01 |" in plain_md
    assert ("section", {"id": "ladder"}) in page.elements


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reached": False}, "No step is within 0.5 points of the float model on the validation split."),
        ({"precision": "float16"}, "No int8 model is within 0.5 points of the float model; float16 takes its place."),
    ],
)
def test_how_a_ladder_ended(writer, full, options, sentence):
    writer.ladder(**options)
    writer.save()
    found, page, md = outputs(full)
    assert sentence in page.all_text()
    assert sentence in unescaped(md)
    assert sentence in "\n".join(report.lines(found))


def test_a_run_without_a_ladder_has_no_such_section(full):
    _, page, md = outputs(full)
    assert ("section", {"id": "ladder"}) not in page.elements
    assert "Precision ladder" not in page.all_text() + md
