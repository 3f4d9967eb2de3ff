"""How many bits each layer needs, from its float weights alone: GHOST's hybrid quantization.

Zhang et al.: Guided Hybrid Quantization for Object Detection in Remote Sensing Imagery via One-to-One Self-Teaching. IEEE TGRS
2023, arXiv 2301.00131. For k = 2, 3, ... 8 a k-means with 2^k centres of a layer's weights gives the distortion

    D_k = 1e6 * mean squared distance of the weights from their centres,

and the layer gets the smallest k with D_k below the threshold tau, kept between k_min and k_max.

Differs from the official code: its k-means starts at random without a seed; ours is deterministic, a Lloyd iteration on sorted
weights from segments that were split where they cost most. For n weights with standard deviation s, D_k is about 2.7e6 s^2 4^-k:
twice as large weights get one bit more. ``normalised`` divides them by their largest magnitude first (our option).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgekd.errors import TrainingError

WIDTHS = range(2, 9)
"""The bits that are tried."""
SCALE = 1e6
ITERATIONS = 300

Space = Literal["raw", "normalised"]
Values = npt.NDArray[np.float64]


def distortion(weights: npt.NDArray[np.floating], centres: int) -> float:
    """The mean squared distance of values from the nearest of so many centres, as a deterministic 1-D k-means places them.

    Args:
        weights: Any shape.
        centres: How many, at least 1.
    """
    values, counts = np.unique(np.asarray(weights, dtype=np.float64), return_counts=True)
    return _Sums(values, counts).distortion(centres)


class _Sums:
    """Prefix sums over sorted distinct values, so that a segment's mean and error take no loop.

    The values are moved to mean 0 first: squares of large values would swallow their differences.
    """

    def __init__(self, values: Values, counts: npt.NDArray[np.int64]) -> None:
        total = counts.sum()
        self.values = values - (values * counts).sum() / total
        self.total = int(total)
        self.count = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
        self.sum = np.concatenate([[0.0], np.cumsum(self.values * counts)])
        self.square = np.concatenate([[0.0], np.cumsum(self.values**2 * counts)])

    def errors(self, edges: npt.NDArray[np.int64]) -> Values:
        """The squared error of every segment between two edges about its mean."""
        count, total = np.diff(self.count[edges]), np.diff(self.sum[edges])
        found = np.diff(self.square[edges]) - total**2 / np.maximum(count, 1)
        found[np.diff(edges) <= 1] = 0.0
        return np.maximum(found, 0.0)

    def distortion(self, centres: int) -> float:
        if centres >= len(self.values):
            return 0.0
        edges = self._lloyd(self._split(centres))
        return float(self.errors(edges).sum() / self.total)

    def _split(self, centres: int) -> npt.NDArray[np.int64]:
        """Segments to begin with: the one with the largest error is split at its mean until there are enough."""
        heap = [(-float(self.errors(np.array([0, len(self.values)])).sum()), 0, len(self.values))]
        while len(heap) < centres and heap[0][0] < 0:
            _, start, stop = heapq.heappop(heap)
            mean = (self.sum[stop] - self.sum[start]) / (self.count[stop] - self.count[start])
            middle = int(np.searchsorted(self.values[start:stop], mean, side="right")) + start
            middle = min(max(middle, start + 1), stop - 1)  # rounding may put the mean beyond the last value
            for low, high in ((start, middle), (middle, stop)):
                heapq.heappush(heap, (-float(self.errors(np.array([low, high])).sum()), low, high))
        return np.array(sorted({start for _, start, _ in heap} | {len(self.values)}), dtype=np.int64)

    def _lloyd(self, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Move edges to the midpoints of neighbouring means until they stay."""
        for _ in range(ITERATIONS):
            means = np.diff(self.sum[edges]) / np.diff(self.count[edges])
            inner = np.searchsorted(self.values, (means[1:] + means[:-1]) / 2, side="right")
            moved = np.concatenate([[0], inner, [len(self.values)]])
            moved = np.unique(moved)  # a segment becomes empty only by rounding, where neighbouring values hardly differ
            if np.array_equal(moved, edges):
                break
            edges = moved
        return edges


class Distortions:
    """D_k of every layer for k = 2..8, computed once: a search for a threshold then costs nothing.

    Args:
        weights: Module path -> values, any shape.
        space: The weights as they are, or divided by their largest magnitude.
    """

    def __init__(self, weights: Mapping[str, npt.NDArray[np.floating]], *, space: Space = "raw") -> None:
        self.table: dict[str, tuple[float, ...]] = {}
        """Module path -> D_2 .. D_8."""
        self.sizes = {path: int(np.size(values)) for path, values in weights.items()}
        for path, given in weights.items():
            values, counts = np.unique(np.asarray(given, dtype=np.float64), return_counts=True)
            largest = float(np.abs(values).max(initial=0.0))
            if not np.isfinite(largest):
                raise TrainingError(f"the weights of {path!r} are not finite", hint="check the float model's weights")
            if space == "normalised" and largest > 0:
                values = values / largest
            sums = _Sums(values, counts)
            self.table[path] = tuple(SCALE * sums.distortion(2**bits) for bits in WIDTHS)

    def bits(self, threshold: float, *, k_min: int, k_max: int, clip_fallback: bool) -> dict[str, int]:
        """Module path -> the smallest k with D_k below the threshold, within k_min..k_max; 8 where there is none.

        Args:
            threshold: tau, above 0.
            k_min: Fewest bits.
            k_max: Most bits.
            clip_fallback: Keep the 8 of a layer where nothing suffices within k_max too; the official code does not.
        """
        found = {}
        for path, row in self.table.items():
            width = next((bits for bits, value in zip(WIDTHS, row, strict=True) if value < threshold), None)
            fallback = min(WIDTHS[-1], k_max) if clip_fallback else WIDTHS[-1]
            found[path] = fallback if width is None else min(max(width, k_min), k_max)
        return found


Cost = Callable[[Mapping[str, int]], float]


def meet_budget(distortions: Distortions, cost: Cost, limit: float, *, k_min: int, k_max: int, name: str) -> dict[str, int]:
    """The bits of the smallest threshold whose cost is within a limit: as many bits as the limit allows.

    The bits change only where the threshold passes a distortion, so the search goes over these and is exact. Where layers
    share a distortion, or the steps between two thresholds are large, less than the limit may be used.

    Args:
        distortions: Of all layers.
        cost: Of a plan (module path -> bits); more bits may not cost less.
        limit: The most that it may cost.
        k_min: Fewest bits.
        k_max: Most bits.
        name: What the limit is called in the recipe.

    Raises:
        TrainingError: Even ``k_min`` bits everywhere cost more.
    """

    def plan(threshold: float) -> dict[str, int]:
        return distortions.bits(threshold, k_min=k_min, k_max=k_max, clip_fallback=True)

    least = cost(dict.fromkeys(distortions.table, k_min))
    if least > limit:
        raise TrainingError(
            f"{name}: {limit:g} cannot be met: {k_min} bits in every layer cost {least:.4g}",
            hint="give a larger budget, or a smaller model",
        )
    # D < tau is asked, so the smallest tau that gives a layer k bits is just above its D_k
    steps = sorted({value for row in distortions.table.values() for value in row})
    thresholds = [np.nextafter(value, np.inf) for value in [0.0, *steps]]
    first = bisect_left(thresholds, True, key=lambda threshold: cost(plan(threshold)) <= limit)
    if first == len(thresholds):  # only below the largest D_2 are there layers with more than k_min bits
        return dict.fromkeys(distortions.table, k_min)
    return plan(thresholds[first])
