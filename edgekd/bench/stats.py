"""The statistics of latencies. ``tests/vectors/percentile.json`` holds what every implementation of percentile must answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def percentile(values: Sequence[float] | NDArray[Any], percent: float) -> float:
    """Nearest rank: the smallest value that at least ``percent`` % of all values do not exceed. It is always one of the values.

    Args:
        values: At least one, in any order.
        percent: 0 to 100, in steps of 0.1; 0 is the minimum.

    Raises:
        ValueError: No values, or ``percent`` is out of range or finer than a tenth.
    """
    if len(values) == 0:
        raise ValueError("percentile of no values")
    return float(np.sort(np.asarray(values))[_rank(len(values), percent)])


def _rank(count: int, percent: float) -> int:
    """The index of the percentile among ``count`` sorted values."""
    tenths = round(percent * 10)
    if not 0 <= tenths <= 1000 or abs(tenths - percent * 10) > 1e-6:
        raise ValueError(f"percent must be from 0 to 100 in steps of 0.1; received {percent!r}")
    # Integers, because 7 / 100 * 100 is not 7 in floating point, and C++ has to find the same rank.
    return max((tenths * count + 999) // 1000, 1) - 1


def summarize(samples_ns: Sequence[int]) -> dict[str, float]:
    """Milliseconds from raw samples in nanoseconds: p50, p90, p99, mean, min, max, std (of the population)."""
    samples_ms = np.asarray(samples_ns, np.float64) / 1e6
    return {
        "p50": percentile(samples_ms, 50),
        "p90": percentile(samples_ms, 90),
        "p99": percentile(samples_ms, 99),
        "mean": float(samples_ms.mean()),
        "min": float(samples_ms.min()),
        "max": float(samples_ms.max()),
        "std": float(samples_ms.std()),
    }


def ratio_of_medians(
    numerator: Sequence[int], denominator: Sequence[int], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """median(numerator) / median(denominator) with a bootstrap interval.

    Args:
        numerator: Samples of one engine, in the order of the rounds.
        denominator: Samples of the other, same length: entry i was measured in the same round, so rounds are resampled as pairs.
        resamples: Bootstrap resamples.
        confidence: Share of resamples inside the interval, 0 to 1.
        seed: Of the resampling.

    Returns:
        The ratio, and the interval (low, high).
    """
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or not top.size:
        raise ValueError(f"expected two equally long lists of samples; received {list(top.shape)} and {list(bottom.shape)}")
    rng, middle = np.random.default_rng(seed), _rank(top.size, 50)
    ratios = np.empty(resamples)
    for index in range(resamples):
        rounds = rng.integers(0, top.size, top.size)
        ratios[index] = np.partition(top[rounds], middle)[middle] / np.partition(bottom[rounds], middle)[middle]
    tail = round((1 - confidence) / 2 * 100, 1)
    interval = (percentile(ratios, tail), percentile(ratios, 100 - tail))
    return percentile(top, 50) / percentile(bottom, 50), interval


def verdict(interval: tuple[float, float], noise_interval: tuple[float, float]) -> str:
    """``faster``, ``slower`` or ``no difference``.

    Args:
        interval: Of the speed-up over the reference.
        noise_interval: Of the ratio of the reference to itself; its farthest end from 1 is the noise floor.

    Returns:
        ``no difference`` where the speed-up's interval touches the noise floor around 1.
    """
    noise = max(max(end, 1 / end) for end in noise_interval)
    if interval[0] > noise:
        return "faster"
    return "slower" if interval[1] < 1 / noise else "no difference"
