"""From a float32 file to a float16 one that stays within float16's range on real images.

float16 ends at 65504 and loses precision below 6e-5. The conversion is ONNX Runtime's; it cuts weights off at the largest value
without a word, and knows nothing of activations. So the float32 file is run on calibration images with every tensor as an output,
and nodes that make or read a tensor that float16 does not hold stay in float32, each with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.engines import graph
from edgekd.export.bisect import MODULE

LARGEST = 65504.0
SAFE_SHARE = 0.5
"""A tensor may use so much of the range on calibration images: others will reach further."""
MAX_ROUNDING = 0.01
"""Norm of what rounding to float16 changes in a tensor, as a share of its norm: 0.0002 in range, more where values get lost."""
BATCH = 8
"""Images in one run: all activations are in memory at once."""
KEPT_OPS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "Softmax", "ReduceMean", "GlobalAveragePool")
"""Stay in float32 whatever they see: their sums leave float16's range where their inputs and results do not."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Kept:
    """A node that stays in float32 because of a tensor."""

    node: str
    op: str
    path: str
    """The module's whose output it makes, or the node's name."""
    tensor: str
    reason: str


def to_float16(
    model: Any, images: Array | None, run: Callable[[Any, dict[str, Array]], dict[str, Array]]
) -> tuple[Any, list[Kept]]:
    """A copy with float16 weights and arithmetic; inputs and outputs stay float32.

    Args:
        model: An onnx.ModelProto in float32.
        images: Calibration images, normalised, float32 [N, C, H, W]; None: only weights are checked.
        run: Runs a model on named arrays and returns all its outputs.

    Returns:
        The copy, and the nodes that stay in float32 because of their range.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = type(model).FromString(model.SerializeToString())
    _constants_to_weights(copy)
    for index, node in enumerate(copy.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"  # nodes are kept by their names
    kept = _kept(copy, unfit(copy, images, run))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of every tiny weight that becomes the smallest float16
        converted = convert_float_to_float16(
            copy,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_OPS],
            node_block_list=[entry.node for entry in kept],
        )
    _join(converted)
    graph.sort(converted.graph)  # the converter appends its casts at the end
    return converted, kept


def unfit(model: Any, images: Array | None, run: Callable[[Any, dict[str, Array]], dict[str, Array]]) -> dict[str, str]:
    """Tensors and weights that float16 does not hold -> why."""
    import onnx

    found = {}
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and (why := _why(*_facts(onnx.numpy_helper.to_array(weight)))):
            found[weight.name] = why
    if images is None:
        return found
    opened = type(model).FromString(model.SerializeToString())
    outputs = {value.name for value in opened.graph.output}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    floats = [value for value in inferred.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    opened.graph.output.extend(value for value in floats if value.name not in outputs)
    sums: dict[str, Array] = {}
    for start in range(0, len(images), BATCH):
        for name, array in run(opened, {opened.graph.input[0].name: images[start : start + BATCH]}).items():
            facts = np.array(_facts(array))
            before = sums.get(name, np.zeros(3))
            sums[name] = np.array([max(before[0], facts[0]), *(before[1:] + facts[1:])])
    return found | {name: why for name, facts in sums.items() if (why := _why(*facts))}


def _facts(array: Array) -> tuple[float, float, float]:
    """Largest magnitude, sum of squares, and sum of squares of what rounding to float16 changes."""
    values = array.astype(np.float64)
    if not values.size:
        return 0.0, 0.0, 0.0
    with np.errstate(over="ignore", under="ignore"):
        change = values - np.clip(values, -LARGEST, LARGEST).astype(np.float16)
    return float(np.abs(values).max()), float(np.sum(values**2)), float(np.sum(change**2))


def _why(largest: float, squares: float, changed: float) -> str:
    if largest > SAFE_SHARE * LARGEST:
        return f"reaches {largest:.3g}; float16 ends at {LARGEST:.0f}"
    if changed > MAX_ROUNDING**2 * squares:
        return f"at most {largest:.3g}: float16 would change it by {(changed / squares) ** 0.5:.1%} of its norm"
    return ""


def _kept(model: Any, unfit: dict[str, str]) -> list[Kept]:
    """Every node that makes or reads an unfit tensor."""
    kept = []
    for node in model.graph.node:
        tensor = next((name for name in (*node.output, *node.input) if name in unfit), None)
        if tensor is not None and node.op_type not in KEPT_OPS:
            path = next((entry.value for entry in node.metadata_props if entry.key == MODULE), node.name)
            kept.append(Kept(node.name, node.op_type, path, tensor, unfit[tensor]))
    return kept


def _join(model: Any) -> None:
    """Hand float32 values from one float32 node to the next.

    The converter puts a cast to float16 behind every node that stays in float32 and one back before the next: between two of them
    that is the very rounding that they were kept from.
    """
    import onnx

    def target(node: Any) -> int:
        return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")

    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    for node in casts.values():
        source = casts.get(node.input[0])
        if target(node) == onnx.TensorProto.FLOAT and source is not None and target(source) == onnx.TensorProto.FLOAT16:
            node.input[0] = source.input[0]
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for node in casts.values():
        if node.output[0] not in used:
            model.graph.node.remove(node)


def _constants_to_weights(model: Any) -> None:
    """Float constants become weights: the converter gives constants float16 even where only float32 nodes read them."""
    import onnx

    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]:
        if node.attribute[0].t.data_type == onnx.TensorProto.FLOAT:
            model.graph.initializer.append(node.attribute[0].t)
            model.graph.initializer[-1].name = node.output[0]
            model.graph.node.remove(node)
