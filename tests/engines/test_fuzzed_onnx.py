"""Damaged and hostile ONNX files: each is a clear error of the worker, and none ends its process."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgekd
from edgekd.engines import build_engine, model_check, options_from, read_io
from edgekd.errors import BuildError, MissingDependency
from edgekd.jobs import BenchJob, BuildJob, write_job
from edgekd.targets import Local

BACKENDS = ("onnxruntime", "openvino", "tensorrt_rtx")
SERVE = """
import json, sys
from pathlib import Path
from edgekd import worker
for line in sys.stdin:
    result = worker.run(Path(line.strip()))
    print("\\nanswer", json.dumps([result.status, result.error, result.hint]), flush=True)
"""


class Worker:
    """The worker's own code in one process for many jobs, because a start takes longer than most builds here."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(Path(edgekd.__file__).parents[1])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", SERVE], env=environment, text=True, **pipes)

    def build(self, folder, data, backend, precision, io):
        """Status, error and hint."""
        (folder / "engine").mkdir(exist_ok=True)
        (folder / "model.onnx").write_bytes(data)
        (folder / "io.json").write_text(json.dumps({**io, "precision": precision}))
        write_job(BuildJob(str(folder / "model.onnx"), {"name": backend}, precision, str(folder / "engine")), folder / "job.json")
        self.process.stdin.write(f"{folder / 'job.json'}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        pytest.fail(f"the worker died with {self.process.wait()}")


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    with made.process:  # closes the pipes and waits; a read to their end would wait for whatever a library left running too
        made.process.kill()


@pytest.fixture(params=BACKENDS)
def case(request, int8_model, signed_int8_model):
    """A backend and the int8 model that it builds."""
    pytest.importorskip(request.param)
    return request.param, signed_int8_model if request.param == "tensorrt_rtx" else int8_model


@pytest.fixture(scope="session")
def io(int8_model):
    return json.loads(int8_model.path.with_name("io.json").read_text())


def node(proto, name):
    return next(each for each in proto.graph.node if each.name == name)


def tensor(proto, name):
    return next(each for each in proto.graph.initializer if each.name == name)


def values(name, array):
    return lambda proto: tensor(proto, name).CopyFrom(numpy_helper.from_array(array, name))


def opset(version):
    return lambda proto: setattr(proto.opset_import[0], "version", version)


def external(location, **more):
    def change(proto):
        weights = tensor(proto, "head")
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            weights.external_data.add(key=key, value=str(value))

    return change


def foreign(proto):
    node(proto, "relu0").domain = "com.acme"
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))


CHANGES = {
    "opset 0": (opset(0), "asks for opset 0"),
    "opset 999": (opset(999), "asks for opset 999"),
    "opset 2^62": (opset(2**62), "asks for opset 4611686018427387904"),
    "opset before quantization": (opset(1), "No Op registered for QuantizeLinear"),
    "no opset": (lambda proto: proto.ClearField("opset_import"), "asks for opset None"),
    "unknown ir": (lambda proto: setattr(proto, "ir_version", 999), "ir_version 999 is higher"),
    "unknown operator": (lambda proto: setattr(node(proto, "relu0"), "op_type", "Frobnicate"), "No Op registered for Frobnicate"),
    "unknown domain": (foreign, r"node 'relu0' \(Relu\) is of the domain 'com.acme'"),
    "weights NaN": (values("head", np.full((5, 8), np.nan, np.float32)), r"node 'head' \(Gemm\) has weights.*40 values of head"),
    "weights infinite": (values("head", np.full((5, 8), np.inf, np.float32)), "weights that are not finite"),
    "scale 0": (values("act0.scale", np.float32(0)), r"node 'act0/quantize' \(QuantizeLinear\) has a scale .*: scale 0"),
    "scale negative": (values("act0.scale", np.float32(-1)), "scale -1"),
    "scale NaN": (values("act0.scale", np.float32(np.nan)), "scale nan"),
    "weight scales 0": (values("weight0.scale", np.zeros(8, np.float32)), "8 of 8 scales, for instance 0"),
    "external data missing": (external("gone.bin"), r"tensor 'head', which node 'head' \(Gemm\) reads: .*does not exist"),
    "external data elsewhere": (external("../../secret"), "no file beside the model"),
    "external data absolute": (external("/etc/hostname"), "no file beside the model"),
    "external data short": (external("model.onnx", offset=2**40, length=160), "it should have at least"),
    "shape of terabytes": (lambda proto: tensor(proto, "head").dims.__setitem__(0, 2**40), "do not fit its shape"),
    "shape beyond integers": (lambda proto: tensor(proto, "head").dims.extend([2**62, 4]), "do not fit its shape"),
    "cycle": (
        lambda proto: node(proto, "conv0").input.__setitem__(0, "pooled"),
        r"wait for each other, \d+ in all: node 'conv0' \(Conv\)",
    ),
    "two nodes of one name": (lambda proto: setattr(node(proto, "relu0"), "name", "conv0"), "several nodes of the name 'conv0'"),
    "two tensors of one name": (lambda proto: node(proto, "relu1").output.__setitem__(0, "relu0"), "single static assignment"),
    "no graph": (lambda proto: proto.ClearField("graph"), "holds no model: it has no nodes, no inputs, no outputs"),
    "input of another type": (lambda proto: setattr(proto.graph.input[0].type.tensor_type, "elem_type", 77), "known type"),
    "input of another size": (
        lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 2**40),
        "io.json beside .* is of another model",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_models_are_refused_by_name(name, int8_model, tmp_path):
    """The check is the same for every backend, so it is asked itself."""
    change, message = CHANGES[name]
    proto = onnx.load(int8_model.path)
    change(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match=message):
        model_check.check(path, read_io(int8_model.path.with_name("io.json")))


def test_the_module_is_named_where_it_is_known(int8_model, tmp_path):
    proto = onnx.load(int8_model.path)
    CHANGES["scale 0"][0](proto)
    node(proto, "act0/quantize").metadata_props.add(key=model_check.PATH, value="stage1.0.conv2")
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"node 'act0/quantize' \(QuantizeLinear in module stage1.0.conv2\)"):
        model_check.check(tmp_path / "model.onnx")


def test_a_file_that_claims_more_than_a_file_can_hold(tmp_path):
    with (tmp_path / "model.onnx").open("wb") as stream:
        stream.truncate(model_check.LIMIT)  # sparse: it takes no room
    with pytest.raises(BuildError, match=r"has 2\.0 GiB; one ONNX file holds less than 2"):
        model_check.check(tmp_path / "model.onnx")


def test_whole_models_pass(int8_model, signed_int8_model, float_model):
    for model in (int8_model, signed_int8_model, float_model):
        assert model_check.check(model.path, read_io(model.path.with_name("io.json"))) == "ok"


def test_nodes_that_a_converter_left_unsorted_pass(float_model, tmp_path):
    """No engine minds; onnx's own checker does."""
    proto = onnx.load(float_model.path)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, tmp_path / "model.onnx")
    assert model_check.check(tmp_path / "model.onnx") == "ok"


def test_a_device_without_onnx_builds_all_the_same_and_says_so(float_model, tmp_path, monkeypatch):
    def require(name):
        raise MissingDependency(f"the Python package {name!r} cannot be imported here")

    monkeypatch.setattr(model_check, "require", require)
    record = build_engine(float_model.path, options_from({"name": "onnxruntime"}), "float32", tmp_path)
    assert record["model_check"] == "not checked: the Python package 'onnx' cannot be imported here"


def assert_clear(answer):
    status, error, hint = answer
    assert status in ("ok", "failed")
    assert "bug in edgekd" not in hint, error
    assert status == "ok" or error.startswith("BuildError: ")


@pytest.mark.parametrize(
    "name", ["empty", "text", "weights NaN", "opset 2^62", "unknown operator", "external data missing", "cycle"]
)
def test_every_backend_says_what_is_wrong(case, name, worker, io, tmp_path):
    backend, model = case
    data = {"empty": b"", "text": b"no model"}.get(name)
    if data is None:
        proto = onnx.load(model.path)
        CHANGES[name][0](proto)
        data = proto.SerializeToString()
    answer = worker.build(tmp_path, data, backend, model.precision, io)
    assert_clear(answer)
    assert answer[0] == "failed"


def test_a_truncated_file(case, worker, io, tmp_path):
    backend, model = case
    data = model.path.read_bytes()
    for end in (1, 2, 7, 60, *range(200, len(data), 311), len(data) - 1):
        answer = worker.build(tmp_path, data[:end], backend, model.precision, io)
        assert_clear(answer)
        assert answer[0] == "failed", end


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([1, 2, 5, 20]), late=st.booleans())
def test_flipped_bytes(case, worker, io, tmp_path, seed, count, late):
    """In the graph, which comes first in the file, or anywhere."""
    backend, model = case
    chance, data = random.Random(seed), bytearray(model.path.read_bytes())
    for _ in range(count):
        data[chance.randrange(len(data) if late else len(data) // 2)] = chance.randrange(256)
    start = time.monotonic()
    assert_clear(worker.build(tmp_path, bytes(data), backend, model.precision, io))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_constant_of_terabytes_ends_in_a_result(backend, float_model, io, images, tmp_path):
    """The build may pass, because a library makes the constant only when it runs."""
    pytest.importorskip(backend)
    proto = onnx.load(float_model.path)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2**20, 2**24]), "shape"))
    proto.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["zeros"], name="zeros"))
    proto.graph.node.insert(1, helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0, name="zero"))
    node(proto, "head").output[0] = "scores"
    proto.graph.node.append(helper.make_node("Add", ["scores", "zero"], ["logits"], name="sum"))
    onnx.save(proto, tmp_path / "model.onnx")
    (tmp_path / "io.json").write_text(json.dumps(io))
    (tmp_path / "engine").mkdir()
    np.save(tmp_path / "images.npy", images)
    job = BuildJob(str(tmp_path / "model.onnx"), {"name": backend}, "float32", str(tmp_path / "engine"))
    result = Local().run(job, tmp_path / "job", timeout_s=60)
    if result.status == "ok":
        result = Local().run(BenchJob(str(tmp_path / "engine"), str(tmp_path / "images.npy"), 1), tmp_path / "job", timeout_s=60)
    assert result.status == "failed"
    assert result.reason
    assert "bug in edgekd" not in result.hint
