"""How well the outlines of classes are met, which the overlap of large areas hardly shows.

Csurka, Larlus, Perronnin: What is a good evaluation measure for semantic segmentation? BMVC 2013: per image and class, the F1 of
the outlines' pixels that have a counterpart within a tolerance, 0.75 % of the diagonal. DAVIS (Perazzi et al., CVPR 2016) matches
outlines in the same way.

Shape letters: B images, K classes, H rows, W columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.data.base import IGNORE

TOLERANCE = 0.0075
"""Of the image's diagonal."""


def tolerance_px(height: int, width: int) -> int:
    """The tolerance for images of a size: 0.75 % of their diagonal, at least a pixel."""
    return max(1, round(TOLERANCE * math.hypot(height, width)))


def outlines(classes_BHW: Tensor, count: int) -> Tensor:
    """The pixels of each class beside (above, below, left, right) a pixel of another one that counts: bool [B, K, H, W].

    Args:
        classes_BHW: [B, H, W]; 255 does not count.
        count: K.
    """
    differs = torch.zeros_like(classes_BHW, dtype=torch.bool)
    for axis in (1, 2):
        length = classes_BHW.shape[axis] - 1
        one, other = classes_BHW.narrow(axis, 0, length), classes_BHW.narrow(axis, 1, length)
        apart = (one != other) & (one != IGNORE) & (other != IGNORE)
        differs.narrow(axis, 0, length).logical_or_(apart)
        differs.narrow(axis, 1, length).logical_or_(apart)
    return torch.stack([differs & (classes_BHW == index) for index in range(count)], 1)


def widened(edges_BKHW: Tensor, radius_px: int) -> Tensor:
    """All pixels whose centre is within ``radius_px`` of a marked pixel's: bool [B, K, H, W]."""
    height, width = edges_BKHW.shape[2:]
    sums = F.pad(edges_BKHW.int().cumsum(3), (1, 0))  # how many are marked left of a column
    columns = torch.arange(width, device=sums.device)
    found = torch.zeros_like(edges_BKHW)
    for down in range(-min(radius_px, height - 1), min(radius_px, height - 1) + 1):
        half = math.isqrt(radius_px**2 - down**2)
        near = sums[..., (columns + half + 1).clamp(max=width)] > sums[..., (columns - half).clamp(min=0)]
        length = height - abs(down)
        found.narrow(2, max(0, down), length).logical_or_(near.narrow(2, max(0, -down), length))
    return found


def boundary_scores(given: Tensor, labels: Tensor, count: int, radius_px: int) -> Tensor:
    """F1 of the outlines of every image and class, 0..1: float64 [B, K], not a number where neither has one.

    Precision is the share of the model's outline within ``radius_px`` of the true one, recall the reverse.

    Args:
        given: int64 [B, H, W], the model's classes.
        labels: [B, H, W]; 255 does not count.
        count: K.
        radius_px: The tolerance, a distance between pixels' centres.
    """
    labels = labels.long()
    ours, true = outlines(given.where(labels != IGNORE, IGNORE), count), outlines(labels, count)
    met = (ours & widened(true, radius_px)).sum((2, 3)).double()
    found = (true & widened(ours, radius_px)).sum((2, 3)).double()
    sizes, true_sizes = ours.sum((2, 3)).double(), true.sum((2, 3)).double()
    precision, recall = met / sizes.clamp_min(1), found / true_sizes.clamp_min(1)
    scores = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return scores.masked_fill(sizes + true_sizes == 0, math.nan)


def boundary_f(scores_NK: Tensor) -> float:
    """The mean over classes of the means over the images where the class has an outline; 0 where none has."""
    means = scores_NK.nanmean(0)
    return float(means.nanmean().nan_to_num(0.0))
