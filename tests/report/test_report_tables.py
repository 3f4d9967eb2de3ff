"""report.json: its schema, and what it says of runs that are damaged, failed or not finished."""

import json
import shutil

import pytest

from edgekd import report
from edgekd.artifacts import write_json
from edgekd.errors import ArtifactError
from edgekd.report import html, markdown, tables, views
from edgekd.report.measured import ecdf

# A type, a tuple of alternatives, a list of one element's schema, or a dict of required keys.
NUMBER = (float, int)
METRIC = {"name": str, "value": NUMBER}
SCHEMA = {
    "schema": 1,
    "name": str,
    "models": [{"role": str, "params": int, "macs": int, "metric": METRIC}],
    "engines": [
        {
            "backend": str,
            "precision": str,
            "target": str,
            "status": ("measured", "built", "skipped", "failed"),
            "reason": (str, None),
            "batch": int,
            "latency_ms": ({"p50": NUMBER, "p90": NUMBER, "p99": NUMBER, "mean": NUMBER}, None),
            "first_ms": (*NUMBER, None),
            "peak_memory_mib": (*NUMBER, None),
            "size_bytes": int,
            "metric": (METRIC, None),
        }
    ],
    "budget": (dict, None),
}


def problems(value, schema, path="report"):
    """Where a value is not what the schema says."""
    if isinstance(schema, tuple):
        return [] if any(not problems(value, option, path) for option in schema) else [f"{path} is {value!r}"]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path} is {value!r}"]
        return [
            problem
            for key, inner in schema.items()
            for problem in (problems(value[key], inner, f"{path}.{key}") if key in value else [f"{path} lacks {key}"])
        ]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is {value!r}"]
        return [problem for index, entry in enumerate(value) for problem in problems(entry, schema[0], f"{path}[{index}]")]
    if isinstance(schema, type):
        return [] if isinstance(value, schema) and not isinstance(value, bool) else [f"{path} is {value!r}"]
    return [] if value == schema and type(value) is type(schema) else [f"{path} is {value!r}"]


def write(run, out=None):
    """The report as it is read back from report.json, after a look at its schema."""
    returned = report.write(run, out)
    text = ((out or run / "report") / "report.json").read_text()
    read = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert read == returned
    assert problems(read, SCHEMA) == []
    return read


def test_the_schema_check_finds_what_is_wrong(full):
    good = report.write(full)
    for change in (
        lambda data: data.update(schema="1"),
        lambda data: data["models"][0].update(params=1.5),
        lambda data: data["engines"][0].update(status="unknown"),
        lambda data: data["engines"][0]["latency_ms"].pop("p99"),
        lambda data: data["engines"][0].update(size_bytes=None),
        lambda data: data.pop("budget"),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        assert len(problems(bad, SCHEMA)) == 1


def test_a_finished_run(full):
    found = write(full)
    assert [(model["role"], model["stage"]) for model in found["models"]] == [
        ("teacher", "teacher"),
        ("student_alone", "student_alone"),
        ("student", "distill"),
        ("student", "prune"),
        ("student", "quantize"),
    ]
    assert [engine["status"] for engine in found["engines"]] == ["measured"] * 6 + ["built", "failed", "skipped"]
    assert found["state"]["status"] == "finished"
    assert found["models"][4]["bits"] == [{"weight": 8, "activation": 8}]
    assert found["recipe"] == {"path": "recipes/digits.yaml", "text": "name: digits\nseed: 7\n"}
    assert found["reproduce"]["versions"] == {"torch": "2.13.0", "onnx": "1.23.0", "onnxruntime": "1.32.0"}
    assert found["reproduce"]["seed"] == 7
    assert [entry["hop"] for entry in found["parity"]].count("torch to ONNX") == 7
    engines = found["parity"][7:]
    assert len(engines) == len(found["engines"])
    assert engines[0]["outputs"][0]["worst"]["position"] == [3]
    assert engines[-1]["reason"] == "tensorrt_rtx is not installed"  # not run, and why
    assert found["parity"][0]["outputs"][0]["max_error"] == 1.5e-6
    compared = [entry for entry in found["parity"] if entry["tensors"]]
    assert compared
    assert {(entry["hop"], entry["encoding"]) for entry in compared} == {("torch to ONNX", "int8")}
    rows = [row for row in views.parity(found).rows if "one by one" in row[3]]
    assert len(rows) == len(compared)
    assert rows[0][3:] == (
        *("21 tensors, one by one", "–", "1.00 of a step (1)", "in layer2.0", "–"),
        *("0.0024 % a step off", "–"),
    )


def test_every_engines_numbers_are_those_of_its_record(full):
    found = write(full)
    for engine in found["engines"][:6]:
        record = json.loads((full / engine["folders"]["bench"] / "record.json").read_text())
        assert engine["latency_ms"] == record["latency_ms"]
        assert engine["metric"] == record["metric"]
        for key in ("first_ms", "load_ms", "peak_memory_mib", "size_bytes", "threads", "valid", "warnings"):
            assert engine[key] == record[key]
        assert engine["samples"] == len(record["samples_ns"])
        assert {engine["ecdf"]["ms"][0], engine["ecdf"]["ms"][-1]} == {record["latency_ms"]["min"], record["latency_ms"]["max"]}


def test_an_engine_that_was_built_only_has_a_size_and_a_reason(full):
    engine = write(full)["engines"][6]
    assert (engine["status"], engine["reason"]) == ("built", "built, not run: no GPU")
    assert engine["size_bytes"] == 310_000
    assert engine["compute_capabilities"] == ["SM89"]
    assert engine["latency_ms"] is engine["metric"] is engine["peak_memory_mib"] is None


def test_an_engine_that_was_not_built_has_size_zero(full):
    engine = write(full)["engines"][8]
    assert (engine["status"], engine["reason"], engine["size_bytes"]) == ("skipped", "tensorrt_rtx is not installed", 0)


def test_comparisons_name_engines_by_their_index(full):
    comparison = write(full)["comparisons"][0]
    assert comparison["reference"] == 1  # the float32 student, which the record lists first
    assert [(ratio["engine"], ratio["reference"], ratio["speedup"]) for ratio in comparison["ratios"]] == [
        (0, 1, 0.35),
        (2, 1, 2.5),
    ]
    assert comparison["rounds"] == 60


def test_layers_have_the_channels_of_before_pruning(full):
    """The quantized checkpoint, the last one, knows nothing of what was cut."""
    rows = write(full)["layers"]
    assert [(row["channels_before"], row["channels"], row["weight_bits"]) for row in rows] == [
        (16, 16, 8),
        (32, 24, 8),
        (64, 40, 8),
    ]


def test_training_has_every_epoch(full):
    training = write(full)["training"]
    assert [stage["title"] for stage in training] == [
        "teacher",
        "student alone",
        "student, distilled",
        "student, pruned",
        "student, quantized",
    ]
    assert [list(epoch["terms"]) for epoch in training[2]["epochs"]] == [["task", "logits"]] * 4


def test_warnings_say_what_may_not_be_used(full):
    warnings = write(full)["warnings"]
    assert warnings[0] == "3 images of class 7 are duplicates"
    assert any("openvino: student int8 is invalid: the CPU's clock moved by 14%" in warning for warning in warnings)
    assert any("openvino: student int8 is not faster than its float32 twin: 0.910×" in warning for warning in warnings)
    assert not any("onnxruntime" in warning for warning in warnings)


def test_a_smoke_run_says_that_its_accuracies_mean_nothing(writer):
    writer.data["smoke"] = True
    assert "smoke run" in write(writer.save())["warnings"][0]


def test_skipped_lists_cells_and_sensors_once(full):
    rows = [(row["what"], row["status"]) for row in write(full)["skipped"]]
    assert len(rows) == len(set(rows))
    assert ("tensorrt_rtx: student float16", "skipped") in rows
    assert ("energy", "not read") in rows
    assert ("temperature", "not read") in rows
    assert not [row for row in rows if row[0] == "clock"]


def test_entries_of_one_backend_are_told_apart(writer):
    for threads in (1, 4):
        writer.cell("onnxruntime", "float32", "student", threads=threads)
    titles = [engine["title"] for engine in write(writer.save())["engines"]]
    assert titles == ["onnxruntime (threads 1): student float32", "onnxruntime (threads 4): student float32"]


def test_a_run_that_has_only_begun(writer):
    """run.json is first written after the first checkpoint; a killed run never fills in its end."""
    writer.model("teacher", "teacher", params=1, macs=1, accuracy=0.9)
    writer.data |= {"finished": None, "seconds": None, "doing": "distill"}
    found = write(writer.save())
    assert (found["state"]["status"], found["state"]["last_step"]) == ("unfinished", writer.data["models"][0]["folder"])
    assert found["engines"] == []
    assert found["answer"]["compressed"] is None
    assert writer.data["models"][0]["folder"] in " ".join(report.lines(found)[:2])


def test_a_run_without_anything(writer):
    found = write(writer.save())
    assert found["answer"]["reason"] == "no engine of the student was measured"
    assert report.lines(found)


def test_an_older_run_json_may_lack_sections(writer):
    for key in ("steps", "models", "cells", "comparisons", "warnings", "environment", "data", "recipe_text", "command"):
        del writer.data[key]
    assert write(writer.save())["name"] == "digits"


def test_a_failed_run_says_where_and_why(writer):
    writer.model("teacher", "teacher", params=1, macs=1, accuracy=0.9)
    writer.data["steps"].append({"status": "failed", "reason": "the term logits is not finite", "stage": "distill"})
    found = write(writer.save())
    state = found["state"]
    assert (state["status"], state["failed_at"], state["reason"]) == ("failed", "distill", "the term logits is not finite")
    assert {"what": "stage distill", "status": "failed", "why": "the term logits is not finite"} in found["skipped"]


def lost(found):
    return {row["what"]: row["why"] for row in found["skipped"] if row["status"] == "lost"}


def test_a_record_that_has_changed_is_not_used(full):
    bench = write(full)["engines"][2]["folders"]["bench"]
    path = full / bench / "record.json"
    path.write_text(path.read_text().replace('"valid": true', '"valid": trUe'))
    found = write(full)
    engine = found["engines"][2]
    assert engine["status"] == "built"
    assert engine["latency_ms"] is engine["metric"] is None
    assert "sha256 differs" in engine["reason"]
    assert "sha256 differs" in lost(found)[bench]
    assert found["answer"]["compressed"] != 2
    assert any("gone or damaged" in warning for warning in found["warnings"])


@pytest.mark.parametrize("harm", ["gone", "no manifest", "truncated", "binary", "a list", "not a number"])
def test_every_kind_of_damage_to_every_artifact_is_named(full, harm):
    whole = write(full)
    folders = [folder.name for folder in sorted(full.glob("[0-9]*-*"))]
    assert len(folders) == 27
    for name in folders:
        folder, kept = full / name, full.parent / "kept"
        shutil.copytree(folder, kept)
        manifest = folder / "artifact.json"
        if harm == "gone":
            shutil.rmtree(folder)
        elif harm == "no manifest":
            manifest.unlink()
        elif harm == "truncated":
            manifest.write_text(manifest.read_text()[:-40])
        elif harm == "binary":
            manifest.write_bytes(b"\xff\xfe\x00")
        elif harm == "a list":
            manifest.write_text("[]")
        else:
            data = json.loads(manifest.read_text())
            write_json(manifest, data | {"metrics": {**data["metrics"], "extra": float("nan")}})
        found = tables.build(full)
        assert problems(found, SCHEMA) == []
        assert name in lost(found)
        assert len(found["engines"]) == len(whole["engines"])
        assert markdown.render(found)
        assert html.render(found)
        assert report.lines(found)
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)
    assert write(full) == whole


def test_half_a_training_log_is_not_drawn(full):
    folder = write(full)["training"][0]["folder"]
    path = full / folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    found = write(full)
    assert folder in lost(found)
    assert next(stage["title"] for stage in found["training"]) == "student alone"


def test_a_comparison_that_names_other_engines_is_not_used(writer):
    cell = writer.cell("onnxruntime", "float32", "student")
    folder = writer.comparison("onnxruntime", [cell, 7], [2.0])
    found = write(writer.save())
    assert found["comparisons"] == []
    assert "different engines" in lost(found)[folder]


def test_run_json_cannot_lead_out_of_the_run(full, writer):
    writer.data["models"] = [
        {"role": "student", "stage": "distill", "title": "x", "folder": "../run/" + writer.data["models"][0]["folder"]}
    ]
    found = write(writer.save())
    assert found["models"] == []
    assert "leads out" in next(iter(lost(found).values()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run directory"),
        ("", "cannot be read"),
        ('{"schema": 1', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("[1]", "has schema 'list'"),
        ('{"schema": 2, "name": "x"}', "has schema 2"),
        ('{"schema": 1, "cells": {}}', "cells must be a list; received dict"),
        ('{"schema": 1, "models": ["x"]}', "models must hold objects; received 'x'"),
        ('{"schema": 1, "environment": 3}', "environment must be an object; received int"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=message) as caught:
        report.write(tmp_path)
    assert "edgekd compress" in caught.value.hint
    assert not (tmp_path / "report").exists()


def test_the_report_may_go_elsewhere(full, tmp_path):
    out = tmp_path / "a" / "b"
    write(full, out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert not (full / "report").exists()


def test_a_report_that_cannot_be_written_says_so(full, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        report.write(full, tmp_path / "file")


def test_reasons_are_one_line_without_control_characters(full, hostile):
    reason = write(full)["engines"][7]["reason"]
    assert "\x1b" in hostile
    assert "\x1b" not in reason
    assert '<script>alert("x")</script>' in reason  # the data keeps what was said; the printers escape


def test_an_ecdf_of_few_samples_has_each():
    assert ecdf([3_000_000, 1_000_000, 2_000_000]) == {"ms": [1.0, 2.0, 3.0], "share": [1 / 3, 2 / 3, 1.0]}
    assert ecdf([5_000_000]) == {"ms": [5.0], "share": [1.0]}


def test_an_ecdf_of_many_samples_is_thinned_in_rank():
    found = ecdf([1000 * value for value in range(10_000, 0, -1)])
    assert len(found["ms"]) == 200
    assert found["ms"][0] == 0.001
    assert found["ms"][-1] == 10.0
    assert found["share"] == [round(value * 1000) / 10_000 for value in found["ms"]]
