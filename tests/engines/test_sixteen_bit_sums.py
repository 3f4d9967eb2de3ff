"""CPUs that add pairs of products in 16 bits: which they are, what is exported for them, and which files are wrong there."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.engines import BACKENDS, OPTIONS, build_engine, encoding_for, hardware, model_check, options_from, read_engine

HASWELL = {"arch": "x86_64", "flags": ["avx", "avx2", "fma", "f16c"]}
SKYLAKE_X = {"arch": "x86_64", "flags": ["avx2", "avx512f", "avx512bw", "avx512vl"]}
CASCADE_LAKE = {"arch": "x86_64", "flags": ["avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"]}
ALDER_LAKE = {"arch": "AMD64", "flags": ["avx2", "fma", "avx_vnni"]}
PI = {"arch": "aarch64", "flags": ["asimd"]}
UNKNOWN = {"arch": "AMD64", "flags": []}


@pytest.mark.parametrize(
    ("cpu", "small"),
    [(HASWELL, True), (SKYLAKE_X, True), (UNKNOWN, True), (CASCADE_LAKE, False), (ALDER_LAKE, False), (PI, False)],
)
def test_the_encoding_is_the_cpus(cpu, small):
    assert hardware.adds_in_16_bits(cpu) == small
    found = {name: encoding_for(options(), cpu) for name, options in OPTIONS.items()}
    mine = "u7" if small else "u8"
    assert found == {"onnxruntime": mine, "openvino": mine, "tensorrt": "s8", "tensorrt_rtx": "s8", "null": "u8"}
    assert encoding_for(options_from({"name": "onnxruntime", "provider": "tensorrt"}), cpu) == "s8"


def model(weights, *, unsigned=True, clip=None, weights_type=np.int8, through="", again=None, operator="Conv"):
    """One layer behind a quantizer; ``clip`` limits its codes, ``through`` moves them, ``again`` is another step."""
    dtype = np.uint8 if unsigned else np.int8
    constants = {
        "scale": np.float32(0.1),
        "zero": dtype(0),
        "codes": np.array(weights, weights_type).reshape(1, -1, 1, 1),
        "weight_scale": np.float32(0.01),
        "weight_zero": weights_type(0),
    }
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize")]
    last = "q"
    if clip is not None:
        constants |= {"low": dtype(0), "high": dtype(clip)}
        nodes.append(helper.make_node("Clip", ["q", "low", "high"], ["c"], "clip"))
        last = "c"
    if operator == "QLinearConv":
        inputs = [last, "scale", "zero", "codes", "weight_scale", "weight_zero", "scale", "zero"]
        nodes.append(helper.make_node("QLinearConv", inputs, ["y8"], "layer"))
        nodes.append(helper.make_node("DequantizeLinear", ["y8", "scale", "zero"], ["y"], "result"))
    else:
        nodes.append(helper.make_node("DequantizeLinear", [last, "scale", "zero"], ["d"], "dequantize"))
        source = "d"
        if again is not None:  # moved and quantized again
            constants["scale2"] = np.float32(again)
            nodes.append(helper.make_node("MaxPool", ["d"], ["m"], "moved", kernel_shape=[1, 1]))
            nodes.append(helper.make_node("QuantizeLinear", ["m", "scale2", "zero"], ["q2"], "again"))
            nodes.append(helper.make_node("DequantizeLinear", ["q2", "scale2", "zero"], ["d2"], "dequantize2"))
            source = "d2"
        if through:
            nodes.append(helper.make_node("MaxPool", [source], ["p"], "pool", kernel_shape=[1, 1]))
            source = "p"
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["w"], "weights"))
        nodes.append(helper.make_node("Conv", [source, "w"], ["y"], "layer"))
    channels = len(weights)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"weights": [127, 127]}, True),
        ({"weights": [3, -65]}, True),  # 2 * 255 * 65 = 33150
        ({"weights": [3, -64]}, False),  # 2 * 255 * 64 = 32640
        ({"weights": [127, 127], "clip": 127}, False),
        ({"weights": [-128, -128], "clip": 127}, False),  # 2 * 127 * 128 = 32512
        ({"weights": [127, 127], "clip": 130}, True),  # 2 * 130 * 127 = 33020
        ({"weights": [127, 127], "clip": 127, "through": "MaxPool"}, False),
        ({"weights": [127, 127], "through": "MaxPool"}, True),
        ({"weights": [127, 127], "clip": 127, "again": 0.1}, False),
        ({"weights": [127, 127], "clip": 127, "again": 0.05}, True),
        ({"weights": [127, 127], "unsigned": False}, True),  # engines add 128 to the codes
        ({"weights": [127, 127], "weights_type": np.uint8}, False),  # u8 * u8 is added in 32 bits
        ({"weights": [127, 127], "operator": "QLinearConv"}, True),
        ({"weights": [20, 20], "operator": "QLinearConv"}, False),
    ],
)
def test_which_layers_overflow(options, wrong, tmp_path):
    onnx.checker.check_model(model(**options))
    onnx.save(model(**options), tmp_path / "model.onnx")
    notes = model_check.overflows(tmp_path / "model.onnx")
    assert len(notes) == wrong
    if wrong:
        assert "the codes of 1 of 1 int8 layers overflow, node 'layer'" in notes[0]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_built_there_says_so(int8_model, backend, tmp_path, monkeypatch):
    if not BACKENDS[backend].available().ok:
        pytest.skip(BACKENDS[backend].available().reason)
    proto, cpu = onnx.load(int8_model.path), hardware.cpu()
    assert model_check.overflows(int8_model.path) == []  # its weights have 7 bits
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".codes"):
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, tmp_path / "model.onnx")
    shutil.copyfile(int8_model.path.with_name("io.json"), tmp_path / "io.json")
    for name, flags in (("small", ["avx2"]), ("large", ["avx2", "avx_vnni"])):
        monkeypatch.setattr(hardware, "cpu", lambda flags=flags: {**cpu, "arch": "x86_64", "flags": flags})
        out = tmp_path / name
        out.mkdir()
        build_engine(tmp_path / "model.onnx", OPTIONS[backend](), "int8", out)
        notes = [note for note in read_engine(out).notes if "overflow" in note]
        assert len(notes) == (name == "small"), notes
