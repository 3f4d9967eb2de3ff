"""DoReFa's quantizers of weights and activations, as GHOST uses them.

Zhou et al.: DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients. arXiv 1606.06160. Zhang
et al.: Guided Hybrid Quantization for Object Detection in Remote Sensing Imagery via One-to-One Self-Teaching. IEEE TGRS 2023,
arXiv 2301.00131; official code: icey-zhang/GHOST, whose numbers these functions give. Written from the equations.

With k bits, N = 2^k - 1 and R rounding to the nearest integer, ties to even:

    weights      u = tanh(W) / (2 max|tanh(W)|) + 1/2,  W_q = 2 R(N u) / N - 1     k = 1: mean|W| sign(W)     k = 32: W
    activations  A_q = R(N clamp(x, 0, 1)) / N                                     k = 1: 0 or 1              k = 32: x

Gradients go straight through the rounding; the largest magnitude and the mean are constants. The range of the weights is -1..1
whatever W was, because GHOST leaves out a factor: a batch norm behind takes up the gain. ``restore_scale`` puts max|W| back.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT = 32
INT8_LEVELS = 2 * 127
"""N of the symmetric grid -127..127 of int8."""


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """``value``, exactly, with the gradient of ``gradient_of``."""
    return _StraightThrough.apply(value, gradient_of)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor, gradient_of: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: object, *gradient: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, gradient[0]


def uniform(values: Tensor, bits: int) -> Tensor:
    """R(N u) / N; the sign at 1 bit, the values themselves at 32. The gradient passes unchanged.

    Args:
        values: Any shape; between 0 and 1, except at 1 and 32 bits.
        bits: 1 to 8, or 32.
    """
    if bits == FLOAT:
        return values
    if bits == 1:
        return straight_through(torch.sign(values.detach()), values)
    levels = 2**bits - 1
    return straight_through(torch.round(values.detach() * levels) / levels, values)


def weights(weight: Tensor, bits: int, *, restore_scale: bool = False, levels: int | None = None) -> Tensor:
    """W_q. Its gradient towards W is (1 - tanh(W)^2) / max|tanh(W)|; 1 at 1 and 32 bits.

    Args:
        weight: Any shape.
        bits: 1 to 8, or 32.
        restore_scale: Multiply by max|W|, a constant.
        levels: N, where it is not 2^bits - 1.

    Returns:
        Values in -1..1 (times max|W|); zeros where all weights are zero.
    """
    if bits == FLOAT:
        return weight
    if bits == 1:
        mean = weight.detach().abs().mean()
        return straight_through(mean * torch.sign(weight.detach()), weight)
    bent = torch.tanh(weight)
    largest = bent.detach().abs().amax()
    count = 2**bits - 1 if levels is None else levels
    unit = bent / (2 * largest.clamp_min(torch.finfo(bent.dtype).tiny)) + 0.5
    values = 2 * straight_through(torch.round(unit.detach() * count) / count, unit) - 1
    values = values * (largest > 0)  # no branch: the value may be unknown, on the meta device
    return values * weight.detach().abs().amax() if restore_scale else values


def activations(values: Tensor, bits: int) -> Tensor:
    """A_q. Its gradient is 1 where 0 <= x <= 1 and 0 elsewhere; 1 everywhere at 32 bits.

    Args:
        values: Any shape, what comes out of a ReLU.
        bits: 1 to 8, or 32.
    """
    return values if bits == FLOAT else uniform(values.clamp(0, 1), bits)


def weight_codes(weight: Tensor, bits: int, *, restore_scale: bool = False, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Integers and their step: W_q = codes * step, up to float32.

    With N odd (the usual 2^k - 1) the codes are the odd integers 2q - N in -N..N: up to 7 bits they fit int8. 8 bits with 256
    levels do not, and are rounded to the nearest of -127..127, at most half a step of those away.

    Args:
        weight: Any shape.
        bits: 2 to 8.
        restore_scale: As for :func:`weights`.
        levels: As for :func:`weights`.

    Returns:
        int8, the shape of ``weight``, and the step, [].
    """
    count = 2**bits - 1 if levels is None else levels
    values = weights(weight.detach(), bits, levels=count)
    # an even N has 0 on its grid, and every second integer would be left out
    size = count // 2 if count % 2 == 0 else count
    size = min(size, INT8_LEVELS // 2)
    step = values.new_tensor(1 / size)
    codes = torch.round(values * size).to(torch.int8)
    return codes, step * weight.detach().abs().amax() if restore_scale else step


def int8_error(weight: Tensor, bits: int) -> float:
    """What the codes of :func:`weight_codes` lose of W_q: the norm of the difference as a share of W_q's; 0 up to 7 bits."""
    exact = weights(weight.detach().double(), bits)
    codes, step = weight_codes(weight.detach().double(), bits)
    size = exact.norm()
    return float((codes * step - exact).norm() / size) if size > 0 else 0.0
