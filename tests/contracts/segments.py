"""An int8 file cut at its quantizers, so that every tensor can be compared on equal inputs.

Compared from end to end, one value that rounds the other way changes everything behind it, and nobody can tell a rounding from a
mistake. So each quantized tensor becomes an input of the file (its codes, as the trained model has them) and an output (the codes
that the engine makes from the trained codes before it). An engine runs the cut file on integers, as it would the whole.
"""

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from edgekd.quantize.fake_quant import Quantizer


@dataclass(frozen=True)
class Tensor:
    """One quantized tensor of the trained model on given inputs."""

    values: np.ndarray
    scale: float
    signed: bool


def trained_tensors(quantized, inputs):
    """What every quantizer of a trained model gives, in the order of execution."""
    found, handles = [], []
    for part in quantized.modules():
        if isinstance(part, Quantizer):

            def note(part, _, output):
                found.append(Tensor(output.numpy(), float(part.scale()), part.signed))

            handles.append(part.register_forward_hook(note))
    try:
        with torch.no_grad():
            quantized(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def quantizers_in_order(graph):
    """The QuantizeLinear nodes as torch executes them: the exporter numbers what it makes of each, and onnxslim moves nodes."""
    numbers = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0].startswith("fake_quantize"):
            numbers[node.input[0]] = int(node.output[0].removeprefix("fake_quantize").removeprefix("_") or 0)
    found = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return sorted(found, key=lambda node: numbers[node.output[0]])


def cut(model, tensors):
    """The file with each quantized tensor as an input, ``in<n>``, and an output, ``out<n>``; and the codes to feed.

    Returns:
        The model, feeds, and per tensor (scale, zero point) of the file's own grid.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = quantizers_in_order(graph)
    assert len(quantizers) == len(tensors), "the file has other quantizers than the trained model"
    feeds, grids = {}, []
    del graph.output[:]
    for index, (node, tensor) in enumerate(zip(quantizers, tensors, strict=True)):
        scale, zero = float(constants[node.input[1]]), constants[node.input[2]]
        np.testing.assert_allclose(scale * round(tensor.scale / scale), tensor.scale, rtol=1e-5)
        codes = (np.rint(tensor.values / scale) + int(zero)).astype(zero.dtype)
        np.testing.assert_allclose((codes.astype(np.float32) - zero) * scale, tensor.values, rtol=1e-4, atol=scale * 1e-3)
        made, given, kind = node.output[0], f"in{index}", helper.np_dtype_to_tensor_dtype(codes.dtype)
        for user in graph.node:
            user.input[:] = [given if name == made else name for name in user.input]
        node.output[0] = f"out{index}"
        graph.input.append(helper.make_tensor_value_info(given, kind, codes.shape))
        graph.output.append(helper.make_tensor_value_info(f"out{index}", kind, codes.shape))
        feeds[given] = codes
        grids.append((scale, int(zero)))
    del graph.value_info[:]
    onnx.checker.check_model(model)
    return model, feeds, grids


def differences(tensors, grids, outputs):
    """Per tensor: distances from the trained values in steps of the trained grid."""
    return [
        np.abs((outputs[f"out{index}"].astype(np.float64) - zero) * scale - tensor.values) / tensor.scale
        for index, (tensor, (scale, zero)) in enumerate(zip(tensors, grids, strict=True))
    ]
