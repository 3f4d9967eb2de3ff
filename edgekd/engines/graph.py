"""What goes into an ONNX graph and what comes out, as io.json holds it."""

from __future__ import annotations

from typing import Any

import numpy as np


def tensors(onnx: Any, graph: Any) -> dict[str, list[dict[str, Any]]]:
    """The inputs and outputs of a graph.

    Args:
        onnx: The imported module: a device that only runs engines need not have it.
        graph: An onnx.GraphProto.

    Returns:
        inputs (the weights, which old files list too, left out) and outputs: name, dtype, shape with -1 where the size is free.
    """

    def spec(value: Any) -> dict[str, Any]:
        tensor = value.type.tensor_type
        return {
            "name": value.name,
            "dtype": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name,
            "shape": [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim],
        }

    weights = {tensor.name for tensor in graph.initializer}
    return {
        "inputs": [spec(value) for value in graph.input if value.name not in weights],
        "outputs": [spec(value) for value in graph.output],
    }
