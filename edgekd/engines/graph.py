"""What goes into an ONNX graph and what comes out."""

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
