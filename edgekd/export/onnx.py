"""From a module to an ONNX file, through torch's exporter (torch.export, dynamo) and onnxslim."""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.errors import ExportError
from edgekd.export.bisect import mark
from edgekd.export.qdq import translations

INPUT = "images"
PATH = "edgekd.path"
"""Key in a node's metadata: the path of the module that it belongs to, in the user's model."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_OURS = ("quantizers.", "taps.")
"""Modules that edgekd puts into a model: what they make belongs to the module in front."""


def export(module: nn.Module, example: Tensor, *, output_names: Sequence[str], opset: int) -> Any:
    """The module as an ONNX model with a free batch size.

    Args:
        module: In eval mode; an encoded one for integers (edgekd.export.qdq).
        example: An input, [B, C, H, W] with B of at least 2 (torch.export takes a batch of 1 for a constant).
        output_names: Of the outputs, in order.
        opset: ONNX opset.

    Returns:
        An onnx.ModelProto, checked; :func:`paths` reads the module that each node belongs to, and nodes that make a module's
        output say so (edgekd.export.bisect).

    Raises:
        ExportError: The exporter does not follow the model, or its file is not valid.
    """
    import onnx
    import onnxslim

    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own internals, nothing that a user could act on
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                custom_translation_table=translations(),
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=[INPUT],
                output_names=list(output_names),
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        scopes = _module_of_each_tensor(program.model_proto)
        model = onnxslim.slim(program.model_proto)  # it drops the nodes' metadata, and keeps the tensors' names
        for node in model.graph.node:
            path = next((scopes[name] for name in node.output if scopes.get(name)), "")
            node.metadata_props.add(key=PATH, value=path)
        mark(program.model_proto, model)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the exporter raises what the model's code and its own passes raise
        raise ExportError(
            f"{type(module).__name__} cannot be exported as ONNX: {_first_lines(error)}",
            hint="torch.export must be able to follow the model's forward",
        ) from error
    return model


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
        found[node.name] = path or INPUT
        behind.update(dict.fromkeys(node.output, path))
    return found


def _module_of_each_tensor(model: Any) -> dict[str, str]:
    """What torch's exporter says of where tensors are made; nothing for those that only the outermost forward makes."""
    found = {}
    for node in model.graph.node:
        text = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]")
        scopes = [str(scope) for scope in ast.literal_eval(text)][:-1]  # the last is the operation's own name
        path = scopes[-1] if scopes and not scopes[-1].startswith(_OURS) else ""
        found.update(dict.fromkeys(node.output, path))
    return found


def sizes(model: Any) -> dict[str, list[int]]:
    """Shapes of all tensors that shape inference knows, for one image: a free batch counts 1."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def to_float16(model: Any) -> Any:
    """A copy with float16 weights and arithmetic; inputs and outputs stay float32. The conversion is ONNX Runtime's.

    Norms and softmax stay in float32: their sums leave float16's range.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    block = [*DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "InstanceNormalization", "GroupNormalization", "Softmax", "ReduceMean"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of every tiny weight that becomes the smallest float16
        return convert_float_to_float16(model, keep_io_types=True, op_block_list=block)


def describe(model: Any, preprocessing: dict[str, Any], precision: str) -> dict[str, Any]:
    """io.json: inputs, outputs (name, dtype, shape with -1 where the size is free), preprocessing, precision."""
    import onnx

    def spec(value: Any) -> dict[str, Any]:
        tensor = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        return {
            "name": value.name,
            "dtype": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name,
            "shape": shape,
        }

    return {
        "inputs": [spec(value) for value in model.graph.input],
        "outputs": [spec(value) for value in model.graph.output],
        "preprocessing": preprocessing,
        "precision": precision,
    }


def layers(model: Any) -> list[dict[str, Any]]:
    """layers.json: every convolution and matrix product with constant weights, in the graph's order.

    Returns:
        Rows with node (its name in the file), outputs (its tensor, and those of a ReLU or an addition right behind it, by which
        libraries may name what they fuse), path (the torch module's; the node's name in a file that does not tell), op,
        macs (of one image) and asked: int8 where inputs and weights come out of DequantizeLinear, else the weights' own type.
    """
    import onnx

    shapes, modules = sizes(model), paths(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}

    def origin(name: str) -> tuple[Any, bool]:
        """The constant behind a weight, and whether it is dequantized."""
        node = makers.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            return weights.get(node.input[0]), True
        return weights.get(name), False

    def fused(name: str) -> list[str]:
        """A tensor, and what activations and additions make of it."""
        users = [node for node in model.graph.node if name in node.input]
        if len(users) == 1 and users[0].op_type in ("Relu", "Clip", "Add"):
            return [name, *fused(users[0].output[0])]
        return [name]

    rows = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weight, quantized = origin(node.input[1])
        if weight is None:
            continue
        source = makers.get(node.input[0])
        integer = quantized and source is not None and source.op_type == "DequantizeLinear"
        dims = list(weight.dims)
        outputs = math.prod(shapes.get(node.output[0], [0]))
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        each = math.prod(dims[1:]) if node.op_type == "Conv" else dims[-1 if transposed else -2]
        # The name of its weights is the layer's own; where they are computed, the scope is.
        named = weight.name.endswith((".codes", ".weight"))
        rows.append(
            {
                "node": node.name,
                "outputs": fused(node.output[0]),
                "path": weight.name.rsplit(".", 1)[0] if named else modules.get(node.name) or node.name,
                "op": node.op_type,
                "macs": outputs * each,
                "asked": "int8" if integer else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)).name,
            }
        )
    return rows


def save(model: Any, path: Path) -> None:
    """Write the file.

    Raises:
        ExportError: It is larger than the 2 GiB that one ONNX file holds.
    """
    if model.ByteSize() >= 2**31:
        raise ExportError(
            f"the model has {model.ByteSize() / 2**30:.1f} GiB; one ONNX file holds less than 2", hint="use a smaller student"
        )
    path.write_bytes(model.SerializeToString())


class _quiet:  # noqa: N801  used like a function, in a with block
    """Keep a logger at errors only inside the block."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def _first_lines(error: Exception, lines: int = 3) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(text[:lines])
