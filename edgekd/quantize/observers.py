"""Calibration: from the values that a tensor takes on real images to the scale of its quantizer.

Four ways to choose where a range ends: ``minmax`` keeps everything, ``percentile`` cuts a fixed share of outliers, ``mse`` has
the least squared error, and ``entropy`` loses the least information (Migacz, 8-bit Inference with TensorRT, GTC 2017). Written
from the mathematics.

Differs from TensorRT's: the histogram is of an even sample of at most ``SAMPLES`` values and not of all; values that are exactly
zero, which any scale keeps, are left out (after a ReLU they would be half of the histogram); the threshold is the upper edge of
the last bin that is kept and not half a bin beyond it; what is clipped counts in the last bin that is not empty, because a
divergence is infinite where P is not zero and Q is, and a lone outlier would then never be clipped.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Calibration = Literal["mse", "minmax", "percentile", "entropy"]
SAMPLES = 1 << 16
CANDIDATES = 80
BINS = 2048
"""Of the histogram of magnitudes that ``entropy`` looks at."""
_TOGETHER = 128
"""So many thresholds are tried at once: a few megabytes."""


class Observer:
    """Keeps an even random sample of the values that it is shown, and their largest magnitude."""

    def __init__(self) -> None:
        self.largest = 0.0
        """Not finite as soon as one value is not."""
        self._parts: list[Tensor] = []
        self._peaks: list[Tensor] = []
        self._share = 1.0
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, values: Tensor) -> None:
        """Look at one tensor, [B, ...]."""
        if values.ndim > 1:
            self._peaks.append(values.detach().float().abs().flatten(1).amax(1).cpu())
        flat = values.detach().float().reshape(-1).cpu()
        self.largest = float(
            torch.maximum(torch.tensor(self.largest), flat.abs().amax())
        )  # keeps a NaN, as Python's max does not
        count = min(SAMPLES, math.ceil(flat.numel() * self._share))
        self._share = min(self._share, count / flat.numel())
        self._parts.append(flat[torch.randint(0, flat.numel(), (count,), generator=self._generator)])
        while sum(len(part) for part in self._parts) > SAMPLES:
            self._share /= 2
            self._parts = [part[: (len(part) + 1) // 2] for part in self._parts]  # in random order: any half is a sample

    @property
    def usual(self) -> float:
        """What the largest magnitude of three in four images stays below; infinite where there are no images."""
        return float(torch.cat(self._peaks).quantile(0.75)) if self._peaks else math.inf

    @property
    def samples(self) -> Tensor:
        """What was kept, float32 [N]."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0)


def find_scale(observer: Observer, low: int, high: int, *, calibration: Calibration, percentile: float) -> float:
    """The scale of a tensor, by one of the four ways; not finite where a value was not.

    Args:
        observer: What was seen.
        low: Smallest code.
        high: Largest code.
        calibration: Which way.
        percentile: Of the magnitudes, in 0..100; for ``percentile`` alone.
    """
    if calibration == "mse":
        return best_scale(observer, low, high)
    if not math.isfinite(observer.largest) or observer.largest == 0.0:
        return observer.largest / high if observer.largest else 1.0 / high  # nothing but zeros: any scale is exact
    end = observer.largest
    if calibration == "percentile":
        end = float(torch.quantile(observer.samples.abs(), percentile / 100)) or end  # zero: nearly all values are
    elif calibration == "entropy":
        magnitudes = observer.samples[observer.samples != 0].abs()
        if magnitudes.numel():
            largest = float(magnitudes.amax())
            histogram = torch.histc(magnitudes.double(), BINS, 0.0, largest)
            end = entropy_bins(histogram, high + 1) * largest / BINS
    return end / high


def entropy_bins(histogram_N: Tensor, levels: int) -> int:
    """How many bins to keep so that the quantized distribution tells most about the full one.

    For each number of bins i: P is the histogram cut at i, what lies beyond added to the last of these bins that is not empty; Q
    is the histogram cut at i, put into ``levels`` equal groups of bins, each group's count shared evenly among those of its bins
    that are not empty. The i with the least KL(P || Q) is chosen, the smallest of equals.

    Args:
        histogram_N: Counts of magnitudes, float64 [N]; not all zero.
        levels: How many magnitudes the codes have.

    Returns:
        From ``levels`` to N.
    """
    count = len(histogram_N)
    beyond_N = histogram_N.sum() - histogram_N.cumsum(0)  # of each bin: what lies after it
    bins_N = torch.arange(count)
    filled_N = torch.where(histogram_N > 0, bins_N, 0).cummax(0).values  # the last bin up to here that is not empty
    divergences = []
    for cuts_K in torch.arange(levels, count + 1).split(_TOGETHER):
        inside_KN = bins_N < cuts_K[:, None]
        kept_KN = histogram_N * inside_KN
        group_KN = torch.where(inside_KN, bins_N * levels // cuts_K[:, None], levels - 1)
        zeros_KL = histogram_N.new_zeros(len(cuts_K), levels)
        total_KL = zeros_KL.scatter_add(1, group_KN, kept_KN)
        filled_KL = zeros_KL.scatter_add(1, group_KN, (kept_KN > 0).to(kept_KN.dtype))
        q_KN = (total_KL / filled_KL.clamp_min(1)).gather(1, group_KN) * (kept_KN > 0)
        p_KN = kept_KN.scatter_add(1, filled_N[cuts_K - 1, None], beyond_N[cuts_K - 1, None])
        p_KN, q_KN = p_KN / p_KN.sum(1, keepdim=True), q_KN / q_KN.sum(1, keepdim=True)
        terms_KN = torch.where(p_KN > 0, p_KN * (p_KN / q_KN).log(), 0.0)  # Q is all zero where nothing was kept
        divergences.append(terms_KN.sum(1).nan_to_num(nan=math.inf, posinf=math.inf))
    return levels + int(torch.cat(divergences).argmin())


def best_scale(observer: Observer, low: int, high: int) -> float:
    """The scale with the smallest mean squared error on the sample.

    Candidates clip between a fifth and all of the largest magnitude: clipping a few outliers costs less than a coarse grid for
    all other values.

    Args:
        observer: What was seen.
        low: Smallest code.
        high: Largest code.
    """
    values, largest = observer.samples, observer.largest
    if largest == 0.0 or not values.numel():
        return 1.0 / high  # nothing but zeros: any scale is exact
    zero = torch.zeros((), dtype=torch.int32)
    best, least = largest / high, float("inf")
    for share in torch.linspace(0.2, 1.0, CANDIDATES).tolist():
        scale = torch.tensor(share * largest / high)
        error = float((torch.fake_quantize_per_tensor_affine(values, scale, zero, low, high) - values).square().mean())
        if error < least:
            best, least = float(scale), error
    return best
