"""What a run says of engines that compression did not make faster, and of budgets."""

import json
from types import SimpleNamespace

import pytest

from edgekd.deployment import Deployment, check_budget, slower_than_float
from edgekd.engines import OPTIONS
from edgekd.recipe import BudgetConfig

FLOAT = {"backend_name": "openvino", "role": "student", "precision": "float32"}
INT8 = {"backend_name": "openvino", "role": "student", "precision": "int8"}
TEACHER = {"backend_name": "openvino", "role": "teacher", "precision": "float32"}


def ratio(engine, verdict):
    return {"engine": engine, "reference": 0, "speedup": 0.8, "interval": [0.78, 0.82], "verdict": verdict}


def test_an_int8_engine_slower_than_its_twin_is_a_failure_with_the_numbers():
    (line,) = slower_than_float([FLOAT, INT8, TEACHER], [ratio(1, "slower"), ratio(2, "slower")])
    assert line.startswith("openvino int8: slower than its float32 twin: 0.80 times its speed [0.78, 0.82]")


def test_a_difference_that_does_not_matter_is_none():
    assert slower_than_float([FLOAT, INT8], [{**ratio(1, "slower"), "speedup": 0.99, "interval": [0.989, 0.991]}]) == []


def test_faster_or_no_difference_is_none():
    assert slower_than_float([FLOAT, INT8], [ratio(1, "faster")]) == []
    assert slower_than_float([FLOAT, INT8], [ratio(1, "no difference")]) == []


def test_another_width_is_no_twin():
    assert slower_than_float([FLOAT, INT8 | {"role": "student@0.5"}], [ratio(1, "slower")]) == []


def test_without_its_twin_nothing_is_said():
    assert slower_than_float([INT8, TEACHER], [ratio(1, "slower")]) == []


@pytest.fixture
def budget(tmp_path):
    """Call with limits and cells, each (backend, latency, MiB of memory, valid): the budget's outcome."""

    def check(limits, *cells, roles=()):
        record = {"models": [], "cells": []}
        for number, (backend, latency_ms, memory_mib, valid) in enumerate(cells):
            folder = tmp_path / f"bench{number}"
            folder.mkdir()
            content = {"p50": latency_ms}, memory_mib, valid
            (folder / "record.json").write_text(
                json.dumps(
                    {
                        "latency_ms": content[0],
                        "peak_memory_mib": content[1],
                        "valid": content[2],
                        "size_bytes": 2**20,
                        "metric": {"value": 0.9},
                    }
                )
            )
            role = roles[number] if roles else "student"
            cell = {"role": role, "status": "measured", "backend_name": backend, "bench": folder.name}
            record["cells"].append(cell)
        return check_budget(SimpleNamespace(budget=BudgetConfig(**limits)), record, tmp_path)

    return check


def test_a_budget_is_met_by_one_engine_within_all_limits(budget):
    found = budget({"latency_ms": 5.0, "memory_mib": 60}, ("openvino", 4.0, 90.0, True), ("onnxruntime", 4.5, 50.0, True))
    assert found["ok"]
    assert {check["cell"] for check in found["checks"]} == {1}


def test_of_several_widths_the_widest_within_the_budget_is_shown(budget):
    cells = [("onnxruntime", latency_ms, 50.0, True) for latency_ms in (9.0, 4.0, 2.0)]
    roles = ("student", "student@0.5", "student@0.25")
    found = budget({"latency_ms": 5.0}, *cells, roles=roles)
    assert found["ok"]
    assert found["checks"][0]["cell"] == 1


def test_of_several_widths_that_are_too_slow_the_fastest_is_shown(budget):
    cells = [("onnxruntime", latency_ms, 50.0, True) for latency_ms in (9.0, 4.0)]
    found = budget({"latency_ms": 1.0}, *cells, roles=("student", "student@0.5"))
    assert not found["ok"]
    assert found["checks"][0]["cell"] == 1


def test_the_null_engine_meets_no_budget(budget):
    found = budget({"latency_ms": 5.0}, ("null", 0.001, 10.0, True), ("onnxruntime", 9.0, 50.0, True))
    assert not found["ok"]
    assert found["checks"][0]["measured"] == 9.0


def test_a_disturbed_measurement_meets_no_latency_but_other_limits(budget):
    assert not budget({"latency_ms": 5.0}, ("onnxruntime", 4.0, 50.0, False))["ok"]


def test_memory_that_cannot_be_read_meets_no_limit(budget):
    found = budget({"memory_mib": 100}, ("onnxruntime", 4.0, None, True))
    assert not found["ok"]
    assert found["checks"][0]["measured"] is None


def test_a_size_is_what_it_is_even_where_the_machine_was_disturbed(budget):
    assert budget({"size_mib": 2.0}, ("onnxruntime", 4.0, 50.0, False))["ok"]


@pytest.mark.parametrize(("flags", "encoding"), [(["avx2"], "u7"), (["avx2", "avx_vnni"], "u8")])
def test_int8_is_exported_in_the_encoding_of_the_cpu(flags, encoding):
    def export(_, encoding):
        asked.append(encoding)

    asked = []
    run = SimpleNamespace(
        host={"cpu": {"arch": "x86_64", "flags": flags}}, exported={}, _export=export, _say_findings=lambda *_: None
    )
    for name in ("onnxruntime", "openvino", "tensorrt_rtx"):
        for precision in ("int8", "float32"):
            entry = SimpleNamespace(backend=OPTIONS[name]())
            Deployment._onnx(run, SimpleNamespace(id="ab"), entry, precision)
    assert asked == [encoding, "float32", "s8"]  # each file once
