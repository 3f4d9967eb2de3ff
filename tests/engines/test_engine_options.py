import json

import pytest

from edgekd.engines import BACKENDS, OPTIONS, backend, build_engine, open_engine, options_from, read_engine, read_io
from edgekd.engines.onnxruntime import OnnxRuntimeOptions
from edgekd.engines.tensorrt_rtx import TensorRtRtxOptions
from edgekd.errors import BuildError


def test_the_tables_name_the_same_backends():
    assert list(BACKENDS) == list(OPTIONS)
    for name, options in OPTIONS.items():
        assert BACKENDS[name].name == options().name == name


def test_options_from_gives_the_right_class():
    options = options_from({"name": "onnxruntime", "threads": 3})
    assert options == OnnxRuntimeOptions(threads=3)
    rtx = options_from({"name": "tensorrt_rtx", "compute_capabilities": ["SM80", "SM89"]})
    assert rtx == TensorRtRtxOptions(compute_capabilities=("SM80", "SM89"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "onnxruntme"}, r"unknown backend 'onnxruntme' \(did you mean 'onnxruntime'\?\)"),
        ({}, "unknown backend ''"),
        ({"name": "onnxruntime", "thread": 2}, r"no option 'thread' \(did you mean 'threads'\?\)"),
        ({"name": "onnxruntime", "threads": 0}, "threads must be an integer from 1 to 1024; received 0"),
        ({"name": "onnxruntime", "threads": True}, "received True"),
        ({"name": "onnxruntime", "threads": "2"}, "received '2'"),
        ({"name": "onnxruntime", "provider": "cud"}, r"provider must be one of cpu, cuda, tensorrt; .*did you mean 'cuda'\?"),
        ({"name": "onnxruntime", "device_id": 1}, "device_id is an option of provider cuda and tensorrt; provider cpu does not"),
        (
            {"name": "onnxruntime", "provider": "cuda", "max_batch": 8},
            "max_batch is an option of provider tensorrt; provider cuda",
        ),
        (
            {"name": "onnxruntime", "provider": "tensorrt", "cudnn_search": "default"},
            "cudnn_search is an option of provider cuda",
        ),
        ({"name": "onnxruntime", "provider": "tensorrt", "opt_batch": 65}, "opt_batch must be an integer from 1 to 64"),
        ({"name": "openvino", "threads": 2, "streams": 3}, "streams must be an integer from 1 to 2; received 3"),
        ({"name": "openvino", "hint": "latancy"}, r"hint must be one of latency, throughput; .*did you mean 'latency'\?"),
        ({"name": "onnxruntime", "optimization": "al"}, r"did you mean 'all'\?"),
        ({"name": "openvino", "inference_precision": "f64"}, "inference_precision must be one of f32, bf16, f16"),
        ({"name": "openvino", "threads": 2000}, "received 2000"),
        ({"name": "tensorrt_rtx", "compute_capabilities": ["SM90"]}, "compute_capabilities must be one of SM75"),
        ({"name": "tensorrt_rtx", "compute_capabilities": []}, "at least one"),
        ({"name": "tensorrt_rtx", "compute_capabilities": ["SM89", "SM89"]}, "none twice"),
        ({"name": "tensorrt_rtx", "compute_capabilities": ["SM89", "current"]}, "'current' stands alone"),
        ({"name": "tensorrt_rtx", "opt_batch": 9, "max_batch": 8}, "opt_batch must be an integer from 1 to 8; received 9"),
        ({"name": "null", "threads": 1}, "null has no option 'threads'"),
    ],
)
def test_bad_options_are_named(data, message):
    with pytest.raises(BuildError, match=message):
        options_from(data)


def test_pydantic_validates_the_options_of_a_recipe():
    """The recipe puts the dataclasses in a discriminated union; they know nothing of pydantic."""
    from typing import Annotated

    from pydantic import Field, TypeAdapter, ValidationError

    from edgekd.engines import BackendOptions

    union = TypeAdapter(Annotated[BackendOptions, Field(discriminator="name")])
    parsed = union.validate_json('{"name": "tensorrt_rtx", "compute_capabilities": ["SM80"]}', strict=True)
    assert parsed == TensorRtRtxOptions(compute_capabilities=("SM80",))
    with pytest.raises(ValidationError, match="threads must be an integer from 1 to 1024; received 0"):
        union.validate_json('{"name": "onnxruntime", "threads": 0}', strict=True)
    schema = union.json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(OPTIONS)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"inputs": [], "outputs": [], "preprocessing": {}}', '{"inputs": [{"name": "x"}]}']
)
def test_a_bad_io_json_is_a_build_error(text, tmp_path):
    if text is not None:
        (tmp_path / "io.json").write_text(text)
    with pytest.raises(BuildError, match=r"io\.json"):
        read_io(tmp_path / "io.json")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": 2}', '{"schema": 1, "backend": {"name": "null"}}'])
def test_a_bad_engine_json_is_a_build_error(text, tmp_path):
    if text is not None:
        (tmp_path / "engine.json").write_text(text)
    with pytest.raises(BuildError, match=r"engine\.json"):
        read_engine(tmp_path)


def test_build_refuses_before_any_work(tmp_path, float_model):
    options = OnnxRuntimeOptions()
    with pytest.raises(BuildError, match=r"onnxruntime on the CPU here runs float32, int8; not 'float16'"):
        build_engine(float_model.path, options, "float16", tmp_path)
    with pytest.raises(BuildError, match=r"gone\.onnx does not exist"):
        build_engine(tmp_path / "gone.onnx", options, "float32", tmp_path)
    with pytest.raises(BuildError, match="nowhere, does not exist"):
        build_engine(float_model.path, options, "float32", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_without_io_json_does_not_open(tmp_path, float_model):
    build_engine(float_model.path, options_from({"name": "null"}), "float32", tmp_path)
    (tmp_path / "io.json").unlink()
    with pytest.raises(BuildError, match=r"io\.json does not exist"):
        open_engine(tmp_path)


def test_a_missing_library_is_an_answer(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    answer = backend("openvino").available()
    assert not answer.ok
    assert answer.hint == "run: pip install 'edgekd[openvino]'"


def test_threads_reach_the_record(tmp_path, float_model):
    record = build_engine(float_model.path, OnnxRuntimeOptions(threads=2), "float32", tmp_path)
    assert record == json.loads((tmp_path / "engine.json").read_text())
    assert read_engine(tmp_path).threads == 2
