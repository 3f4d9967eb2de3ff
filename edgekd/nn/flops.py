"""How much a model computes and holds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
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
    for part in shell.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):  # it does not count, and its shapes take a third of the time
            part.forward = _unchanged  # type: ignore[method-assign]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shell(torch.empty((1, *input_shape), device="meta"))
    return counter.get_total_flops() // 2  # torch counts the multiplication and the addition


def _unchanged(input: Tensor) -> Tensor:
    return input


def parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters; one that two modules share counts once; buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-accumulates of one image in each convolution and linear layer, by module path; as :func:`macs`, without the rest.

    Args:
        model: Left as it is.
        input_shape: Of one image: (C, H, W).
    """
    shell = copy.deepcopy(model).to("meta").eval()
    found: dict[str, int] = {}

    def hook_of(path: str, turned: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # a transposed convolution spreads each input value, any other layer gathers each output value
            values = (args[0] if turned else output).numel()
            found[path] = found.get(path, 0) + values * module.get_parameter("weight")[0].numel()

        return hook

    for path, part in shell.named_modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            part.register_forward_hook(hook_of(path, isinstance(part, nn.ConvTranspose2d)))
    with torch.no_grad():
        shell(torch.empty((1, *input_shape), device="meta"))
    return found
