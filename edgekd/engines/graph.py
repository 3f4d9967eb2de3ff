"""An ONNX graph: what goes into it, what comes out, and its nodes in the order of execution."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd._optional import require
from edgekd.engines.base import DYNAMIC, TensorSpec
from edgekd.errors import BuildError


def inputs(graph: Any, model: object = "the model") -> list[TensorSpec]:
    """What an onnx.GraphProto has to be given: its inputs without the weights, which old files list there too.

    Args:
        graph: The graph.
        model: The file's name, for the message.

    Raises:
        BuildError: One is no tensor, or of an unknown type.
    """
    weights = {tensor.name for tensor in graph.initializer}
    return [_spec(value, model) for value in graph.input if value.name not in weights]


def outputs(graph: Any, model: object = "the model") -> list[TensorSpec]:
    """What an onnx.GraphProto gives; see :func:`inputs`."""
    return [_spec(value, model) for value in graph.output]


def sort(graph: Any) -> list[Any]:
    """Put the nodes of an onnx.GraphProto behind those that they read.

    Returns:
        Nodes that wait for each other, which stay at the end; none in a sound graph.
    """
    waiting, ready = list(graph.node), []
    pending = {name for node in waiting for name in node.output}
    while waiting:
        left = []
        for node in waiting:
            if pending.isdisjoint(node.input):
                ready.append(node)
                pending.difference_update(node.output)
            else:
                left.append(node)
        if len(left) == len(waiting):
            break
        waiting = left
    copies = [type(node).FromString(node.SerializeToString()) for node in (*ready, *waiting)]
    del graph.node[:]
    graph.node.extend(copies)
    return waiting


def _spec(value: Any, model: object) -> TensorSpec:
    onnx = require("onnx")
    tensor = value.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    except (KeyError, TypeError) as error:
        raise BuildError(
            f"{model}: {value.name!r} is no tensor of a known type", hint="is the file whole? Copy or export it again"
        ) from error
    shape = (dim.dim_value if dim.HasField("dim_value") else DYNAMIC for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(shape))
