"""Anchors: the widths and heights that a detector's predictions start from, fitted to the boxes of the training split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError

ITERATIONS = 100

Sizes = npt.NDArray[np.float64]


def fit_anchors(labels: npt.NDArray[Any], heads: int, each: int) -> tuple[tuple[tuple[float, float], ...], ...]:
    """k-means of the logarithms of widths and heights: anchors count by ratio, as the loss assigns them.

    Deterministic: it begins with the quantiles of the boxes' areas. Fewer different boxes than anchors give anchors that differ
    by a factor.

    Args:
        labels: Of the training split, [N, M, 6] as in edgekd.data.boxes.
        heads: How many heads.
        each: Anchors of a head.

    Returns:
        Per head, the smallest anchors for the first, widths and heights in pixels, rounded to a tenth.

    Raises:
        DataError: There is no box to fit them to.
    """
    rows = labels.reshape(-1, labels.shape[-1])
    rows = rows[(rows[:, 0] >= 0) & (rows[:, 5] == 0)]
    sizes = (rows[:, 3:5] - rows[:, 1:3]).astype(np.float64)
    if not len(sizes):
        raise DataError("the training split has no box, so no anchors can be fitted", hint="give task.anchors")
    points, count = np.log(np.maximum(sizes, 1.0)), heads * each
    by_area = points[np.argsort(points.sum(1), kind="stable")]
    places = ((np.arange(count) + 0.5) / count * len(by_area)).astype(int)
    # equal sizes would make equal centres, which never part
    centres = by_area[places] + 1e-3 * (np.arange(count) - (count - 1) / 2)[:, None]
    for _ in range(ITERATIONS):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        moved = np.array([points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(count)])
        if np.allclose(moved, centres):
            break
        centres = moved
    ordered = np.round(np.exp(centres[np.argsort(centres.sum(1), kind="stable")]), 1)
    groups: Sequence[Sizes] = np.split(ordered, heads)
    return tuple(tuple((float(width), float(height)) for width, height in group) for group in groups)
