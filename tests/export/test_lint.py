"""The linter: each rule on a graph that breaks it, and the engines' own word that the rule costs what it says."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.engines import backend, onnx_layers, options_from
from edgekd.engines.base import Executed
from edgekd.errors import BuildError, ExportError
from edgekd.export import lint as linting
from edgekd.export import onnx as exporting
from edgekd.export import parity
from edgekd.export.float16 import to_float16
from edgekd.export.lint import RULES, lines, lint, refuse
from edgekd.export.qdq import encode
from edgekd.quantize import qat

C, S = 16, 16


class Net:
    """Builds a chain of quantized convolutions with one pattern in the middle."""

    def __init__(self, dtype=np.uint8):
        self.nodes, self.constants, self.rng, self.dtype = [], [], np.random.default_rng(0), dtype

    def constant(self, value):
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind, *inputs, **attributes):
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def qdq(self, tensor, scale=0.05, zero=None, dtype=None):
        dtype = dtype or self.dtype
        zero = (128 if dtype == np.uint8 else 0) if zero is None else zero
        grid = self.constant(np.float32(scale)), self.constant(np.array(zero, dtype))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", tensor, *grid), *grid)

    def per_channel(self, tensor):
        grid = self.constant(np.full(C, 0.05, np.float32)), self.constant(np.zeros(C, self.dtype))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", tensor, *grid, axis=1), *grid, axis=1)

    def weight(self, outputs, inputs, size, quantized=True):
        value = (self.rng.normal(size=(outputs, inputs, size, size)) * np.sqrt(2 / inputs) / size).astype(np.float32)
        if not quantized:
            return self.constant(value)
        scale = (np.abs(value).max((1, 2, 3)) / 63).astype(np.float32)
        codes = np.round(value / scale[:, None, None, None]).astype(np.int8)
        return self.op("DequantizeLinear", self.constant(codes), self.constant(scale), axis=0)

    def conv(self, tensor, inputs=C, *, quantized=True, bias=None, kind="Conv"):
        extra = [bias] if bias else []
        weight = self.weight(C, inputs, 3, quantized)
        return self.op(kind, tensor, weight, *extra, kernel_shape=[3, 3], pads=[1] * 4)

    def relu(self, tensor):
        return self.op("Relu", tensor)

    def clip(self, tensor):
        return self.op("Clip", tensor, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def norm(self, tensor):
        return self.op(
            "BatchNormalization", tensor, *(self.constant(np.full(C, each, np.float32)) for each in (1.1, 0.1, 0.1, 0.9))
        )

    def pool(self, kind, tensor):
        return self.op(kind, tensor, kernel_shape=[3, 3], pads=[1] * 4)

    def head(self):
        return self.qdq(self.relu(self.conv(self.qdq("images"))), zero=0)

    def model(self, tensor):
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
            for name, shape in (("images", [C, S, S]), ("logits", [C, None, None]))
        ]
        nodes = [*self.nodes, helper.make_node("Identity", [tensor], ["logits"], name="end")]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "net", values[:1], values[1:], self.constants)
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def built(pattern, dtype=np.uint8):
    """A model with the pattern between two integer convolutions."""
    net = Net(dtype)
    end = pattern(net, net.head() if dtype == np.uint8 else net.qdq(net.conv(net.qdq("images"))))
    return net.model(net.qdq(net.conv(end)))


def concatenated(n, x, scale):
    both = n.qdq(n.op("Concat", n.qdq(n.relu(n.conv(x)), scale, 0), x, axis=1), max(scale, 0.05), 0)
    return n.qdq(n.relu(n.conv(both, 2 * C)), zero=0)


def swish(n, values):
    return n.qdq(n.op("Mul", values, n.op("Sigmoid", values)))


def twice(n, x):
    values = n.relu(n.conv(x))
    return n.qdq(n.op("Add", n.qdq(values, zero=0), n.qdq(values, 0.07, 0)), zero=0)


FLOAT_CONVOLUTION = {
    "norm-behind-convolution": lambda n, x: n.qdq(n.relu(n.norm(n.conv(x))), zero=0),
    "activation-behind-convolution": lambda n, x: swish(n, n.conv(x)),
    "half-quantized-addition": lambda n, x: n.qdq(n.relu(n.op("Add", n.conv(x), x)), zero=0),
    "several-quantizers": twice,
    "cut-range": lambda n, x: n.qdq(n.clip(n.conv(x)), 6 / 254, 0),
    "float-result": lambda n, x: n.qdq(n.pool("AveragePool", n.relu(n.conv(x))), zero=0),
    "float-input": lambda n, x: n.qdq(n.conv(n.pool("AveragePool", x))),
}
BETWEEN = {
    "float-activation": lambda n, x: swish(n, n.qdq(n.conv(x))),
    "float-operation": lambda n, x: n.qdq(n.op("Sub", n.qdq(n.conv(x)), x)),
}
SILENT = {
    "plain": lambda n, x: n.qdq(n.relu(n.conv(x)), zero=0),
    "relu6 whose range fits": lambda n, x: n.qdq(n.clip(n.conv(x)), 6 / 255, 0),
    "addition": lambda n, x: n.qdq(n.relu(n.op("Add", n.qdq(n.conv(x)), x)), zero=0),
    "max pooling": lambda n, x: n.qdq(n.pool("MaxPool", x), zero=0),
    "max pooling before the quantizer": lambda n, x: n.qdq(n.pool("MaxPool", n.relu(n.conv(x))), zero=0),
    "concatenation": lambda n, x: concatenated(n, x, 0.05),
    "two quantizers in a row": lambda n, x: n.qdq(n.qdq(n.relu(n.conv(x)), zero=0), zero=0),
}


def rules(model, encoding="u8"):
    return {finding.rule for finding in lint(model, encoding)}


def executed(model, folder, name="onnxruntime") -> list[Executed]:
    pytest.importorskip(name)
    onnx.save(model, folder / "model.onnx")
    (folder / "io.json").write_text(json.dumps({"precision": "int8"}))
    (folder / name).mkdir()
    options = options_from({"name": name})
    backend(name).build(folder / "model.onnx", options, folder / name)
    return backend(name).executed(folder / name, options)


def float_convolutions(found):
    return [each.kind for each in found if each.precision == "float32" and each.kind.endswith(("Conv", "Convolution"))]


@pytest.mark.parametrize("rule", FLOAT_CONVOLUTION)
def test_what_keeps_a_convolution_in_float(rule, tmp_path):
    model = built(FLOAT_CONVOLUTION[rule])
    assert rules(model) == {rule}
    assert float_convolutions(executed(model, tmp_path))  # and OpenVINO does not mind, so the rules do not name it
    assert "openvino" not in RULES[rule].backends
    if rule != "float-input":
        assert not float_convolutions(executed(model, tmp_path, "openvino"))


@pytest.mark.parametrize("rule", BETWEEN)
def test_float_operations_between_integers(rule, tmp_path):
    model = built(BETWEEN[rule])
    assert rules(model) == {rule} or rules(model) == {rule, "float-operation"}
    found = [each.kind for each in executed(model, tmp_path)]
    assert found.count("DequantizeLinear") >= 2
    assert not float_convolutions(executed(model, tmp_path, "openvino"))


@pytest.mark.parametrize("name", SILENT)
def test_what_engines_run_on_integers_is_no_finding(name, tmp_path):
    model = built(SILENT[name])
    assert lint(model, "u8") == []
    found = executed(model, tmp_path)
    assert not float_convolutions(found)
    assert [each.kind for each in found].count("DequantizeLinear") <= 1


def test_different_scales_at_a_pooling_leave_the_integers(tmp_path):
    model = built(lambda n, x: n.qdq(n.pool("MaxPool", x), 0.06, 0))
    (finding,) = lint(model, "u8")
    assert (finding.rule, finding.found) == ("different-scales", "MaxPool: 0.05, 0.06")
    assert [each.kind for each in executed(model, tmp_path)].count("DequantizeLinear") >= 1
    assert rules(built(lambda n, x: concatenated(n, x, 0.06))) == {"different-scales"}


def test_an_average_pool_on_integers_is_ones_own_kernel(tmp_path):
    model = built(lambda n, x: n.qdq(n.pool("AveragePool", x), zero=0))
    assert rules(model) == {"integer-average-pool"}
    assert "QLinearAveragePool" in [each.kind for each in executed(model, tmp_path)]


def test_a_skipped_layer_that_onnxruntime_quantizes_by_itself(tmp_path):
    model = built(lambda n, x: n.qdq(n.relu(n.conv(x, quantized=False)), zero=0))
    assert rules(model) == {"requantized-layer"}
    assert not float_convolutions(executed(model, tmp_path))
    model = built(lambda n, x: swish(n, n.conv(x, quantized=False)))
    assert rules(model) == {"float-layers"}
    (tmp_path / "float").mkdir()
    assert float_convolutions(executed(model, tmp_path / "float"))


def test_transposed_convolutions_are_float_on_both(tmp_path):
    model = built(lambda n, x: n.qdq(n.conv(x, kind="ConvTranspose")))
    assert rules(model) == {"transposed-convolution"}
    for name in ("onnxruntime", "openvino"):
        kinds = {each.kind: each.precision for each in executed(model, tmp_path, name)}
        assert next(kinds[kind] for kind in ("ConvTranspose", "Deconvolution") if kind in kinds) == "float32"


def test_a_quantizer_that_only_float_reads(tmp_path):
    model = built(lambda n, x: n.qdq(n.op("HardSwish", n.qdq(n.op("HardSwish", x)))))
    assert rules(model) == {"float-activation", "unread-quantizer"}
    without = built(lambda n, x: n.qdq(n.op("HardSwish", n.op("HardSwish", x))))
    assert rules(without) == {"float-activation"}
    (tmp_path / "without").mkdir()
    kinds = [
        [each.kind for each in executed(each, folder)] for each, folder in ((model, tmp_path), (without, tmp_path / "without"))
    ]
    assert kinds[0].count("QuantizeLinear") == kinds[1].count("QuantizeLinear") + 1


def test_activations_with_a_scale_per_channel_fail_on_onnxruntime(tmp_path):
    """It builds the engine, and then the engine does not run."""
    model = built(lambda n, x: n.per_channel(n.relu(n.conv(x))))
    with pytest.raises(ExportError, match="per-channel-activation: Conv"):
        refuse(lint(model, "u8"))
    with pytest.raises(BuildError, match="must be a scalar"):
        executed(model, tmp_path)


REFUSED = {
    "integer-bias": lambda n, x: n.qdq(
        n.conv(
            x, bias=n.op("DequantizeLinear", n.constant(np.ones(C, np.int32)), n.constant(np.full(C, 1e-3, np.float32)), axis=0)
        )
    ),
    "unsigned-activation": lambda n, x: n.qdq(n.conv(x), dtype=np.uint8),
    "zero-point": lambda n, x: n.qdq(n.conv(x), zero=3),
    "bad-scale": lambda n, x: n.qdq(n.conv(x), 0.0),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_tensorrt_refuses(rule, tmp_path):
    model = built(REFUSED[rule], np.int8)
    assert rules(model, "s8") == {rule}
    with pytest.raises(ExportError, match=rf"{rule}: (Conv|Quantize|Dequantize)"):
        refuse(lint(model, "s8"))
    pytest.importorskip("tensorrt_rtx")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BuildError):
        backend("tensorrt_rtx").build(tmp_path / "model.onnx", options_from({"name": "tensorrt_rtx"}), tmp_path)


@pytest.mark.parametrize("scale", [0.0, -0.05, np.nan, np.inf, 1e-40])
def test_scales_that_are_none(scale):
    """ONNX Runtime builds all of these without a word."""
    model = built(lambda n, x: n.qdq(n.conv(x), scale))
    with pytest.raises(ExportError, match=r"bad-scale: Quantize.*\(scale "):
        refuse(lint(model, "u8"))


@pytest.mark.parametrize("encoding", ["float32", "float16", "u8", "s8"])
def test_weights_that_are_not_finite(encoding):
    net = Net(np.int8)
    tensor = net.conv(net.conv("images", quantized=False), quantized=False)
    model = net.model(tensor)
    weights = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weights[0, 0, 0, :2] = np.nan, np.inf
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, model.graph.initializer[1].name))
    (finding,) = [each for each in lint(model, encoding) if RULES[each.rule].severe]
    assert (finding.rule, finding.path, finding.found) == ("bad-weights", "Conv1", "2 values of constant1")


def test_operators_of_one_library():
    model = built(lambda n, x: n.qdq(n.op("Gelu", n.qdq(n.conv(x)), domain="com.microsoft")))
    assert "foreign-operator" in rules(model, "float32")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + x


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(*(Block() for _ in range(7)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stage1(torch.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    module = Swish().eval()
    made = qat.prepare(module, {}, qat.QuantizerConfig(), images[:2])
    qat.calibrate(made, [images])
    return module, made.eval(), images[:2]


@pytest.mark.parametrize("form", ["float32", "float16", "u8", "s8"])
def test_every_node_has_its_module(quantized, form, tmp_path):
    module, made, images = quantized
    model = exporting.export(module if form.startswith("f") else encode(made, form), images, output_names=["logits"], opset=20)
    if form == "float16":
        model, _ = to_float16(model, None, parity.run_once)
    onnx.save(model, tmp_path / "model.onnx")
    paths = onnx_layers.paths(onnx.load(tmp_path / "model.onnx"))
    assert set(paths) == {node.name for node in model.graph.node}
    assert set(paths.values()) <= {"images", *(path for path, _part in module.named_modules())}
    kinds = {(node.op_type, paths[node.name]) for node in model.graph.node}
    assert {("Sigmoid", "stage1.6.act"), ("Add", "stage1.6")} <= kinds
    if form in ("u8", "s8"):  # a quantizer belongs to the module that makes what it quantizes
        assert {("QuantizeLinear", "images"), ("QuantizeLinear", "stem"), ("QuantizeLinear", "stage1.3.conv")} <= kinds


def test_findings_have_the_models_own_paths_and_one_line_a_rule(quantized):
    _module, made, images = quantized
    found = lint(exporting.export(encode(made, "u8"), images, output_names=["logits"], opset=20), "u8")
    assert {finding.path for finding in found} == {f"stage1.{index}.act" for index in range(7)}
    (line,) = lines(found, ["openvino"])
    assert line.startswith("openvino: float-activation: stage1.0.act (Sigmoid), stage1.1.act (Sigmoid), ")
    assert " and 2 more: " in line
    assert lines(found, ["tensorrt_rtx"]) == []
    assert linting.from_json(json.loads(json.dumps(linting.as_json(found)))) == found


@pytest.mark.parametrize("name", ["resnet8", "shufflenetv2"])
def test_edgekds_own_models_have_nothing_to_find(twin, name):
    made = twin(name)
    assert lint(exporting.export(encode(made.quantized, "u8"), made.images[:2], output_names=["logits"], opset=20), "u8") == []


def test_a_file_of_another_tool_is_read_by_its_nodes():
    model = built(FLOAT_CONVOLUTION["norm-behind-convolution"])
    assert onnx_layers.paths(model) == {}
    assert [finding.path for finding in lint(model, "u8")] == [node.name for node in model.graph.node if node.op_type == "Conv"][
        1:2
    ]
