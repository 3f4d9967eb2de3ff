"""What the layers of an ONNX file were asked to run in: the table that the precision audit starts from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgekd._optional import require

PATH = "edgekd.path"
"""Key in a node's metadata: the path of the module that it belongs to, in the user's model."""
FUSED = ("Relu", "Clip", "Add", "HardSigmoid", "LeakyRelu", "Sigmoid", "Tanh")
"""What libraries fuse into the layer before it, and may then name after it."""


def paths(model: Any) -> dict[str, str]:
    """Which module each node belongs to: node name -> path in the user's model.

    Nodes that no module claims (quantizers, conversions, operations in the outermost forward) belong to the module whose values
    they read. In a file that edgekd did not write nothing is known, and the result is empty.
    """
    known = {prop.value for node in model.graph.node for prop in node.metadata_props if prop.key == PATH}
    found: dict[str, str] = {}
    behind: dict[str, str] = {}
    for node in model.graph.node if known else ():
        own = next((prop.value for prop in node.metadata_props if prop.key == PATH), "")
        path = own or next((behind[name] for name in node.input if behind.get(name)), "")
        found[node.name] = path or model.graph.input[0].name
        behind.update(dict.fromkeys(node.output, path))
    return found


def sizes(model: Any) -> dict[str, list[int]]:
    """Shapes of all tensors that shape inference knows, for one image: a free batch counts 1."""
    onnx = require("onnx")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def layers(model: Any) -> list[dict[str, Any]]:
    """layers.json: every convolution, transposed or not, and matrix product with constant weights, in the graph's order.

    Returns:
        Rows with node (its name in the file), outputs (its tensor, and those of a ReLU or an addition right behind it, by which
        libraries may name what they fuse), path (the torch module's; the node's name in a file that does not tell), op,
        macs (of one image) and asked: int8 where inputs and weights come out of DequantizeLinear, else the weights' own type.
    """
    onnx = require("onnx")
    shapes, modules = sizes(model), paths(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}

    def origin(name: str) -> tuple[Any, bool]:
        """The constant behind a weight, and whether it is dequantized."""
        node = makers.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            codes = makers.get(node.input[0])  # some tools leave the weights in float, and quantize them in the graph
            return weights.get(node.input[0] if codes is None else codes.input[0]), True
        return weights.get(name), False

    def fused(name: str) -> list[str]:
        """A tensor, and what activations and additions make of it."""
        users = [node for node in model.graph.node if name in node.input]
        if len(users) == 1 and users[0].op_type in FUSED:
            return [name, *fused(users[0].output[0])]
        return [name]

    rows = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        weight, quantized = origin(node.input[1])
        if weight is None:
            continue
        source = makers.get(node.input[0])
        integer = quantized and source is not None and source.op_type == "DequantizeLinear"
        dims = list(weight.dims)
        if node.op_type == "ConvTranspose":  # every value of its input meets every weight of its channel
            values, each = shapes.get(node.input[0], [0]), math.prod(dims[1:])
        elif node.op_type == "Conv":
            values, each = shapes.get(node.output[0], [0]), math.prod(dims[1:])
        else:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            values, each = shapes.get(node.output[0], [0]), dims[-1 if transposed else -2]
        # The name of its weights is the layer's own; where they are computed, the scope is.
        named = weight.name.endswith((".codes", ".weight"))
        rows.append(
            {
                "node": node.name,
                "outputs": fused(node.output[0]),
                "path": weight.name.rsplit(".", 1)[0] if named else modules.get(node.name) or node.name,
                "op": node.op_type,
                "macs": math.prod(values) * each,
                "asked": "int8" if integer else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)).name,
            }
        )
    return rows
