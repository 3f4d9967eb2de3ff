"""From a fake-quantized model to one that an engine runs on integers: batch norms folded, int8 weights, codes as it likes them.

One trained quantization is written in the encoding that each backend runs as integers:

- ``u8`` (ONNX Runtime and OpenVINO on CPUs): unsigned activations. Where values may be negative, code + 128 with zero point 128:
  the same grid. Where they may not, zero point 0 and half the trained step: 0..255 instead of 0..127 with the same end, a finer
  grid that has every trained value on it. With zero point 0 the ReLU disappears into the quantizer. A three-channel image gets a
  fourth channel of zeros: ONNX Runtime's integer convolution takes longer over three.
- ``s8`` (TensorRT and TensorRT-RTX): int8 with zero point 0, as trained.

Biases stay float in both: ONNX Runtime and OpenVINO quantize them to int32 by themselves, and TensorRT refuses an int32
DequantizeLinear. The graph has QuantizeLinear and DequantizeLinear at activations, and DequantizeLinear behind int8 weights.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekd.errors import ExportError
from edgekd.quantize.fake_quant import (
    SMALLEST_SCALE,
    QuantConv2d,
    QuantConvTranspose2d,
    Quantizer,
    QuantLayer,
    QuantLinear,
    output_axis,
)

ENCODINGS = ("u8", "s8")
RGB = 3


@torch.library.custom_op("edgekd::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``scale * codes`` in float32, one scale per entry of an axis."""
    return codes.float() * scale.view([-1 if index == axis else 1 for index in range(codes.ndim)])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:  # noqa: ARG001  the operator's signature
    return torch.empty_like(codes, dtype=torch.float32)


class EncodedConv2d(nn.Module):
    """A convolution whose weights are int8 codes; a folded batch norm is in its scales and its bias."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantConv2d, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.groups = layer.groups
        self._options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self._padding = None if layer.padding_mode == "zeros" else (layer._reversed_padding_repeated_twice, layer.padding_mode)
        _store(self, codes, scale, bias)

    def forward(self, values: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H', W']."""
        stride, padding, dilation, groups = self._options
        if self._padding is not None:
            values, padding = nn.functional.pad(values, self._padding[0], mode=self._padding[1]), (0, 0)
        return nn.functional.conv2d(values, dequantize(self.codes, self.scale, 0), self.bias, stride, padding, dilation, groups)


class EncodedConvTranspose2d(nn.Module):
    """A transposed convolution whose weights are int8 codes, [Cin, Cout, kH, kW]; a batch norm is in its scales and bias."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantConvTranspose2d, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._options: Any = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        _store(self, codes, scale, bias)

    def forward(self, values: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H', W']."""
        return nn.functional.conv_transpose2d(values, dequantize(self.codes, self.scale, 1), self.bias, *self._options)


class EncodedLinear(nn.Module):
    """A linear layer whose weights are int8 codes, [Cin, Cout].

    A matrix product and an addition: ONNX Runtime runs a Gemm with a float bias in float.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        _store(self, codes.T.contiguous(), scale, bias)

    def forward(self, values: Tensor) -> Tensor:
        """[..., Cin] to [..., Cout]."""
        product = torch.matmul(values, dequantize(self.codes, self.scale, 1))
        return product if self.bias is None else product + self.bias


def _store(module: nn.Module, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    module.register_buffer("codes", codes)
    module.register_buffer("scale", scale)
    module.register_buffer("bias", bias)


def encode(quantized: nn.Module, encoding: str) -> nn.Module:
    """A copy of a quantized model in a backend's encoding, in eval mode. Its values are the trained model's, up to rounding.

    Args:
        quantized: What edgekd.quantize.stage.load gives.
        encoding: ``u8`` or ``s8``.

    Raises:
        ExportError: The model is not a quantized one.
    """
    if not isinstance(quantized, fx.GraphModule):
        raise ExportError(f"{type(quantized).__name__} is not quantized", hint="add a quantize stage")
    model = copy.deepcopy(quantized).eval()
    for node in list(model.graph.nodes):
        if str(node.target).startswith("taps."):  # training is over; a tap would stand between a convolution and its batch norm
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    calls = Counter(node.target for node in model.graph.nodes if node.op == "call_module")
    for node in list(model.graph.nodes):
        layer = quantized.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, QuantLayer):
            norm = None if isinstance(layer, QuantLinear) else _take_norm(model, node)
            if calls[node.target] > 1:  # each call has a batch norm of its own to take
                node.target = f"{node.target}_{node.name}"
            model.set_submodule(str(node.target), _encoded(layer, norm))
    for part in model.modules():
        if isinstance(part, Quantizer):
            _store_scale(part)
            if encoding == "u8":
                _unsigned(part)
    if encoding == "u8":
        _widen(model)
    model.recompile()
    model.delete_all_unused_submodules()
    return model


@torch.no_grad()
def _store_scale(quantizer: Quantizer) -> None:
    """Its limit goes into its scale: the graph has no use for either's arithmetic."""
    quantizer.log_scale.copy_(quantizer.scale().log())
    quantizer.limit = None


@torch.no_grad()
def _unsigned(quantizer: Quantizer) -> None:
    quantizer.unsigned = True
    if quantizer.signed:
        quantizer.zero_point = 128
    elif quantizer.finer:
        quantizer.high = 255
        quantizer.log_scale.sub_(math.log(2))


@torch.no_grad()
def _widen(model: fx.GraphModule) -> None:
    """Give a convolution that alone reads the quantized image of three channels a fourth, of zeros in both."""
    for node in list(model.graph.nodes):
        conv = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(conv, EncodedConv2d) or conv.codes.shape[1] != RGB or conv.groups != 1:
            continue
        quantizer = node.args[0]
        image = quantizer.args[0] if quantizer.args else None
        if image is not None and image.op == "placeholder" and list(quantizer.users) == [node]:
            conv.codes = nn.functional.pad(conv.codes, (0, 0, 0, 0, 0, 1))
            with model.graph.inserting_before(quantizer):
                wide = model.graph.call_function(nn.functional.pad, (image, (0, 0, 0, 0, 0, 1)))
            quantizer.replace_input_with(image, wide)


def _take_norm(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Take the batch norm behind a convolution out of the graph, where nothing else reads what goes into it."""
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    if follower is None or follower.op != "call_module":
        return None
    norm = model.get_submodule(str(follower.target))
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    follower.replace_all_uses_with(node)
    model.graph.erase_node(follower)
    return norm


@torch.no_grad()
def _encoded(layer: QuantLayer, norm: Any) -> nn.Module:
    axis = output_axis(layer)
    codes, scale = layer.scheme.encode(layer.weight, axis)
    column = [-1 if index == axis else 1 for index in range(codes.ndim)]
    bias = None if layer.bias is None else layer.bias.float().clone()
    if norm is not None:
        gain = (norm.running_var.float() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight.float()
        shift = -norm.running_mean.float() * gain + (0 if norm.bias is None else norm.bias.float())
        bias = shift if bias is None else shift + bias * gain
        # a scale is positive: a negative gain turns the codes' signs, and one of zero the codes to zero
        codes = codes * gain.sign().view(column)
        scale = (scale * gain.abs()).clamp_min(SMALLEST_SCALE**2)
    codes = codes.to(torch.int8)
    if isinstance(layer, QuantLinear):
        return EncodedLinear(codes, scale, bias)
    if isinstance(layer, QuantConvTranspose2d):
        return EncodedConvTranspose2d(layer, codes, scale, bias)
    return EncodedConv2d(layer, codes, scale, bias)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes the two operators, for ``torch.onnx.export(custom_translation_table=...)``."""
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset18 as op

    def constant(value: Any) -> Any:
        return op.Constant(value=ir.tensor(value))

    def quantize_dequantize(values: Any, scale: Any, zero_point: int, low: int, high: int, unsigned: bool = False) -> Any:
        dtype = np.uint8 if unsigned else np.int8
        zero = constant(np.array(zero_point, dtype))
        low, high = low + zero_point, high + zero_point
        limits = np.iinfo(dtype)
        narrow = high < limits.max or low > max(limits.min, 0)
        if narrow and unsigned:  # behind QuantizeLinear: ONNX Runtime then still makes one integer kernel of what is before it
            codes = op.Clip(op.QuantizeLinear(values, scale, zero), constant(dtype(low)), constant(dtype(high)))
            return op.DequantizeLinear(codes, scale, zero)
        if narrow:  # TensorRT takes no limits of codes
            values = op.Clip(values, op.Mul(scale, constant(np.float32(low))), op.Mul(scale, constant(np.float32(high))))
        return op.DequantizeLinear(op.QuantizeLinear(values, scale, zero), scale, zero)

    def dequantize_weight(codes: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=axis)

    return {torch.ops.edgekd.fake_quantize.default: quantize_dequantize, torch.ops.edgekd.dequantize.default: dequantize_weight}
