"""Is an ONNX file whole and sane? Asked before a build: libraries answer a damaged file with a riddle, with nothing, or never.

ONNX Runtime builds an engine from scales of zero and weights that are not numbers; OpenVINO works for hours on an opset of 2^62.
Needs onnx, which a device may not have: there the check is left out, and engine.json says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd._optional import require
from edgekd.engines.base import DYNAMIC, Io, TensorSpec
from edgekd.engines.graph import inputs, outputs, sort
from edgekd.engines.onnx_layers import PATH
from edgekd.errors import BuildError, MissingDependency

LIMIT = 2**31
"""Bytes that a protobuf file can have."""
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "org.openvinotoolkit", "trt.plugins")
"""Operators of the standard and of the engines."""
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
_PRODUCTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 3),
}
"""Operators that multiply activations by weights, and which of their inputs the weights are."""
_MOVES = (
    *("MaxPool", "Transpose", "Reshape", "Flatten", "Slice", "Split", "Squeeze", "Unsqueeze", "Concat", "Pad", "Identity"),
    *("Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"),
)
_EXPORT_AGAIN = "is the file whole? Copy or export it again"


def check(model: Path, io: Io | None = None) -> str:
    """Read a model through the onnx package, without running anything.

    Args:
        model: The .onnx file.
        io: What its io.json says, to be compared with it.

    Returns:
        "ok", or why it could not be checked.

    Raises:
        BuildError: The file is damaged, its operators or opset are unknown, tensors are missing, weights are not finite, scales
            are not positive numbers, or io.json is of another model; the message names the node or tensor, and its module.
    """
    try:
        onnx = require("onnx")
    except MissingDependency as error:
        return f"not checked: {error.message}"
    proto = load(model)
    _check_nodes(onnx, model, proto)
    _check_tensors(onnx, model, proto)
    waiting = sort(proto.graph)  # the standard wants it; converters leave them unsorted, and no engine minds
    if waiting:
        names = ", ".join(_named(node) for node in waiting[:3])
        raise BuildError(f"{model} has nodes that wait for each other, {len(waiting)} in all: {names}", hint=_EXPORT_AGAIN)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # it raises ValidationError, and what protobuf and C++ throw at odd files
        text = " ".join(str(error).split("==>")[0].split())
        raise BuildError(f"{model} is not valid ONNX: {text}{_module_in(proto, text)}", hint=_EXPORT_AGAIN) from error
    for node, kind, text in wrong_numbers(proto.graph):
        what = "a scale that is no positive number" if kind == "bad-scale" else "weights that are not finite"
        raise BuildError(f"{model}: {_named(node)} has {what}: {text}", hint="train or calibrate the model again")
    if io is not None:
        _check_io(model, proto, io)
    return "ok"


def load(model: Path) -> Any:
    """The onnx.ModelProto in a file, its external data left where they are.

    Raises:
        BuildError: The file cannot be read, or holds no model.
        MissingDependency: onnx is not installed.
    """
    onnx = require("onnx")
    try:
        size = model.stat().st_size
        if size >= LIMIT:
            raise BuildError(f"{model} has {size / 2**30:.1f} GiB; one ONNX file holds less than 2", hint="use external data")
        proto = onnx.load(str(model), load_external_data=False)
    except BuildError:
        raise
    except Exception as error:  # protobuf's errors share no base class
        raise BuildError(f"{model} cannot be read as ONNX: {error}", hint=_EXPORT_AGAIN) from error
    graph = proto.graph
    missing = [name for name in ("node", "input", "output") if not len(getattr(graph, name))]
    if missing:
        raise BuildError(f"{model} holds no model: it has no {', no '.join(f'{name}s' for name in missing)}", hint=_EXPORT_AGAIN)
    return proto


def wrong_numbers(graph: Any) -> Iterator[tuple[Any, str, str]]:
    """Scales and weights of a graph that make every engine compute something else.

    Yields:
        The node, ``bad-scale`` or ``bad-weights``, and the value with the tensor's name.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        activation = node.op_type == "QuantizeLinear"  # its DequantizeLinear has the same scale
        if activation or (node.op_type == "DequantizeLinear" and node.input[0] in constants):
            scale = _values(constants.get(node.input[1]))
            bad = scale[~(np.isfinite(scale) & (scale >= np.finfo(scale.dtype).tiny))]  # a GPU takes what is below for zero
            if bad.size:
                what = "scale" if scale.size == 1 else f"{bad.size} of {scale.size} scales, for instance"
                yield node, "bad-scale", f"{what} {bad[0]:g}"
        if node.op_type in _LAYERS:
            for name in node.input[1:]:
                bad = ~np.isfinite(_values(constants.get(name)))
                if bad.any():
                    yield node, "bad-weights", f"{bad.sum()} values of {name}"


def overflows(model: Path) -> list[str]:
    """Layers of an int8 file whose sums may not fit on a CPU that adds pairs of products in 16 bits.

    Returns:
        One note with their number and the first of them; nothing where all fit, or onnx is not installed.
    """
    try:
        graph = load(model).graph
    except MissingDependency:
        return []
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    makers = {name: node for node in graph.node for name in node.output}
    layers, found = 0, []
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        weights, code = _weight_codes(node, constants, makers), _largest_code(node.input[0], constants, makers)
        if weights is not None and code is not None:
            layers += 1
            if 2 * code * int(np.abs(weights.astype(np.int64)).max(initial=0)) > np.iinfo(np.int16).max:
                found.append(node)
    if not found:
        return []
    return [
        f"outputs may be wrong: this CPU has no VNNI and adds pairs of products in 16 bits, where the codes of {len(found)} of "
        f"{layers} int8 layers overflow, {_named(found[0])} first; export on a CPU of this kind, or quantize with weights or "
        "activations of 7 bits"
    ]


def _weight_codes(node: Any, constants: Mapping[str, Any], makers: Mapping[str, Any]) -> Any:
    """The int8 weights of a layer; None where it has none, or they are unsigned or in another file."""
    onnx = require("onnx")
    index = _PRODUCTS[node.op_type]
    name = node.input[index] if len(node.input) > index else ""
    maker = makers.get(name)
    while maker is not None and maker.op_type in ("DequantizeLinear", "Transpose", "Reshape"):
        name = maker.input[0]
        maker = makers.get(name)
    tensor = constants.get(name)
    if tensor is None or tensor.data_type != onnx.TensorProto.INT8 or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return onnx.numpy_helper.to_array(tensor)


def _largest_code(name: str, constants: Mapping[str, Any], makers: Mapping[str, Any]) -> int | None:
    """The largest code, as unsigned, that a tensor is made of, moved or not; None where it is made of no codes."""
    found = [_code_of(maker, constants, makers) for maker in _origins(name, constants, makers)]
    return max((code for code in found if code is not None), default=None)


def _code_of(maker: Any, constants: Mapping[str, Any], makers: Mapping[str, Any]) -> int | None:
    largest = int(np.iinfo(np.uint8).max)  # engines add 128 to codes of int8
    if maker.op_type == "DequantizeLinear":
        return _largest_code(maker.input[0], constants, makers) or largest
    if maker.op_type == "Clip":
        highest = _array(constants.get(maker.input[2])) if len(maker.input) > 2 else None
        if highest is None or highest.dtype.kind == "f":
            return None
        return int(highest) - (np.iinfo(np.int8).min if highest.dtype == np.int8 else 0)
    if maker.op_type == "QuantizeLinear":  # again, on the same grid, it makes the codes that there were
        grid = [_array(constants.get(part)) for part in maker.input[1:]]
        sources = _origins(maker.input[0], constants, makers)
        same = [
            source.op_type == "DequantizeLinear"
            and all(part is not None for part in grid)
            and grid == [_array(constants.get(part)) for part in source.input[1:]]
            for source in sources
        ]
        return _largest_code(maker.input[0], constants, makers) if same and all(same) else largest
    return largest if maker.op_type.startswith(("QLinear", "DynamicQuantize")) else None


def _origins(name: str, constants: Mapping[str, Any], makers: Mapping[str, Any]) -> list[Any]:
    """The nodes that made a tensor's values, before they were moved."""
    if name not in makers:
        return []
    maker = makers[name]
    nearest = maker.op_type == "Resize" and all(b"cubic" not in entry.s and b"linear" not in entry.s for entry in maker.attribute)
    if maker.op_type not in _MOVES and not nearest:
        return [maker]
    return [origin for part in maker.input if part not in constants for origin in _origins(part, constants, makers)]


def _array(tensor: Any) -> Any:
    """A constant with one value, or None."""
    array = None if tensor is None else require("onnx").numpy_helper.to_array(tensor)
    return None if array is None or array.size != 1 else array.reshape(())


def _values(tensor: Any) -> Any:
    """A constant's values as one row of floats; none where they are integers, or lie in another file."""
    onnx = require("onnx")
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return np.zeros(0, np.float32)
    values = onnx.numpy_helper.to_array(tensor).ravel()
    return values if values.dtype.kind == "f" else np.zeros(0, np.float32)


def _check_nodes(onnx: Any, model: Path, proto: Any) -> None:
    known = onnx.defs.onnx_opset_version()
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None or not 1 <= version <= known:
        raise BuildError(
            f"{model} asks for opset {version}; the onnx package here knows 1 to {known}", hint="export with a lower opset"
        )
    names = Counter(node.name for node in proto.graph.node if node.name)
    twice = [name for name, count in names.items() if count > 1]
    if twice:  # ONNX Runtime refuses this too, and the audit finds layers by their names
        raise BuildError(f"{model} has several nodes of the name {twice[0]!r}", hint="give each node a name of its own")
    own = {function.domain for function in proto.functions}
    for node in proto.graph.node:
        if node.domain not in _DOMAINS and node.domain not in own:
            raise BuildError(
                f"{model}: {_named(node)} is of the domain {node.domain!r}, which neither ONNX nor an engine defines",
                hint="write the model with ONNX's own operators",
            )


def _check_tensors(onnx: Any, model: Path, proto: Any) -> None:
    """Whether every constant has the values that it claims, here or in a file beside the model."""
    users = {name: node for node in proto.graph.node for name in node.input}
    for tensor in proto.graph.initializer:
        try:
            problem = _missing_data(onnx, model.parent, tensor)
        except Exception as error:  # numpy and onnx disagree with the sizes in many ways
            problem = f"its values do not fit its shape {list(tensor.dims)}: {error}"
        if problem:
            user = f", which {_named(users[tensor.name])} reads" if tensor.name in users else ""
            raise BuildError(f"{model}: tensor {tensor.name!r}{user}: {problem}", hint=_EXPORT_AGAIN)


def _missing_data(onnx: Any, folder: Path, tensor: Any) -> str:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        onnx.numpy_helper.to_array(tensor)
        return ""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    if not entries.get("location") or location.is_absolute() or ".." in location.parts:
        return f"its data lie in {str(location)!r}, which is no file beside the model"
    if not (folder / location).is_file():
        return f"its data lie in {location}, which does not exist beside the model"
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    have = (folder / location).stat().st_size
    return f"{location} has {have} bytes; it should have at least {end}" if end > have else ""


def _check_io(model: Path, proto: Any, io: Io) -> None:
    for kind, values, specs in (
        ("inputs", inputs(proto.graph, model), io.inputs),
        ("outputs", outputs(proto.graph, model), io.outputs),
    ):
        expected = {spec.name: spec for spec in specs}
        same = len(values) == len(expected) == len(specs) and all(
            value.name in expected and _fits(value, expected[value.name]) for value in values
        )
        if not same:
            raise BuildError(
                f"io.json beside {model} is of another model: its {kind} are {_specs(specs)}; the model's are {_specs(values)}",
                hint="put the model's own io.json beside it",
            )


def _fits(value: TensorSpec, spec: TensorSpec) -> bool:
    """Whether two descriptions of a tensor can both be true; a graph need not know the shape of its outputs."""
    if value.dtype != spec.dtype or (value.shape and len(value.shape) != len(spec.shape)):
        return False
    return not value.shape or all(DYNAMIC in (a, b) or a == b for a, b in zip(value.shape, spec.shape, strict=True))


def _specs(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{spec.name}: {spec.dtype} {list(spec.shape)}" for spec in specs)


def _named(node: Any) -> str:
    """A node for a message, with its module where that is known."""
    path = next((entry.value for entry in node.metadata_props if entry.key == PATH and entry.value), "")
    return f"node {node.name!r} ({node.op_type}{f' in module {path}' if path else ''})"


def _module_in(proto: Any, text: str) -> str:
    """The node that another library's message names, with its module."""
    words = set(re.findall(r"[^\s'\"(),:]+", text))
    found = next((node for node in proto.graph.node if node.name and node.name in words), None)
    return f" [{_named(found)}]" if found is not None else ""
