"""A quantized model in plain float operations, so that any engine computes what was trained, at any number of bits.

Weights hold the values that their codes stand for; a quantizer is a division, a rounding (ties to even, as ONNX and torch do), a
clip and a multiplication. Nothing runs on integers: it shows what the bits cost in accuracy, not what they save.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from edgekd.errors import ExportError
from edgekd.quantize.fake_quant import (
    QuantConv2d,
    QuantConvTranspose2d,
    Quantizer,
    QuantLayer,
    QuantLinear,
    output_axis,
)


class Grid(nn.Module):
    """Rounds to the grid of a quantizer."""

    step: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.register_buffer("step", quantizer.scale().detach().clone())
        self.low, self.high = float(quantizer.low), float(quantizer.high)

    def forward(self, values: Tensor) -> Tensor:
        """Same shape."""
        return torch.clamp(torch.round(values / self.step), self.low, self.high) * self.step


def simulated(quantized: nn.Module) -> nn.Module:
    """A copy of a quantized model, in eval mode and in float operations alone.

    Raises:
        ExportError: The model is not a quantized one.
    """
    if not isinstance(quantized, fx.GraphModule):
        raise ExportError(f"{type(quantized).__name__} is not quantized", hint="add a quantize stage")
    model = copy.deepcopy(quantized).eval()
    for path, part in list(model.named_modules()):
        if isinstance(part, Quantizer):
            model.set_submodule(path, Grid(part))
        elif isinstance(part, QuantLayer):
            model.set_submodule(path, _float_layer(part))
    return model


def _float_layer(layer: QuantLayer) -> nn.Module:
    """The layer with the values of its codes as weights."""
    plain = {QuantConv2d: nn.Conv2d, QuantConvTranspose2d: nn.ConvTranspose2d, QuantLinear: nn.Linear}[type(layer)]
    twin = copy.copy(layer)  # another class with the same attributes: what it inherits reads no others
    twin._parameters = dict(layer._parameters)
    twin.__class__ = plain
    with torch.no_grad():
        twin.weight = nn.Parameter(layer.scheme.fake(layer.weight, output_axis(layer)).detach())
    return twin
