"""How far soft maps are from covering each other: Dice of the maps, and of the boundaries of what they show.

Shape letters: B images, C maps of an image, H rows, W columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.nn.precision import exact

SMOOTHING = 1.0
"""Added above and below, so that two empty maps cover each other."""


def soft_dice_each(ours_BCHW: Tensor, theirs_BCHW: Tensor) -> Tensor:
    """1 - (2 sum P Q + 1) / (sum P + sum Q + 1) of every map, in [0, 1): [B, C].

    No squares in the denominator: of two equal soft maps it is not 0, and its gradient makes P more decided. That is its purpose.

    Args:
        ours_BCHW: P, values in 0..1.
        theirs_BCHW: Q, values in 0..1, as many maps or one for all of them.
    """
    ours, theirs = exact(ours_BCHW), exact(theirs_BCHW)
    both = (ours * theirs).sum((2, 3))
    sizes = ours.sum((2, 3)) + theirs.sum((2, 3))
    return 1 - (2 * both + SMOOTHING) / (sizes + SMOOTHING)


def soft_dice(ours_BCHW: Tensor, theirs_BCHW: Tensor) -> Tensor:
    """The mean of :func:`soft_dice_each` over images and maps: a scalar."""
    return soft_dice_each(ours_BCHW, theirs_BCHW).mean()


def widened(maps_BCHW: Tensor, size_px: int) -> Tensor:
    """The largest value within a square of this odd side about every pixel, of pixels inside the image: the same shape."""
    if size_px == 1:
        return maps_BCHW
    reach = size_px // 2
    # the largest of a square is the largest of its rows' largest: 2 s comparisons a pixel instead of s^2
    rows = F.max_pool2d(maps_BCHW, (1, size_px), 1, (0, reach))
    return F.max_pool2d(rows, (size_px, 1), 1, (reach, 0))


def inner_edge(maps_BCHW: Tensor, counted_BCHW: Tensor | None = None) -> Tensor:
    """The boundary of what a map shows, on its inner side: the 3 x 3 maximum of 1 - M, less 1 - M.

    Args:
        maps_BCHW: M, values in 0..1.
        counted_BCHW: True where a pixel counts; all others are treated like what is outside the image.
    """
    outside = 1 - maps_BCHW
    if counted_BCHW is None:
        return widened(outside, 3) - outside
    outside = outside * counted_BCHW  # 0 is the least there is: it never is a maximum
    return (widened(outside, 3) - outside) * counted_BCHW


def boundary_dice_each(ours_BCHW: Tensor, theirs_BCHW: Tensor, size_px: int, counted_BCHW: Tensor | None = None) -> Tensor:
    """:func:`soft_dice_each` of the inner edges, widened to ``size_px``: [B, C]. Gradients flow through both maxima.

    Args:
        ours_BCHW: Values in 0..1.
        theirs_BCHW: Values in 0..1, as many maps or one for all of them.
        size_px: Odd: how wide a boundary is; 1 takes the edges as they are.
        counted_BCHW: True where a pixel counts.
    """
    ours, theirs = (widened(inner_edge(exact(maps), counted_BCHW), size_px) for maps in (ours_BCHW, theirs_BCHW))
    if counted_BCHW is not None:
        ours, theirs = ours * counted_BCHW, theirs * counted_BCHW
    return soft_dice_each(ours, theirs)
