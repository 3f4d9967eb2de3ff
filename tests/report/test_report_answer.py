"""Which engines answer a run, and how they relate."""

import pytest

from edgekd import report
from edgekd.report.answer import speedup
from edgekd.report.charts import pareto


def answer(writer):
    return report.write(writer.save())["answer"]


def test_the_budgets_engine_against_the_teacher_on_its_backend(full):
    found = report.write(full)
    result, engines = found["answer"], found["engines"]
    before, after = engines[0], engines[2]
    assert (result["reference"], result["compressed"], result["reason"]) == (0, 2, None)
    assert result["metric"]["difference"] == pytest.approx(0.975 - 0.9889)
    assert result["latency_ms"]["reference"] == before["latency_ms"]["p50"]
    assert result["latency_ms"]["compressed"] == after["latency_ms"]["p50"]
    assert result["size_bytes"] == {"reference": 1_100_000, "compressed": 70_000, "ratio": 1_100_000 / 70_000}
    assert result["peak_memory_mib"]["ratio"] == before["peak_memory_mib"] / after["peak_memory_mib"]
    assert result["params"]["ratio"] == 272_474 / 45_120
    assert result["energy_j"]["reason"] == "this system has no energy counter (powercap)"


def test_the_latency_ratio_is_the_interleaved_one(full):
    latency = report.write(full)["answer"]["latency_ms"]
    assert latency["interleaved"] is True
    assert latency["ratio"] == pytest.approx(2.5 / 0.35)
    assert latency["interval"] == pytest.approx([2.5 * 0.98 / (0.35 * 1.02), 2.5 * 1.02 / (0.35 * 0.98)])
    assert latency["confidence"] == 0.90


COMPARISON = {
    "reference": 4,
    "valid": True,
    "folder": "x",
    "ratios": [
        {"engine": 5, "speedup": 2.0, "interval": [1.9, 2.1]},
        {"engine": 6, "speedup": 0.5, "interval": [0.4, 0.6]},
    ],
}


def test_a_speedup_over_the_comparisons_reference_is_its_own():
    found = speedup([COMPARISON], 4, 5)
    assert (found["ratio"], found["interval"], found["confidence"]) == (2.0, [1.9, 2.1], 0.95)


def test_a_speedup_of_the_comparisons_reference_is_the_inverse():
    found = speedup([COMPARISON], 6, 4)
    assert (found["ratio"], found["interval"], found["confidence"]) == (2.0, [1 / 0.6, 1 / 0.4], 0.95)


def test_a_speedup_between_two_others_is_the_quotient_at_its_widest():
    found = speedup([COMPARISON], 6, 5)
    assert (found["ratio"], found["interval"], found["confidence"]) == (4.0, [1.9 / 0.6, 2.1 / 0.4], 0.90)


def test_engines_that_no_comparison_has_are_not_related():
    assert speedup([COMPARISON], 4, 7) is None
    assert speedup([], 4, 5) is None


def test_without_a_comparison_the_ratio_is_that_of_two_separate_measurements(writer):
    writer.cell("onnxruntime", "float32", "teacher", middle_ms=2.0)
    writer.cell("onnxruntime", "float32", "student", middle_ms=1.0)
    latency = answer(writer)["latency_ms"]
    assert latency["ratio"] == latency["reference"] / latency["compressed"]
    assert (latency["interleaved"], latency["interval"]) == (False, None)


def test_without_a_budget_the_fastest_engine_beside_the_teacher_answers(writer):
    writer.cell("openvino", "int8", "student", middle_ms=0.1)  # faster, but there is nothing to hold it against
    writer.cell("onnxruntime", "float32", "teacher", middle_ms=2.0)
    writer.cell("onnxruntime", "float32", "student", middle_ms=1.0)
    writer.cell("onnxruntime", "int8", "student", middle_ms=0.5)
    found = answer(writer)
    assert (found["reference"], found["compressed"]) == (1, 3)


def test_an_invalid_measurement_answers_only_where_there_is_no_other(writer):
    writer.cell("onnxruntime", "float32", "teacher", middle_ms=2.0)
    writer.cell("onnxruntime", "int8", "student", middle_ms=0.5, valid=False)
    assert answer(writer)["compressed"] == 1
    writer.cell("onnxruntime", "float32", "student", middle_ms=1.0)
    assert answer(writer)["compressed"] == 2


def test_the_null_backend_is_no_answer(writer):
    writer.cell("null", "float32", "teacher", middle_ms=0.002)
    writer.cell("null", "float32", "student", middle_ms=0.001)
    found = answer(writer)
    assert found["compressed"] is None
    assert found["reason"] == "no engine of the student was measured on a backend that computes anything"


def test_without_a_teacher_the_student_alone_or_the_float_twin_is_replaced(writer):
    writer.cell("onnxruntime", "int8", "student", middle_ms=0.5)
    assert answer(writer)["reference"] is None
    assert answer(writer)["reason"] == "no other engine was measured on onnxruntime"
    writer.cell("onnxruntime", "float32", "student", middle_ms=1.0)
    assert answer(writer)["reference"] == 1
    writer.cell("onnxruntime", "float32", "student_alone", middle_ms=1.0)
    assert answer(writer)["reference"] == 2


def test_the_reference_runs_with_the_same_settings(writer):
    writer.cell("onnxruntime", "float32", "teacher", middle_ms=2.0, threads=4)
    writer.cell("onnxruntime", "float32", "teacher", middle_ms=5.0, threads=1)
    writer.cell("onnxruntime", "int8", "student", middle_ms=0.5, threads=1)
    assert answer(writer)["reference"] == 1


def test_without_engines_the_models_say_what_they_can(writer):
    writer.model("teacher", "teacher", params=400, macs=1000, accuracy=0.9)
    writer.model("student", "distill", params=100, macs=500, accuracy=0.8)
    found = answer(writer)
    assert found["metric"] == {"name": "accuracy", "reference": 0.9, "compressed": 0.8, "difference": pytest.approx(-0.1)}
    assert found["params"]["ratio"] == 4.0
    assert found["latency_ms"]["ratio"] is None


def test_energy_is_compared_where_both_were_read(writer):
    for role, joules in (("teacher", 0.02), ("student", 0.005)):
        writer.cell("onnxruntime", "float32", role, energy={"joules_per_inference": joules, "source": "RAPL"})
    assert answer(writer)["energy_j"] == {"reference": 0.02, "compressed": 0.005, "ratio": 4.0, "reason": None}


def test_the_front_has_only_engines_that_no_other_beats():
    def engine(p50, value, valid=True):
        return {"latency_ms": {"p50": p50}, "metric": {"value": value}, "valid": valid}

    engines = [engine(3, 0.9), engine(1, 0.7), engine(2, 0.6), engine(2, 0.8), engine(0.5, 0.99, valid=False), engine(4, 0.9)]
    assert pareto(engines) == [engines[1], engines[3], engines[0]]
