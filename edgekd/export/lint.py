"""What in an exported ONNX file keeps an engine from running fast, or at all, by module path and before any build.

Every rule was seen on the engines themselves (ONNX Runtime's optimized graph, OpenVINO's runtime model, TensorRT-RTX's parser);
the tests build each pattern and look. What the engines put right by themselves is no finding: a quantizer twice in a row, weights
quantized in the graph, concatenations and upsamplings in OpenVINO, a batch norm or a SiLU behind a convolution in OpenVINO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.engines import onnx_layers
from edgekd.engines.model_check import wrong_numbers
from edgekd.errors import ExportError

CPU, ORT, RTX = ("onnxruntime", "openvino"), ("onnxruntime",), ("tensorrt_rtx",)
EVERY = (*CPU, *RTX)
SMALL = 0.01
"""Share of the MACs, or of the values that layers write, below which an operation is not worth a line."""
_SHOWN = 5
_MOVES = ("MaxPool", "Transpose", "Slice")
"""ONNX Runtime moves quantizers across these by itself."""
_CLIPS = ("Relu", "Clip")
"""Between integers these cost nothing, or little."""
_ACTIVATIONS = (
    *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Gelu", "Mish"),
    *("LeakyRelu", "PRelu", "Elu", "Selu", "Softplus", "Tanh", "Erf"),
)
_INTEGER = (
    "Add",
    "Mul",
    "LeakyRelu",
    "Sigmoid",
    "Softmax",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "MaxPool",
    "Resize",
    "Where",
)
"""ONNX Runtime runs these on integers where all their inputs come out of DequantizeLinear and their result is quantized."""
_FLOAT = (
    *_ACTIVATIONS,
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Sqrt",
    "Exp",
    "Softmax",
    "BatchNormalization",
    "LayerNormalization",
    "Pad",
    *_CLIPS,
)


@dataclass(frozen=True)
class Rule:
    """A pattern that the engines do not forgive."""

    backends: tuple[str, ...]
    """Whom it costs something."""
    cost: str
    advice: str
    severe: bool = False
    """No engine can be built, or it computes something else."""


RULES = {
    "norm-behind-convolution": Rule(ORT, "the convolution runs in float", "fold the batch norm into the convolution"),
    "activation-behind-convolution": Rule(
        ORT, "the convolution runs in float", "quantize between them, or use ReLU as the activation"
    ),
    "half-quantized-addition": Rule(ORT, "the convolution in front of the addition runs in float", "quantize both addends"),
    "several-quantizers": Rule(ORT, "the convolution runs in float", "quantize the tensor once, for all that read it"),
    "cut-range": Rule(
        ORT, "the convolution runs in float", "end the quantizer's range where the activation ends, or use ReLU instead of ReLU6"
    ),
    "float-input": Rule(ORT, "the convolution runs in float", "quantize what it reads"),
    "per-channel-activation": Rule(
        ORT, "ONNX Runtime builds an engine that fails when it runs", "use one scale per tensor for activations", True
    ),
    "float-result": Rule(ORT, "the convolution runs in float", "quantize its result"),
    "float-activation": Rule(
        CPU, "its values are converted to float and back", "use ReLU, or leave the activation out where accuracy allows"
    ),
    "float-operation": Rule(ORT, "its values are converted to float and back", "quantize all that it reads and its result"),
    "float-layers": Rule(CPU, "these run in float32", "take them out of quantizer.skip, if accuracy allows"),
    "transposed-convolution": Rule(CPU, "it runs in float32", "use nearest upsampling and a convolution"),
    "requantized-layer": Rule(
        ORT, "it runs on integers all the same, with scales that nobody trained", "skip the layer behind it as well"
    ),
    "different-scales": Rule(ORT, "its values are converted between the scales", "give what goes in and out one quantizer"),
    "integer-average-pool": Rule(
        ORT,
        "its average pooling on integers is several times slower than in float",
        "use max pooling, or a stride in a convolution",
    ),
    "unread-quantizer": Rule(ORT, "values are rounded and converted for nobody", "remove the quantizer"),
    "foreign-operator": Rule(("openvino", *RTX), "other engines than ONNX Runtime may refuse it", "use the standard's operators"),
    "bad-scale": Rule(
        EVERY, "the engine computes something else", "look at the training: a range has collapsed or overflowed", True
    ),
    "bad-weights": Rule(EVERY, "the engine computes something else", "look at the training: weights are not finite", True),
    "integer-bias": Rule(RTX, "TensorRT refuses int32 in DequantizeLinear", "leave biases in float", True),
    "unsigned-activation": Rule(RTX, "TensorRT reads uint8 codes as int8", "export with the encoding s8", True),
    "zero-point": Rule(RTX, "TensorRT refuses zero points other than 0", "export with the encoding s8", True),
}


@dataclass(frozen=True)
class Finding:
    """One place where a rule holds."""

    rule: str
    path: str
    """The module's, in the user's model."""
    found: str
    share: float = 0.0
    """Of the model's MACs, where the place is a layer; orders the findings."""


def lint(model: Any, encoding: str) -> list[Finding]:
    """Read a model as it was exported.

    Args:
        model: An onnx.ModelProto from :func:`edgekd.export.onnx.export`, or any other.
        encoding: float32, float16, u8, u7 or s8: says which backends it is for.

    Returns:
        What was found, the most costly layers first within a rule.
    """
    graph = _Graph(model)
    found = [*_wrong(graph)]
    if encoding == "s8":
        found += _refused(graph)
    if encoding in ("u8", "u7"):
        found += _slow(graph)
    order = list(RULES)
    return sorted(found, key=lambda finding: (order.index(finding.rule), -finding.share))


def refuse(findings: Iterable[Finding]) -> None:
    """Stop at findings that would make a build fail, or an engine wrong.

    Raises:
        ExportError: There are some; the message has one line per rule.
    """
    severe = [finding for finding in findings if RULES[finding.rule].severe]
    if severe:
        text = "; ".join(lines(severe))
        raise ExportError(f"no engine can be built from this file: {text}", hint=RULES[severe[0].rule].advice)


def lines(findings: Iterable[Finding], backends: Iterable[str] = EVERY) -> list[str]:
    """One line per rule: whom it costs what, where (the first five module paths), and what to do.

    Args:
        findings: What :func:`lint` gave.
        backends: Those that the model is built for; a rule that costs them nothing is left out.
    """
    asked, groups = set(backends), dict[str, list[Finding]]()
    for finding in findings:
        groups.setdefault(finding.rule, []).append(finding)
    text = []
    for name, group in groups.items():
        rule = RULES[name]
        whom = [backend for backend in rule.backends if backend in asked]
        if whom:
            places = ", ".join(f"{finding.path} ({finding.found})" for finding in group[:_SHOWN])
            more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
            share = sum(finding.share for finding in group)
            weight = f", {share:.0%} of the MACs" if share >= SMALL else ""
            text.append(f"{' and '.join(whom)}: {name}: {places}{more}: {rule.cost}{weight}; {rule.advice}")
    return text


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """lint.json: rule, path, found, share, and the rule's backends, cost, advice and severe."""
    return [{**asdict(finding), **asdict(RULES[finding.rule])} for finding in findings]


def from_json(rows: Iterable[dict[str, Any]]) -> list[Finding]:
    """Read lint.json; rules that this edgekd does not know are left out."""
    return [Finding(row["rule"], row["path"], row["found"], row["share"]) for row in rows if row["rule"] in RULES]


class _Graph:
    """A model's graph, indexed."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.proto = model.graph
        self.nodes = list(model.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.paths = onnx_layers.paths(model)
        self.rows = {row["node"]: row for row in onnx_layers.layers(model)}
        self.macs = sum(row["macs"] for row in self.rows.values())
        self.sizes = onnx_layers.sizes(model)
        self.written = sum(math.prod(self.sizes.get(row["outputs"][0], [0])) for row in self.rows.values())
        self._array = onnx.numpy_helper.to_array

    def value(self, name: str) -> npt.NDArray[Any] | None:
        """A constant, or None where the name is of none."""
        return self._array(self.constants[name]) if name in self.constants else None

    def where(self, node: Any) -> str:
        """The module that a node belongs to."""
        if node.name in self.rows:
            return str(self.rows[node.name]["path"])
        return self.paths.get(node.name) or node.name

    def share(self, node: Any) -> float:
        """A layer's part of all MACs."""
        return self.rows[node.name]["macs"] / self.macs if node.name in self.rows and self.macs else 0.0

    def maker(self, name: str) -> str:
        """The kind of node that makes a tensor; nothing for an input or a constant."""
        return str(self.makers[name].op_type) if name in self.makers else ""

    def dequantized(self, name: str) -> bool:
        """Whether a tensor is an activation that comes out of DequantizeLinear."""
        return self.maker(name) == "DequantizeLinear" and self.makers[name].input[0] not in self.constants

    def quantized(self, name: str) -> bool:
        """Whether a tensor goes into one QuantizeLinear and nowhere else."""
        return name not in self.outputs and [node.op_type for node in self.readers.get(name, [])] == ["QuantizeLinear"]

    def layers(self, *, integer: bool) -> Iterator[Any]:
        """Convolutions and products with constant weights that were asked on integers, or in float."""
        for node in self.nodes:
            if node.name in self.rows and (self.rows[node.name]["asked"] == "int8") is integer:
                yield node

    def grid(self, quantizer: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear; empty where they are not constant."""
        scale = self.value(quantizer.input[1])
        zero = self.value(quantizer.input[2]) if len(quantizer.input) > 2 else np.zeros(1, np.uint8)
        nothing = np.zeros(0, np.float32)
        return (nothing, nothing) if scale is None or zero is None else (scale, zero)


def _wrong(graph: _Graph) -> Iterator[Finding]:
    """What computes something else on every engine."""
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield Finding("foreign-operator", graph.where(node), f"{node.domain}.{node.op_type}")
    for node, rule, found in wrong_numbers(graph.proto):
        yield Finding(rule, graph.where(node), found)


def _refused(graph: _Graph) -> Iterator[Finding]:
    """What TensorRT's parser refuses."""
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        constant = graph.value(node.input[0])
        _scale, zero = graph.grid(node)
        if constant is not None and constant.dtype == np.int32:
            yield Finding("integer-bias", graph.where(node), node.input[0])
        elif node.op_type == "QuantizeLinear" and zero.dtype == np.uint8:
            yield Finding("unsigned-activation", graph.where(node), "uint8")
        elif node.op_type == "QuantizeLinear" and zero.size and zero.any():
            yield Finding("zero-point", graph.where(node), f"zero point {zero.ravel()[0]}")


def _slow(graph: _Graph) -> Iterator[Finding]:
    """What costs time on a CPU."""
    taken = set[str]()
    for node in graph.layers(integer=True):
        if node.op_type == "Conv" and (reason := _float_reason(graph, node)):
            rule, found, culprit = reason
            taken.add(culprit)
            yield Finding(rule, graph.where(node), found, graph.share(node))
    for node in graph.layers(integer=False):
        taken.add(node.name)
        between = node.op_type == "Conv" and graph.dequantized(node.input[0]) and _float_reason(graph, node) is None
        if graph.share(node) >= SMALL:
            rule = "requantized-layer" if between else "float-layers"
            yield Finding(rule, graph.where(node), node.op_type, graph.share(node))
    yield from _float_operations(graph, taken)
    for node in graph.nodes:
        if node.op_type == "ConvTranspose" and graph.dequantized(node.input[0]):
            yield Finding("transposed-convolution", graph.where(node), node.op_type)
        pooled = node.op_type in ("MaxPool", "Concat", "AveragePool") and graph.quantized(node.output[0])
        if not pooled or not all(graph.dequantized(name) for name in node.input):
            continue
        if node.op_type == "AveragePool":
            if _elements(graph, node) >= SMALL * graph.written:
                yield Finding("integer-average-pool", graph.where(node), node.op_type)
            continue
        ends = [graph.makers[name] for name in node.input] + graph.readers[node.output[0]]
        scales = sorted({f"{float(scale.ravel()[0]):.3g}" for scale, _zero in map(graph.grid, ends) if scale.size})
        if len(scales) > 1:
            yield Finding("different-scales", graph.where(node), f"{node.op_type}: {', '.join(scales)}")


_Reason = tuple[str, str, str]
"""Rule, what was found, and the node that is to blame where it is another one."""


def _float_reason(graph: _Graph, node: Any) -> _Reason | None:
    """Why ONNX Runtime runs a quantized convolution in float."""
    source = node.input[0]
    while graph.maker(source) in _MOVES:
        source = graph.makers[source].input[0]
    if not graph.dequantized(source):
        kind = graph.maker(source)
        return "float-input", f"reads {kind or 'the input'} in float", graph.makers[source].name if kind else ""
    if graph.grid(graph.makers[source])[0].size > 1:
        return "per-channel-activation", "its input has a scale per channel", ""
    tensor, activation = node.output[0], None
    while len(graph.readers.get(tensor, [])) == 1 and tensor not in graph.outputs:
        (follower,) = graph.readers[tensor]
        if follower.op_type in _CLIPS and activation is None:
            activation = follower
        elif follower.op_type not in _MOVES:
            break
        tensor = follower.output[0]
    readers = graph.readers.get(tensor, [])
    if other := next((reader for reader in readers if reader.op_type != "QuantizeLinear"), None):
        return _float_reader(graph, other)
    if tensor in graph.outputs:
        return "float-result", "an output of the model", ""
    if len(readers) > 1:
        return "several-quantizers", f"{len(readers)} read it", ""
    return _range_reason(graph, readers[0], activation) if readers else None


def _float_reader(graph: _Graph, reader: Any) -> _Reason:
    """What reads the result of a convolution before it is quantized."""
    where = graph.where(reader)
    if reader.op_type == "BatchNormalization":
        return "norm-behind-convolution", where, reader.name
    if reader.op_type == "Add":
        return "half-quantized-addition", f"added in {where}", reader.name
    rule = "activation-behind-convolution" if reader.op_type in _ACTIVATIONS else "float-result"
    return rule, f"read by {reader.op_type} in {where}", reader.name


def _range_reason(graph: _Graph, quantizer: Any, activation: Any) -> _Reason | None:
    """Whether a quantizer's codes stand for values that the activation in front of it never gives."""
    scale, zero = graph.grid(quantizer)
    if scale.size > 1:
        return "per-channel-activation", "its result has a scale per channel", ""
    if not scale.size or activation is None:
        return None
    low, high = _bounds(graph, activation)
    codes = np.iinfo(zero.dtype)
    ends = [(code - float(zero.ravel()[0])) * float(scale.ravel()[0]) for code in (codes.min, codes.max)]
    slack = 1e-6 * abs(ends[1])  # one rounding of float32, which ONNX Runtime computes in
    if low - slack <= ends[0] and ends[1] <= high + slack:
        return None
    bounds = f"from {low:g}" + (f" to {high:g}" if high < math.inf else "")
    return "cut-range", f"{activation.op_type} gives values {bounds}, codes stand for {ends[0]:.4g} to {ends[1]:.4g}", ""


def _bounds(graph: _Graph, node: Any) -> tuple[float, float]:
    """Between what a ReLU or Clip keeps its values."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    ends = [graph.value(name) if name else None for name in [*node.input[1:3], "", ""][:2]]
    return (-math.inf if ends[0] is None else float(ends[0])), (math.inf if ends[1] is None else float(ends[1]))


def _float_operations(graph: _Graph, taken: set[str]) -> Iterator[Finding]:
    """Operations in float between integer ones, joined by module, and quantizers that stand between two of them."""
    ahead = set[str]()  # tensors that a QuantizeLinear reads, perhaps behind other float operations
    for node in reversed(graph.nodes):
        readers = [reader for name in node.output for reader in graph.readers.get(name, [])]
        reached = any(reader.op_type == "QuantizeLinear" or reader.output[0] in ahead for reader in readers)
        if node.op_type in _FLOAT and reached:
            ahead.update(node.output)
    behind = set[str]()  # tensors made from integers by float operations alone
    found: dict[tuple[str, str], list[str]] = {}
    quiet = set[str]()
    for node in graph.nodes:
        inputs = [name for name in node.input if name and name not in graph.constants]
        from_integers = any(name in behind or graph.dequantized(name) for name in inputs)
        if node.op_type not in _FLOAT or not from_integers or node.output[0] not in ahead:
            continue
        behind.update(node.output)
        integer = node.op_type in _INTEGER and all(map(graph.dequantized, inputs)) and len(inputs) == len(node.input)
        integer = integer and graph.quantized(_behind_clip(graph, node))
        if node.name in taken or node.op_type in _CLIPS or _elements(graph, node) < SMALL * graph.written:
            continue
        activation = node.op_type in _ACTIVATIONS
        if not integer or (activation and node.op_type in _INTEGER):
            quiet.add(node.output[0])
            found.setdefault(("float-activation" if activation else "float-operation", graph.where(node)), []).append(
                node.op_type
            )
    for (rule, path), kinds in found.items():
        if rule == "float-operation" and ("float-activation", path) in found:
            continue  # the product of x * sigmoid(x)
        yield Finding(rule, path, ", ".join(dict.fromkeys(kinds)))
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] in quiet:
            dequantizers = graph.readers.get(node.output[0], [])
            users = [user for one in dequantizers for user in graph.readers.get(one.output[0], [])]
            if users and all(user.output[0] in quiet for user in users):
                yield Finding("unread-quantizer", graph.where(node), f"between float operations, read by {users[0].op_type}")


def _behind_clip(graph: _Graph, node: Any) -> str:
    """What a node writes, or what a ReLU makes of it."""
    readers = graph.readers.get(node.output[0], [])
    return str(readers[0].output[0] if [reader.op_type in _CLIPS for reader in readers] == [True] else node.output[0])


def _elements(graph: _Graph, node: Any) -> int:
    """Values that a node writes for one image."""
    return math.prod(graph.sizes.get(node.output[0], [0]))
