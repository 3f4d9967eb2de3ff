"""From a fake-quantized model to one that an engine runs on integers: batch norms folded, int8 weights, codes as it likes them.

One trained quantization is written in the encoding that each backend runs as integers:

- ``u8`` (ONNX Runtime and OpenVINO on CPUs): unsigned activations. Where values may be negative, code + 128 with zero point 128:
  the same grid. Where they may not, zero point 0 and half the trained step: 0..255 instead of 0..127 with the same end, a finer
  grid that has every trained value on it. With zero point 0 the ReLU disappears into the quantizer. A three-channel image gets a
  fourth channel of zeros: ONNX Runtime's integer convolution takes longer over three.
- ``u7`` (the same two on x86 CPUs without VNNI): codes 0..127, clipped behind QuantizeLinear, because such a CPU adds pairs of
  products in 16 bits that saturate: 2 * 127 * 127 fits, 2 * 255 * 127 does not. Where values may not be negative these are the
  trained codes. Where they may, twice the trained step, code + 64: at most one trained step from the trained value. What is only
  added to something has the codes of ``u8``.
- ``s8`` (TensorRT and TensorRT-RTX): int8 with zero point 0, as trained.

Biases stay float in all: ONNX Runtime and OpenVINO quantize them to int32 by themselves, and TensorRT refuses an int32
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
    fake_quantize,
    output_axis,
)
from edgekd.quantize.placement import ADDITIONS, Placement

ENCODINGS = ("u8", "u7", "s8")
RGB = 3
SEVEN = 127
"""The largest code of the encoding u7."""


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


class Requantizer(nn.Module):
    """Quantizes what is on its grid already, so it needs no limits: every code of its type."""

    log_scale: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.register_buffer("log_scale", quantizer.log_scale.detach().clone())
        self.zero_point, self.unsigned = quantizer.zero_point, quantizer.unsigned

    def forward(self, values: Tensor) -> Tensor:
        """The same values."""
        low, high = (0, 255) if self.unsigned else (-128, 127)
        zero = self.zero_point
        return fake_quantize(values, self.log_scale.exp(), zero, low - zero, high - zero, self.unsigned)


def _store(module: nn.Module, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    module.register_buffer("codes", codes)
    module.register_buffer("scale", scale)
    module.register_buffer("bias", bias)


def encode(quantized: nn.Module, encoding: str) -> nn.Module:
    """A copy of a quantized model in a backend's encoding, in eval mode. Its values are the trained model's, up to rounding.

    Args:
        quantized: What edgekd.quantize.stage.load gives.
        encoding: ``u8``, ``u7`` or ``s8``.

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
    _encode_activations(model, encoding)
    if encoding != "s8":
        _widen(model)
    model.recompile()
    model.delete_all_unused_submodules()
    return model


@torch.no_grad()
def coarsened(quantized: nn.Module, encoding: str) -> nn.Module:
    """The trained model on the grids of an encoding, where one is coarser than the trained: what its file is compared with.

    Args:
        quantized: What edgekd.quantize.stage.load gives.
        encoding: One of ``ENCODINGS``; with ``u8`` and ``s8`` no grid is coarser, and the model itself is returned.
    """
    if encoding != "u7" or not isinstance(quantized, fx.GraphModule):
        return quantized
    model = copy.deepcopy(quantized)
    for part in _multiplied(model):
        _store_scale(part)
        _coarsen(part)
    return model


def _multiplied(model: fx.GraphModule) -> set[Quantizer]:
    """The quantizers of what anything but an addition reads: layers, or what moves values to layers."""
    found = set()
    for node in model.graph.nodes:
        part = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, Quantizer) and not all(user.op == "output" or user.target in ADDITIONS for user in node.users):
            found.add(part)
    return found


def _encode_activations(model: fx.GraphModule, encoding: str) -> None:
    multiplied, again = _multiplied(model), _quantized_again(model)
    if encoding == "u7":
        _drop_limits(model)
    for part in model.modules():
        if isinstance(part, Quantizer):
            _store_scale(part)
            if encoding == "u7" and part in multiplied:
                _coarsen(part)
                part.unsigned, part.zero_point = True, -part.low
            elif encoding != "s8":
                _unsigned(part)
    for node in again:
        _unclip(model, node)


def _quantized_again(model: fx.GraphModule) -> list[fx.Node]:
    """The calls of a quantizer on what it has made itself, moved or concatenated: they change nothing."""
    look = Placement(model, lambda path: True)  # noqa: ARG005  the rules alone
    made: dict[fx.Node, Quantizer | None] = {}
    found = []
    for node in model.graph.nodes:
        sources = {made[part] for part in node.all_input_nodes}
        source = sources.pop() if len(sources) == 1 else None
        part = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, Quantizer):
            if part is source:
                found.append(node)
            made[node] = part
        else:
            made[node] = source if look.moves(node) or look.concatenates(node) else None
    return found


def _unclip(model: fx.GraphModule, node: fx.Node) -> None:
    """Replace such a call of a quantizer of few codes by one of all codes, for which no Clip is written."""
    part: Any = model.get_submodule(str(node.target))
    if part.high + part.zero_point < (255 if part.unsigned else 127):
        node.target = f"{node.target}_again"
        model.add_submodule(str(node.target), Requantizer(part))


def _drop_limits(model: fx.GraphModule) -> None:
    """Leave out a ReLU6 that a quantizer alone reads whose codes end before 6: the Clip of codes does its work.

    QuantizeLinear alone reaches beyond 6 there, so ONNX Runtime would run the layer before it in float.
    """
    for node in list(model.graph.nodes):
        part = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(part, Quantizer) or part.limit is None or part.signed:
            continue
        relu = node.all_input_nodes[0]
        ends = relu.target is nn.functional.relu6 or (
            relu.op == "call_module" and isinstance(model.get_submodule(str(relu.target)), nn.ReLU6)
        )
        if ends and list(relu.users) == [node]:
            relu.replace_all_uses_with(relu.all_input_nodes[0])
            model.graph.erase_node(relu)


@torch.no_grad()
def _coarsen(quantizer: Quantizer) -> None:
    """At most 128 codes: with more, every second one."""
    if quantizer.high - quantizer.low > SEVEN:
        quantizer.low, quantizer.high = -(-quantizer.low // 2), quantizer.high // 2
        quantizer.log_scale.add_(math.log(2))


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
