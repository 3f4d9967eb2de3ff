"""How much a model computes and holds."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of the forward of one image, in evaluation mode.

    Convolutions, linear layers, matrix products and attention count; norms, activations, pooling and biases do not. Nothing is
    computed: a copy runs on torch's meta device, which knows shapes only.

    Args:
        model: Left as it is.
        input_shape: Of one image: (C, H, W).
    """
    shell = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shell(torch.empty((1, *input_shape), device="meta"))
    return counter.get_total_flops() // 2  # torch counts the multiplication and the addition


def parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters; one that two modules share counts once; buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())
