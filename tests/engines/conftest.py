"""Two small convolutional nets as ONNX files, float32 and int8, and everything the engine tests ask about them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE, CLASSES = 8, 8, 5
IO = {
    "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, 3, SIZE, SIZE]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, CLASSES]}],
    "preprocessing": {"layout": "NCHW", "color": "RGB", "scale": 1 / 255, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.5]},
}


@dataclass(frozen=True)
class Model:
    path: Path
    precision: str
    tolerance: float
    """Allowed difference of a logit: float rounding, or a few steps of the coarsest activation scale."""


class Net:
    """Conv-ReLU, Conv-ReLU, global average, linear; its quantized weights have 7 bits: no CPU's integer products overflow."""

    def __init__(self, encoding: str | None) -> None:
        self.rng, self.nodes, self.constants, self.encoding = np.random.default_rng(3), [], [], encoding

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def quantize(self, tensor, name, scale, zero):
        if self.encoding is None:
            return tensor
        dtype = np.uint8 if self.encoding == "unsigned" else np.int8
        names = [self.constant(f"{name}.scale", np.float32(scale)), self.constant(f"{name}.zero", np.array(zero, dtype))]
        self.nodes.append(helper.make_node("QuantizeLinear", [tensor, *names], [f"{name}.q"], name=f"{name}/quantize"))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", *names], [f"{name}.dq"], name=f"{name}/dequantize"))
        return f"{name}.dq"

    def weight(self, name, value):
        if self.encoding is None:
            return self.constant(name, value)
        scale = (np.abs(value).max((1, 2, 3)) / 63).astype(np.float32)
        codes = np.round(value / scale[:, None, None, None]).astype(np.int8)
        inputs = [self.constant(f"{name}.codes", codes), self.constant(f"{name}.scale", scale)]
        inputs.append(self.constant(f"{name}.zero", np.zeros(len(scale), np.int8)))
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=0, name=f"{name}/dequantize"))
        return name

    def save(self, path):
        unsigned = self.encoding == "unsigned"
        x, channels = self.quantize("images", "input", 4 / 127, 128 if unsigned else 0), 3
        for index in range(2):
            weight = (self.rng.normal(size=(CHANNELS, channels, 3, 3)) * np.sqrt(2 / (9 * channels))).astype(np.float32)
            bias = self.constant(f"bias{index}", (self.rng.normal(size=CHANNELS) * 0.1).astype(np.float32))
            inputs = [x, self.weight(f"weight{index}", weight), bias]
            self.nodes.append(
                helper.make_node("Conv", inputs, [f"conv{index}"], kernel_shape=[3, 3], pads=[1] * 4, name=f"conv{index}")
            )
            self.nodes.append(helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"], name=f"relu{index}"))
            x, channels = self.quantize(f"relu{index}", f"act{index}", 8 / (255 if unsigned else 127), 0), CHANNELS
        self.nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"], name="pool"))
        self.nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
        head = self.constant("head", self.rng.normal(size=(CLASSES, CHANNELS)).astype(np.float32))
        self.nodes.append(helper.make_node("Gemm", ["flat", head], ["logits"], transB=1, name="head"))
        values = [
            helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES]),
        ]
        graph = helper.make_graph(self.nodes, "net", values[:1], values[1:], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _model(folder: Path, encoding: str | None, tolerance: float) -> Model:
    Net(encoding).save(folder / "model.onnx")
    (folder / "io.json").write_text(json.dumps(IO))
    return Model(folder / "model.onnx", "float32" if encoding is None else "int8", tolerance)


@pytest.fixture(scope="session")
def float_model(tmp_path_factory):
    return _model(tmp_path_factory.mktemp("float32"), None, 1e-4)


@pytest.fixture(scope="session")
def int8_model(tmp_path_factory):
    """uint8 activations: zero point 0 after ReLU, 128 for the signed input."""
    return _model(tmp_path_factory.mktemp("int8"), "unsigned", 4 * 8 / 255)


@pytest.fixture(scope="session")
def signed_int8_model(tmp_path_factory):
    return _model(tmp_path_factory.mktemp("signed"), "signed", 4 * 8 / 127)


@pytest.fixture(scope="session")
def images():
    """uint8 [7, 8, 8, 3]."""
    return np.random.default_rng(5).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)
