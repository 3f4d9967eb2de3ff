"""What OpenVINO was asked, and what the compiled model says that it does."""

import json
import os

import pytest

from edgekd.engines import WrongMachineError, build_engine, options_from, read_engine
from edgekd.engines.openvino import OpenVinoOptions, _notes, _plain

openvino = pytest.importorskip("openvino")


def build(model, out, **options):
    return build_engine(model.path, options_from({"name": "openvino", **options}), model.precision, out)


def test_the_compiled_models_own_settings_are_recorded(float_model, tmp_path):
    record = build(float_model, tmp_path)
    assert record == json.loads((tmp_path / "engine.json").read_text())
    assert record["reported"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert record["reported"]["PERFORMANCE_HINT"] == "LATENCY"
    assert record["reported"]["NUM_STREAMS"] == record["reported"]["INFERENCE_NUM_THREADS"] == 1
    assert record["reported"]["EXECUTION_MODE_HINT"] == "PERFORMANCE"
    assert record["notes"] == []
    assert not (tmp_path / "reported.json").exists()


def test_fewer_threads_than_asked_are_told(float_model, tmp_path):
    record = build(float_model, tmp_path, threads=1024)
    got = record["reported"]["INFERENCE_NUM_THREADS"]
    assert got <= os.cpu_count()
    assert record["notes"] == [f"asked for 1024 threads, openvino took {got}"]
    assert read_engine(tmp_path).notes == tuple(record["notes"])


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two streams need two cores")
def test_hint_and_streams_reach_the_library(float_model, tmp_path):
    record = build(float_model, tmp_path, threads=2, streams=2, hint="throughput")
    assert record["reported"]["PERFORMANCE_HINT"] == "THROUGHPUT"
    assert record["reported"]["NUM_STREAMS"] == 2
    assert record["backend"]["streams"] == 2


@pytest.mark.parametrize(("precision", "capability"), [("f16", "FP16"), ("bf16", "BF16")])
def test_a_precision_is_taken_or_refused(precision, capability, float_model, tmp_path):
    """OpenVINO would take another one without a word; bf16 it computes on CPUs with AVX512 too, whose capabilities lack it."""
    listed = capability in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    refused = None
    try:
        record = build(float_model, tmp_path, inference_precision=precision)
    except WrongMachineError as error:
        refused = error
    if refused is None:
        assert record["reported"]["INFERENCE_PRECISION_HINT"] == precision
    else:
        assert not listed
        assert f"inference_precision {precision} was asked, and openvino computes in" in refused.message
        assert "f32 always is" in refused.hint


def test_notes_by_hand():
    reported = {"INFERENCE_PRECISION_HINT": "f16", "INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 2}
    options = OpenVinoOptions(threads=4, streams=3, inference_precision="f16")
    assert _notes(options, reported) == ["asked for 4 threads, openvino took 2", "asked for 3 streams, openvino took 2"]
    with pytest.raises(WrongMachineError, match="computes in f16 on this CPU"):
        _notes(OpenVinoOptions(), reported)


def test_properties_become_json():
    mode = openvino.properties.hint.ExecutionMode.ACCURACY
    assert [_plain(value) for value in (openvino.Type.bf16, mode, True, 3, "x", ["CPU"])] == [
        "bf16",
        "ACCURACY",
        True,
        3,
        "x",
        ["CPU"],
    ]
