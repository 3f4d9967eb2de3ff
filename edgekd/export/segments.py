"""An int8 file cut at its quantizers, so that every quantized tensor is compared on equal inputs.

Compared from end to end, one value that rounds the other way changes everything behind it, and nobody can tell a rounding from a
mistake. So each quantized tensor becomes an input of the file (its codes, as the trained model has them) and an output (the codes
that are made from the trained codes before it). An engine runs the cut file on integers, as it would the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekd.engines.onnx_layers import paths
from edgekd.errors import ParityError
from edgekd.export.qdq import RGB
from edgekd.quantize.fake_quant import Quantizer

MAX_STEPS = 1.001
"""A value on the edge between two codes may round either way; two codes away is another value."""
WIDER, PADS = ((0, 0), (0, 1), (0, 0), (0, 0)), [0, 0, 0, 0, 0, 1, 0, 0]
"""What the encoding adds to an image, as NumPy says it and as ONNX does."""
_SAME_GRID, _OFF_GRID = 1e-4, 1e-2
"""Relative distance of two scales, and distance from a code in steps, that float32 explains."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Trained:
    """One quantized tensor of the trained model on given inputs."""

    values: Array
    scale: float


@dataclass(frozen=True)
class Cut:
    """A file in pieces."""

    model: Any
    """The onnx.ModelProto: ``in<n>`` and ``out<n>`` for the n-th quantized tensor, besides its own inputs."""
    feeds: dict[str, Array]
    """The trained codes."""
    grids: list[tuple[float, int]]
    """Scale and zero point of each, as the file has them."""
    modules: list[str]
    """Whose output each is."""
    tensors: list[Trained]
    """The trained ones, with the channels of zeros that the encoding adds to an image."""


def trained_tensors(quantized: nn.Module, inputs: Sequence[Tensor]) -> list[Trained]:
    """What every quantizer of a trained model gives, in the order of execution."""
    found: list[Trained] = []

    def note(part: Any, _: Any, output: Tensor) -> None:
        found.append(Trained(output.numpy(), float(part.scale())))

    handles = [part.register_forward_hook(note) for part in quantized.modules() if isinstance(part, Quantizer)]
    try:
        with torch.no_grad():
            quantized(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def cut(model: Any, tensors: Sequence[Trained]) -> Cut:
    """Cut a copy of an int8 file at its quantizers.

    Args:
        model: The onnx.ModelProto.
        tensors: Of the model that it was exported from.

    Raises:
        ParityError: The file's quantizers are not the trained model's.
    """
    import onnx

    modules = paths(model)
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = _in_order(graph)
    if len(quantizers) != len(tensors):
        raise ParityError(f"the file has {len(quantizers)} quantizers and the trained model {len(tensors)}")
    feeds: dict[str, Array] = {}
    grids, where, wide = [], [], []
    makers = {name: node for node in graph.node for name in node.output}
    del graph.output[:]
    for index, ((node, last), trained) in enumerate(zip(quantizers, tensors, strict=True)):
        scale, zero = float(constants[node.input[1]]), constants[node.input[2]]
        maker = makers.get(node.input[0])
        pads = constants.get(maker.input[1]) if maker is not None and maker.op_type == "Pad" else None
        widened = pads is not None and pads.tolist() == PADS and trained.values.shape[1] == RGB
        tensor = Trained(np.pad(trained.values, WIDER), trained.scale) if widened else trained
        path, steps = modules[node.name], tensor.scale / scale
        codes = np.rint(tensor.values / scale)
        if abs(steps - round(steps)) > _SAME_GRID or np.abs(codes - tensor.values / scale).max(initial=0) > _OFF_GRID:
            raise ParityError(
                f"what {path} makes is on another grid: a step of {scale:.6g} in the file, {tensor.scale:.6g} trained"
            )
        codes = (codes + int(zero)).astype(zero.dtype)
        made, given, kind = last.output[0], f"in{index}", onnx.helper.np_dtype_to_tensor_dtype(codes.dtype)
        for user in graph.node:
            user.input[:] = [given if name == made else name for name in user.input]
        last.output[0] = f"out{index}"
        graph.input.append(onnx.helper.make_tensor_value_info(given, kind, codes.shape))
        graph.output.append(onnx.helper.make_tensor_value_info(f"out{index}", kind, codes.shape))
        feeds[given] = codes
        grids.append((scale, int(zero)))
        where.append(path)
        wide.append(tensor)
    del graph.value_info[:]
    return Cut(model, feeds, grids, where, wide)


def _in_order(graph: Any) -> list[tuple[Any, Any]]:
    """The QuantizeLinear nodes as torch executes them, each with the node that makes its final codes: itself, or a Clip of codes.

    The exporter numbers what it makes of each quantizer, and onnxslim moves nodes.
    """
    numbers, clips = {}, {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0].startswith("fake_quantize"):
            numbers[node.input[0]] = int(node.output[0].removeprefix("fake_quantize").removeprefix("_") or 0)
        elif node.op_type == "Clip":
            clips[node.input[0]] = node
    found = [(node, clips.get(node.output[0], node)) for node in graph.node if node.op_type == "QuantizeLinear"]
    return sorted(found, key=lambda pair: numbers[pair[1].output[0]])


def differences(parts: Cut, outputs: Mapping[str, Array]) -> list[Array]:
    """Per tensor: distances from the trained values in trained steps; half a step is a finer value where an encoding has them."""
    return [
        np.abs((outputs[f"out{index}"].astype(np.float64) - zero) * scale - tensor.values) / tensor.scale
        for index, (tensor, (scale, zero)) in enumerate(zip(parts.tensors, parts.grids, strict=True))
    ]


def summary(steps: Sequence[Array], modules: Sequence[str]) -> dict[str, Any]:
    """For parity.json: how many tensors and values, the largest distance in steps and whose, the share off by a step.

    Raises:
        ParityError: A value is more than one step away.
    """
    largest = [float(step.max(initial=0)) for step in steps]
    worst = int(np.argmax(largest))
    everything = np.concatenate([step.ravel() for step in steps])
    found = {
        "count": len(steps),
        "values": len(everything),
        "max_steps": round(largest[worst], 3),
        "module": modules[worst],
        "differing": float(np.mean(everything > 0.51)),
    }
    if not largest[worst] <= MAX_STEPS:
        raise ParityError(
            f"what {modules[worst]} makes is {largest[worst]:.1f} steps away from the trained values, on equal inputs",
            hint="report this with the model: the encoding of this layer is wrong",
        )
    return found
