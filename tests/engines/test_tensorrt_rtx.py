"""Engines for GPUs, built ahead of time on a machine that needs none."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd import jobs
from edgekd.engines import WrongMachineError, backend, build_engine, hardware, options_dict
from edgekd.engines.tensorrt_rtx import TensorRtRtxOptions
from edgekd.errors import BuildError

pytestmark = pytest.mark.skipif(not backend("tensorrt_rtx").available().ok, reason="tensorrt_rtx is not installed")


def test_float32_for_ada_without_a_gpu(tmp_path, float_model):
    record = build_engine(float_model.path, TensorRtRtxOptions(compute_capabilities=("SM89",)), "float32", tmp_path)
    assert record["fingerprint"]["compute_capabilities"] == ["SM89"]
    assert list(record["files"]) == ["engine.trt"]
    assert record["size_bytes"] > 10_000
    # the magic of a serialized TensorRT-RTX engine; classic TensorRT writes "ftrt"
    assert (tmp_path / "engine.trt").read_bytes().startswith(b"vtrt")


def test_the_gpus_asked_for_are_in_the_engine(tmp_path, float_model):
    """Builds repeat to the byte, so whatever differs between two engines comes from the GPUs that they were built for.

    The size says nothing: kernels are compiled on the GPU when the engine is first opened, and SM80 and SM89 share the plan.
    """

    def built(name, *capabilities):
        (tmp_path / name).mkdir()
        record = build_engine(float_model.path, TensorRtRtxOptions(compute_capabilities=capabilities), "float32", tmp_path / name)
        assert record["fingerprint"]["compute_capabilities"] == list(capabilities)
        return (tmp_path / name / "engine.trt").read_bytes()

    ampere, ada, both = built("ampere", "SM80"), built("ada", "SM89"), built("both", "SM80", "SM89")
    assert len({ampere, ada, both}) == 3
    assert built("again", "SM80", "SM89") == both


def test_signed_int8(tmp_path, signed_int8_model):
    record = build_engine(signed_int8_model.path, TensorRtRtxOptions(), "int8", tmp_path)
    assert record["precision"] == "int8"


def test_turing_is_refused_by_the_options():
    options = TensorRtRtxOptions(compute_capabilities=("SM75",))
    assert "SM75" in options.unsupported("float32")
    assert "SM75" in options.unsupported("int8")
    assert options.unsupported("float16") is None


def test_turing_is_refused_by_the_library_too(tmp_path, float_model):
    """The refusal of the options is not ours to invent: the builder's own error, translated, names the same cause."""
    with pytest.raises(BuildError, match=r"for SM75.*FP32 GEMM is not supported") as caught:
        backend("tensorrt_rtx").build(float_model.path, TensorRtRtxOptions(compute_capabilities=("SM75",)), tmp_path)
    assert "build.log" in caught.value.hint
    assert "FP32 GEMM" in (tmp_path / "build.log").read_text()


def test_a_parser_error_names_node_and_operator(tmp_path, int8_model):
    with pytest.raises(BuildError, match=r"node 'input/quantize' \(QuantizeLinear\).*zero point"):
        build_engine(int8_model.path, TensorRtRtxOptions(), "int8", tmp_path)


def test_unsigned_activations_are_not_read_as_signed(tmp_path, int8_model):
    """TensorRT-RTX reads uint8 with zero point 0 as int8 and only warns; every code above 127 would be cut off."""
    model = onnx.load(int8_model.path)
    for tensor in model.graph.initializer:
        if tensor.name == "input.zero":
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "io.json").write_bytes(int8_model.path.with_name("io.json").read_bytes())
    with pytest.raises(BuildError, match="uint8, which tensorrt_rtx would read as int8"):
        build_engine(tmp_path / "model.onnx", TensorRtRtxOptions(), "int8", tmp_path)


@pytest.mark.skipif(hardware.has_nvidia_driver(), reason="this machine has an NVIDIA GPU")
def test_current_needs_a_gpu(tmp_path, float_model):
    with pytest.raises(WrongMachineError, match="needs an NVIDIA GPU") as caught:
        build_engine(float_model.path, TensorRtRtxOptions(compute_capabilities=("current",)), "float32", tmp_path)
    assert "SM89" in caught.value.hint


def test_current_is_refused_on_a_gpu_that_the_library_does_not_support(tmp_path, float_model, monkeypatch):
    """TensorRT-RTX 1.7 builds an engine there (seen on an H200) that runs on no GPU at all."""
    found = [{"name": "NVIDIA H200", "capability": "SM90", "memory_mib": 143771.0, "driver": "580.159.04"}]
    monkeypatch.setattr(hardware, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(hardware, "gpus", lambda: (found, ""))
    options = TensorRtRtxOptions(compute_capabilities=("current",))
    with pytest.raises(WrongMachineError, match=r"does not support SM90 \(NVIDIA H200\)") as caught:
        build_engine(float_model.path, options, "float32", tmp_path)
    assert caught.value.hint.startswith("use backend tensorrt on this GPU")
    assert backend("tensorrt_rtx").fingerprint(options)["compute_capabilities"] == ["SM90"]


def graph(folder, nodes, constants=(), dtype=TensorProto.FLOAT, rows=()):
    """A model of these nodes from ``images`` [b, 16, 16, 16] to ``y``."""
    images = helper.make_tensor_value_info("images", dtype, ["b", 16, 16, 16])
    y = helper.make_tensor_value_info("y", dtype, ["b", "c", "h", "w"])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my.ops", 1)]
    model = helper.make_model(helper.make_graph(nodes, "net", [images], [y], constants), opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    takes, gives = (
        {"name": name, "dtype": "float32", "shape": shape} for name, shape in (("images", [-1, 16, 16, 16]), ("y", [-1] * 4))
    )
    (folder / "io.json").write_text(json.dumps({"inputs": [takes], "outputs": [gives], "preprocessing": {}}))
    if rows:
        (folder / "layers.json").write_text(json.dumps(rows))
    (folder / "out").mkdir()
    return folder / "model.onnx", folder / "out"


def test_an_operator_that_the_library_lacks_is_named(tmp_path):
    nodes = [helper.make_node("MaxUnpool", ["images", "images"], ["y"], name="/up/MaxUnpool", kernel_shape=[2, 2])]
    model, out = graph(tmp_path, nodes)
    with pytest.raises(BuildError) as caught:
        build_engine(model, TensorRtRtxOptions(), "float32", out)
    assert caught.value.message.endswith("node '/up/MaxUnpool' (MaxUnpool): the library has no operator MaxUnpool")
    assert caught.value.hint.startswith("replace MaxUnpool in the model, or choose another backend")


def test_an_operator_of_ones_own_is_named(tmp_path):
    model, out = graph(tmp_path, [helper.make_node("FancyOp", ["images"], ["y"], name="/up/Fancy", domain="my.ops")])
    with pytest.raises(BuildError, match=r"node '/up/Fancy' \(FancyOp\): the library has no operator FancyOp"):
        backend("tensorrt_rtx").build(model, TensorRtRtxOptions(), out)


def test_types_that_do_not_go_together_are_named_with_the_module(tmp_path):
    half = numpy_helper.from_array(np.float16(1), "half")
    row = {"node": "/mix/Add", "path": "mix", "outputs": ["y"], "op": "Add", "macs": 1, "asked": "float32"}
    model, out = graph(tmp_path, [helper.make_node("Add", ["images", "half"], ["y"], name="/mix/Add")], [half], rows=[row])
    with pytest.raises(BuildError, match=r"node '/mix/Add' \(module mix\) \(Add\): .*same input types.*Float and Half") as caught:
        build_engine(model, TensorRtRtxOptions(), "float32", out)
    assert "_src" not in caught.value.message
    assert "quantizer.skip" in caught.value.hint


def test_a_matrix_product_on_turing_is_named_with_its_module(tmp_path):
    weight = numpy_helper.from_array(np.ones((16, 16), np.float32), "head.weight")
    row = {"node": "/head/MatMul", "path": "head.1", "outputs": ["y"], "op": "MatMul", "macs": 1, "asked": "float32"}
    nodes = [helper.make_node("MatMul", ["images", "head.weight"], ["y"], name="/head/MatMul")]
    model, out = graph(tmp_path, nodes, [weight], rows=[row])
    with pytest.raises(
        BuildError, match=r"for SM75 at '/head/MatMul' \(module head\.1\): .*FP32 GEMM is not supported"
    ) as caught:
        backend("tensorrt_rtx").build(model, TensorRtRtxOptions(compute_capabilities=("SM75",)), out)
    assert caught.value.hint.startswith("try another precision or compute capability, or keep head.1 in float through quantizer")
    assert "pass.cpp" not in caught.value.message


def test_too_little_scratch_memory_leads_to_the_option(tmp_path):
    weight = numpy_helper.from_array(np.ones((16, 1, 3, 3), np.float32), "w")
    wide = helper.make_node("Resize", ["images", "", "scales"], ["wide"], name="/up", mode="nearest")
    nodes = [wide, helper.make_node("Conv", ["wide", "w"], ["y"], pads=[1] * 4, group=16, name="/conv")]
    scales = numpy_helper.from_array(np.array([1, 1, 16, 16], np.float32), "scales")
    model, out = graph(tmp_path, nodes, [weight, scales])
    options = TensorRtRtxOptions(workspace_mib=1, max_batch=256, opt_batch=256)
    with pytest.raises(BuildError, match="for SM89 with so little scratch memory") as caught:
        build_engine(model, options, "float32", out)
    assert "workspace_mib" in caught.value.hint


def test_a_type_that_a_gpu_lacks_leads_to_the_layers_that_have_it(tmp_path):
    """The library's message names the type and the GPU alone."""
    codes = helper.make_tensor("codes", TensorProto.INT4, (16, 16, 3, 3), np.zeros(16 * 16 * 9, np.int8).tolist())
    scale = numpy_helper.from_array(np.full(16, 0.1, np.float32), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=0, name="/stem/weight/dequantize"),
        helper.make_node("Conv", ["images", "w"], ["y"], pads=[1] * 4, name="/stem/Conv"),
    ]
    model, out = graph(tmp_path, nodes, [codes, scale])
    with pytest.raises(BuildError, match=r"for SM75 at .*'/stem/weight/dequantize'.*int4"):
        backend("tensorrt_rtx").build(model, TensorRtRtxOptions(compute_capabilities=("SM75",)), out)


def weighted(kind, group):
    """An int8 convolution of its kind, with signed activations."""
    shape = (16, 16 // group, 3, 3)
    axis = 1 if kind == "ConvTranspose" else 0
    constants = [
        numpy_helper.from_array(np.ones(shape, np.int8), "codes"),
        numpy_helper.from_array(np.full(shape[axis], 0.1, np.float32), "scales"),
        numpy_helper.from_array(np.zeros(shape[axis], np.int8), "zeros"),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dq"),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=axis, name="w"),
        helper.make_node(kind, ["dq", "w"], ["y"], pads=[1] * 4, group=group, name="conv"),
    ]
    return nodes, constants


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_int8_convolutions_of_every_kind_build_for_every_gpu(kind, group, tmp_path):
    """No precision but float32 products on Turing needs to be refused beforehand (tried with TensorRT-RTX 1.7)."""
    model, out = graph(tmp_path, *weighted(kind, group))
    options = TensorRtRtxOptions(compute_capabilities=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"))
    assert backend("tensorrt_rtx").build(model, options, out) == ["engine.trt"]


@pytest.mark.parametrize("garbage", [b"", b"\x00" * 1000, b"not a model", bytes(range(256)) * 40])
def test_garbage_gives_a_clear_error_in_the_worker(garbage, tmp_path):
    """A library in C++ may crash on odd input: the worker is a process of its own, and answers all the same."""
    model, out = graph(tmp_path, [helper.make_node("Relu", ["images"], ["y"], name="relu")])
    model.write_bytes(garbage)
    jobs.write_job(jobs.BuildJob(str(model), options_dict(TensorRtRtxOptions()), "float32", str(out)), tmp_path / "job.json")
    subprocess.run([sys.executable, "-m", "edgekd.worker", str(tmp_path / "job.json")], check=True, timeout=120)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "failed"
    assert re.search(r"cannot be read as ONNX|holds no model", result["reason"])
    assert "is the file whole" in result["hint"]
