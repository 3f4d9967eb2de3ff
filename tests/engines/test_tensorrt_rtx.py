"""Engines for GPUs, built ahead of time on a machine that needs none."""

import pytest

from edgekd.engines import WrongMachineError, backend, build_engine, hardware
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
    import numpy as np
    import onnx
    from onnx import numpy_helper

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
