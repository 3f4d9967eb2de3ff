"""Fake quantization: rounding to integer codes and back, in float, with gradients for values and scales.

One operator, ``edgekd::fake_quantize``, serves training and export: the exporter turns it into QuantizeLinear and
DequantizeLinear (edgekd.export.qdq). Its gradients are those of
LSQ (Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153,
equations 2, 3 and 5). Written from the paper.

Differs from the paper: a quantizer stores the logarithm of its step, so that no optimizer step and no average of weights can make
the step zero or negative; weights are not learned but scaled by their largest value per output channel, which loses nothing at 8
bits and follows every average of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

BITS = 8
_WITHIN = 1 - 1e-6
"""Keeps float32's rounding from carrying a step beyond its limit."""
SMALLEST_SCALE = 2.0**-24
"""A channel whose weights are all zero still needs a scale above zero."""


@torch.library.custom_op("edgekd::fake_quantize", mutates_args=())
def fake_quantize(
    values: Tensor,
    scale: Tensor,
    zero_point: int,  # noqa: ARG001  for the export
    low: int,
    high: int,
    unsigned: bool = False,  # noqa: ARG001  for the export
) -> Tensor:
    """``scale * clamp(round(values / scale), low, high)``, ties to even.

    Args:
        values: float32, any shape.
        scale: float32, above zero: [] for the whole tensor, or [C] for one scale per entry of the first axis.
        zero_point: What is added to the codes where they are stored; it changes no value.
        low: Smallest code before the zero point is added.
        high: Largest code.
        unsigned: Whether codes are stored as uint8; it changes no value either.
    """
    if scale.ndim:
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(values, scale, zeros, 0, low, high)
    if values.is_cuda:  # one kernel rather than four
        return torch.fake_quantize_per_tensor_affine(values, scale, scale.new_zeros((), dtype=torch.int32), low, high)
    # the same bits, many times faster on a CPU
    return (values * scale.reciprocal()).round_().clamp_(low, high).mul_(scale)


@fake_quantize.register_fake
def _(values: Tensor, scale: Tensor, zero_point: int, low: int, high: int, unsigned: bool = False) -> Tensor:  # noqa: ARG001
    return torch.empty_like(values)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, int, bool], output: Tensor) -> None:
    values, scale, _, ctx.low, ctx.high, _ = inputs
    ctx.save_for_backward(values, scale, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
    values, scale, output = ctx.saved_tensors
    # half a step beyond the last code still rounds to it; LSQ's clamp is at the code itself
    if scale.ndim or values.is_cuda:
        step = scale.view(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale
        low, high = ctx.low * step, ctx.high * step
        to_values = gradient * ((values >= low) & (values <= high))
    else:  # the same in fewer passes over memory, which count on a CPU; on a GPU float() would wait for the device
        low, high = ctx.low * float(scale), ctx.high * float(scale)
        # its bounds are exclusive
        to_values = torch.ops.aten.hardtanh_backward(gradient, values, _next(low, -math.inf), _next(high, math.inf))
    to_scale = None
    if ctx.needs_input_grad[1]:
        # clamped, because an infinite value outside would give 0 * inf
        share = (gradient * output).addcmul_(to_values, values.clamp(low, high), value=-1)
        to_scale = (share.flatten(1).sum(1) if scale.ndim else share.sum()) / scale
    return to_values, to_scale, None, None, None, None


def _next(value: float, towards: float) -> float:
    """The next float32."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


fake_quantize.register_autograd(_backward, setup_context=_keep)


class Quantizer(nn.Module):
    """Quantizes an activation with one scale; the same module may serve several tensors that must share it.

    With 8 bits, codes are those of a signed symmetric int8, which every engine has: -128..127, or 0..127 where no value is
    negative. An encoding for an engine with unsigned codes may use a finer grid (edgekd.export.qdq), never a coarser one. With k
    < 8 bits they are -2^(k-1)..2^(k-1)-1, or all of 0..2^k-1.

    Args:
        signed: Whether values may be negative.
        learned: Whether training moves the scale.
        limit: Largest value that its tensors can have (6 behind a ReLU6). The codes then end before it, in an unsigned encoding
            too, which halves the step: the quantizer clips what the activation would, and engines leave the activation out.
            ONNX Runtime runs the layer in float where they reach beyond.
        bits: Of the codes, 1 to 8.
        end: The value of the largest code, fixed: neither calibrated nor learned.
        whole: Use all 2^8 codes with 8 bits where nothing is negative, 0..255, as DoReFa does; no int8 holds them.
    """

    def __init__(
        self,
        signed: bool,
        learned: bool,
        limit: float | None = None,
        bits: int = BITS,
        end: float | None = None,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.signed, self.bits, self.end = signed, bits, end
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed or (bits == BITS and not whole) else 2**bits - 1
        self.zero_point, self.unsigned = 0, False
        self.limit = limit if end is None else None
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=learned and end is None)
        if end is not None:
            self.log_scale.data.fill_(end / self.high).log_()
        self.observer: Any = None
        """Told of every tensor while calibrating; the tensor then passes unchanged."""

    @property
    def finer(self) -> bool:
        """Whether an unsigned encoding may halve the step: the codes are half of what 8 bits hold."""
        return not self.signed and self.bits == BITS and self.high == 2 ** (BITS - 1) - 1

    def scale(self) -> Tensor:
        """The step between two codes, float32 []."""
        step = self.log_scale.exp()
        return step if self.limit is None else step.clamp_max(self.limit / (self.high + 0.5) * _WITHIN)

    def forward(self, values: Tensor) -> Tensor:
        """Fake-quantized values, same shape and dtype."""
        if self.observer is not None:
            self.observer(values)
            return values
        scale = self.scale()
        if self.training and self.log_scale.requires_grad:
            # of one image: the gradient then is the same however a batch is shared out
            scale = _scaled_gradient(scale, (values[0].numel() * self.high) ** -0.5)
        return fake_quantize(values.float(), scale, self.zero_point, self.low, self.high, self.unsigned).to(values.dtype)

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return f"codes {self.low}..{self.high}" + (f", up to {self.end:g}" if self.end is not None else "")


def _scaled_gradient(scale: Tensor, factor: float) -> Tensor:
    """The same value with its gradient multiplied (LSQ section 2.2: otherwise a scale moves faster the more values it serves)."""
    return scale * factor + (scale * (1 - factor)).detach()


def weight_scale(weight: Tensor, axis: int = 0) -> Tensor:
    """One scale per output channel, [C], from its largest weight; no gradient. ``axis`` is where output channels are."""
    largest = weight.detach().float().transpose(0, axis).flatten(1).abs().amax(1)
    return (largest / 127).clamp_min(SMALLEST_SCALE)


def quantized_weight(weight: Tensor, axis: int = 0) -> Tensor:
    """The weight rounded to codes -127..127, one scale per output channel; the gradient passes unchanged."""
    turned = weight.float().transpose(0, axis)
    return fake_quantize(turned, weight_scale(turned), 0, -127, 127).transpose(0, axis).to(weight.dtype)


class WeightScheme(Protocol):
    """How a layer's float weights become codes."""

    @property
    def bits(self) -> int:
        """Of a code."""

    def fake(self, weight: Tensor, axis: int) -> Tensor:
        """The values that the codes stand for, same shape, with a gradient; ``axis`` is where output channels are."""

    def encode(self, weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The codes, same shape, within -128..127, and one scale per output channel, [C]; no gradient."""


@dataclass(frozen=True)
class Int8Weights:
    """Codes -127..127, one scale per output channel from its largest weight."""

    bits: int = BITS

    def fake(self, weight: Tensor, axis: int) -> Tensor:
        """The weight, rounded."""
        return quantized_weight(weight, axis)

    def encode(self, weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        scale = weight_scale(weight, axis)
        column = [-1 if index == axis else 1 for index in range(weight.ndim)]
        return (quantized_weight(weight.detach().float(), axis) / scale.view(column)).round(), scale


class QuantConv2d(nn.Conv2d):
    """A convolution with quantized weights; its float weights are what is trained."""

    scheme: WeightScheme

    def forward(self, input: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H', W']."""
        return self._conv_forward(input, self.scheme.fake(self.weight, 0), self.bias)


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with quantized weights; output channels are axis 1 of [Cin, Cout, kH, kW]."""

    scheme: WeightScheme

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # a file has one output size: that of the stride
        """[B, Cin, H, W] to [B, Cout, H', W']."""
        options: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return nn.functional.conv_transpose2d(input, self.scheme.fake(self.weight, 1), self.bias, *options)


class QuantLinear(nn.Linear):
    """A linear layer with quantized weights; its float weights are what is trained."""

    scheme: WeightScheme

    def forward(self, input: Tensor) -> Tensor:
        """[..., Cin] to [..., Cout]."""
        return nn.functional.linear(input, self.scheme.fake(self.weight, 0), self.bias)


QuantLayer = QuantConv2d | QuantConvTranspose2d | QuantLinear


def output_axis(layer: nn.Module) -> int:
    """Where a layer's weight has its output channels."""
    return int(isinstance(layer, nn.ConvTranspose2d))


def quantized_layer(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, scheme: WeightScheme) -> QuantLayer:
    """The quantized twin of a layer; it takes over the layer's own parameters."""
    twin: QuantLayer
    bias = layer.bias is not None
    with torch.device("meta"):  # its first weights are thrown away
        if isinstance(layer, nn.Linear):
            twin = QuantLinear(layer.in_features, layer.out_features, bias=bias)
        else:
            options: dict[str, Any] = {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "groups": layer.groups,
                "bias": bias,
                "padding_mode": layer.padding_mode,
            }
            sizes: Any = (layer.in_channels, layer.out_channels, layer.kernel_size)
            if isinstance(layer, nn.ConvTranspose2d):
                options["output_padding"] = layer.output_padding
                twin = QuantConvTranspose2d(*sizes, **options)
            else:
                twin = QuantConv2d(*sizes, **options)
    twin.weight, twin.bias, twin.scheme = layer.weight, layer.bias, scheme
    return twin.train(layer.training)
