"""Non-maximum suppression in the graph: a detector's file that gives boxes beside its raw predictions.

Shape letters: B images of a batch, P predictions of an image, K classes, M boxes of an image at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekd.engines import detections
from edgekd.engines.onnx_layers import PATH


def attach(model: Any, postprocessing: Mapping[str, Any]) -> None:
    """Add the output ``detections``: what :func:`edgekd.engines.detections.detect` finds in the raw predictions.

    Everything that is added works on float32, and on any batch size. Rows are ordered as there, the best score first; of an
    image without so many boxes the rest have class -1. One difference: all predictions above the confidence take part, where
    ``detect`` looks at the best 3000.

    Args:
        model: The onnx.ModelProto, whose raw predictions are float32 [B, P, 5 + K]; it is changed.
        postprocessing: As io.json holds it (edgekd.engines.postprocess), with ``nms: graph``.
    """
    from onnx import TensorProto, helper

    heads = detections.heads_from(postprocessing)
    classes, most = len(postprocessing["classes"]), int(postprocessing["most"])
    predictions = heads.predictions
    add = _Nodes(model)
    sigmoid = add("Sigmoid", postprocessing["output"])
    centres, sides, objectness, labels = (
        add("Slice", sigmoid, add.integers([first]), add.integers([end]), add.integers([2]))
        for first, end in ((0, 2), (2, 4), (4, 5), (detections.BOX, detections.BOX + classes))
    )
    table = heads.table[None]
    # (2 s - 0.5 + cell) * stride and (2 s)^2 * anchor / 2, with what is constant worked out before
    centres = add(
        "Add", add("Mul", centres, add.floats(2 * table[..., 2:3])), add.floats((table[..., :2] - 0.5) * table[..., 2:3])
    )
    halves = add("Mul", add("Mul", sides, sides), add.floats(2 * table[..., 3:5]))
    boxes = add("Concat", add("Sub", centres, halves), add("Add", centres, halves), axis=2)  # [B, P, 4]
    scores = add("Transpose", add("Mul", objectness, labels) if classes > 1 else objectness, perm=[0, 2, 1])  # [B, K, P]
    limits = add.floats([postprocessing["iou"]]), add.floats([postprocessing["confidence"]])
    kept = add("NonMaxSuppression", boxes, scores, add.integers([most]), *limits)  # [n, 3]: image, class, prediction
    nothing = add("Mul", scores, add.floats(np.float32(0)))
    alone = add("ScatterND", nothing, kept, add("GatherND", scores, kept))
    count = min(most, classes * predictions)
    best, places = add("TopK", add("Reshape", alone, add.integers([0, -1])), add.integers([count]), outputs=2, axis=1)  # [B, M]
    label = add("Div", places, add.integers([predictions]))
    place = add("Sub", places, add("Mul", label, add.integers([predictions])))
    last = add.integers([-1])
    found = add("GatherND", boxes, add("Unsqueeze", place, last), batch_dims=1)  # [B, M, 4]
    empty = add("LessOrEqual", best, add.floats(np.float32(0)))
    names = add("Where", empty, add.floats(np.float32(-1)), add("Cast", label, to=TensorProto.FLOAT))
    add("Concat", found, add("Unsqueeze", best, last), add("Unsqueeze", names, last), axis=2, name=detections.OUTPUT)
    batch = model.graph.output[0].type.tensor_type.shape.dim[0]
    size: Any = batch.dim_param or batch.dim_value
    model.graph.output.append(helper.make_tensor_value_info(detections.OUTPUT, TensorProto.FLOAT, [size, count, 6]))


class _Nodes:
    """Adds nodes and constants to a graph."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.count = 0
        self.constants: dict[bytes, str] = {}

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """One node -> the name of its output, or of all where it has several."""
        from onnx import helper

        names = [name or self._name(kind) for _ in range(outputs)]
        node = helper.make_node(kind, list(inputs), names, name=names[0], **attributes)
        node.metadata_props.add(key=PATH, value="")
        self.graph.node.append(node)
        return names[0] if outputs == 1 else names

    def integers(self, values: list[int]) -> str:
        """An int64 constant."""
        return self._constant(np.array(values, np.int64))

    def floats(self, values: Any) -> str:
        """A float32 constant."""
        return self._constant(np.asarray(values, np.float32))

    def _constant(self, values: np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        key = values.dtype.str.encode() + str(values.shape).encode() + values.tobytes()
        if key not in self.constants:
            self.constants[key] = self._name("constant")
            self.graph.initializer.append(numpy_helper.from_array(values, self.constants[key]))
        return self.constants[key]

    def _name(self, kind: str) -> str:
        self.count += 1
        return f"{detections.ADDED}{kind}_{self.count}"
