"""How maps are compared: by where they are strong, by which of their places are alike, at several sizes.

Shape letters: B images, C channels, H rows, W columns, P = H * W places, N nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.nn.precision import exact

EPSILON = 1e-12
GRIDS = (4, 2, 1)
"""Sides of the grids, in cells; only those smaller than the map count."""


def attention_map(maps_BCHW: Tensor) -> Tensor:
    """The mean over channels of the squares, in float32 at least: [B, 1, H, W]."""
    return exact(maps_BCHW).square().mean(1, keepdim=True)


def unit_vectors(maps_B1HW: Tensor) -> Tensor:
    """Each image's map as a vector of length 1 (its norm at least 1e-12): [B, P]."""
    flat = maps_B1HW.flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(EPSILON)


def cosine_similarities(nodes_BCN: Tensor, *, detach_norm: bool = False, epsilon: float = 1e-8) -> Tensor:
    """The cosine of the angle between every two nodes of an image, in float32 at least: [B, N, N], within -1 and 1.

    Args:
        nodes_BCN: [B, C, N], a vector for each node.
        detach_norm: Take the vectors' lengths for constants: a gradient then can change the lengths too.
        epsilon: Is added to each length.
    """
    nodes = exact(nodes_BCN)
    lengths = nodes.norm(dim=1, keepdim=True)
    units = nodes / ((lengths.detach() if detach_norm else lengths) + epsilon)
    return units.transpose(1, 2) @ units


def hierarchical_context(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """[MSE + sum over grids of 2^-j MSE of the averages in the grid] / the sum of these weights, a scalar.

    Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review. CVPR 2021, arXiv 2104.09044, section 3.4.

    j = 1, 2, .. counts the grids that are smaller than the map: a map of 2 rows keeps only the grid of 1 cell, with weight 1/2.

    Args:
        student_BCHW: [B, C, H, W].
        teacher_BCHW: The same shape; no gradient flows into it.
    """
    theirs = teacher_BCHW.detach()
    total, weights = F.mse_loss(student_BCHW, theirs), 1.0
    for number, side in enumerate([side for side in GRIDS if side < student_BCHW.shape[2]], start=1):
        far = F.mse_loss(F.adaptive_avg_pool2d(student_BCHW, side), F.adaptive_avg_pool2d(theirs, side))
        total = total + 2.0**-number * far
        weights += 2.0**-number
    return total / weights


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W] of one size: the larger is averaged down to the smaller, rows and columns each for themselves."""
    size = [min(a, b) for a, b in zip(one.shape[2:], other.shape[2:], strict=True)]
    return resized(one, size), resized(other, size)


def resized(maps: Tensor, size: list[int]) -> Tensor:
    """Average pooling to a size; maps of that size stay as they are."""
    return maps if list(maps.shape[2:]) == list(size) else F.adaptive_avg_pool2d(maps, (size[0], size[1]))


def stretched(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, to a size; maps of that size stay as they are."""
    return maps if maps.shape[2:] == size else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class Embedding(nn.Module):
    """A linear layer and a batch norm, which makes a bias idle, optionally a ReLU: [B, Cin] to [B, Cout], in float32.

    Args:
        inputs: Cin.
        outputs: Cout.
        relu: End with a ReLU.
    """

    def __init__(self, inputs: int, outputs: int, *, relu: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.relu = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), relu

    def forward(self, values: Tensor) -> Tensor:
        """[B, Cin] to [B, Cout]."""
        with torch.autocast(values.device.type, enabled=False):
            out: Tensor = self.norm(self.linear(values.float()))
        return F.relu(out) if self.relu else out
