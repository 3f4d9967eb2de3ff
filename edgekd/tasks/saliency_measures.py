"""How good a map of saliency is: the five figures of the field (NumPy and SciPy).

All are means over images; of the largest F-measure, precision and recall are (Borji, Cheng, Jiang, Li: Salient Object Detection:
A Benchmark. TIP 2015), and E-measure is that of the map cut at twice its mean: both as KD-SCFNet's authors take them.

Maps are the sigmoids of logits, at the sides that the model has; nothing is stretched to 0..1. Pixels that do not count are left
out of what is counted pixel by pixel, and are background where the shape matters (weighted F, S); images without any are left
out. Of an image in which nothing stands out, recall, precision and weighted F are 0, S is 1 - the mean of the map, E the share of
what stays dark.

Shape letters: N images, H rows, W columns, T = 256 thresholds, P pixels that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.data.base import IGNORE

Array = npt.NDArray[Any]
THRESHOLDS = 256
BETA_SQUARED = 0.3
"""Of the F-measure: precision counts more (Achanta et al., Frequency-tuned Salient Region Detection, CVPR 2009)."""
EPSILON = float(np.finfo(np.float64).eps)
GAUSS = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 5.0**2))
"""Of the weighted F-measure: 7 pixels, deviation 5."""


def precision_and_recall(logits_NHW: Array, labels_NHW: Array) -> Array:
    """Of every image with pixels that count, at the thresholds 0, 1/255 ... 1: float64 [n, 2, T].

    Args:
        logits_NHW: Before sigmoid.
        labels_NHW: uint8, 1 salient, 0 not; 255 does not count.
    """
    found = []
    for shares, truth, counted in _images(logits_NHW, labels_NHW):
        levels, true = np.rint(shares[counted] * (THRESHOLDS - 1)).astype(np.int64), truth[counted]
        reached, right = (np.bincount(some, minlength=THRESHOLDS)[::-1].cumsum()[::-1] for some in (levels, levels[true]))
        found.append((right / np.maximum(reached, 1), right / max(1, int(true.sum()))))
    return np.array(found).reshape(-1, 2, THRESHOLDS)


def largest_f(precision_T: Array, recall_T: Array) -> float:
    """The largest 1.3 P R / (0.3 P + R), of precision and recall that are averaged over images: 0..1."""
    below = BETA_SQUARED * precision_T + recall_T
    return float(((1 + BETA_SQUARED) * precision_T * recall_T / np.where(below > 0, below, 1)).max())


def others(logits_NHW: Array, labels_NHW: Array) -> dict[str, float]:
    """Weighted F, S-measure, E-measure and mean absolute error; arguments as for :func:`precision_and_recall`."""
    rows = []
    for shares, truth, counted in _images(logits_NHW, labels_NHW):
        seen, true = shares[counted], truth[counted]
        whole, shape = np.where(counted, shares, 0.0), truth & counted
        rows.append((weighted_f(whole, shape), s_measure(whole, shape), e_measure(seen, true), float(np.abs(seen - true).mean())))
    means = np.mean(rows, axis=0) if rows else np.zeros(4)
    return dict(zip(("weighted F", "S-measure", "E-measure", "MAE"), map(float, means), strict=True))


def _images(logits_NHW: Array, labels_NHW: Array) -> Iterator[tuple[Array, Array, Array]]:
    """The map (0..1), what stands out, and what counts, of each image with pixels that count."""
    for logits, labels in zip(logits_NHW, labels_NHW, strict=True):
        counted = labels != IGNORE
        if counted.any():
            yield 0.5 + 0.5 * np.tanh(logits.astype(np.float64) / 2), labels == 1, counted


def e_measure(shares_P: Array, truth_P: Array) -> float:
    """The enhanced alignment of the truth and of the map, cut at twice its mean.

    Fan et al.: Enhanced-alignment Measure for Binary Foreground Map Evaluation. IJCAI 2018, arXiv 1805.10421.
    """
    cut = shares_P >= min(1.0, 2 * shares_P.mean())
    if truth_P.all() or not truth_P.any():
        enhanced = (cut == truth_P).astype(np.float64)
    else:
        ours, theirs = cut - cut.mean(), truth_P - truth_P.mean()
        enhanced = (2 * ours * theirs / (ours**2 + theirs**2 + EPSILON) + 1) ** 2 / 4
    return float(enhanced.sum() / (len(truth_P) - 1 + EPSILON))


def s_measure(shares_HW: Array, truth_HW: Array) -> float:
    """Half the likeness of what stands out and of the rest, half that of four parts about its centre.

    Fan et al.: Structure-measure: A New Way to Evaluate Foreground Maps. ICCV 2017, arXiv 1708.00786, alpha = 0.5.
    """
    share = truth_HW.mean()
    if share in (0, 1):
        return float(shares_HW.mean() if share else 1 - shares_HW.mean())
    objects = share * _object(shares_HW[truth_HW]) + (1 - share) * _object(1 - shares_HW[~truth_HW])
    row, column = (int(place) + 1 for place in np.argwhere(truth_HW).mean(0).round())
    regions = 0.0
    for rows in (slice(0, row), slice(row, None)):
        for columns in (slice(0, column), slice(column, None)):
            ours, theirs = shares_HW[rows, columns], truth_HW[rows, columns]
            if ours.size:
                regions += ours.size / truth_HW.size * _similarity(ours, theirs.astype(np.float64))
    return max(0.0, float(0.5 * objects + 0.5 * regions))


def _object(values: Array) -> float:
    """Large where all values are 1."""
    mean = values.mean()
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + spread + EPSILON))


def _similarity(ours: Array, theirs: Array) -> float:
    """Luminance, contrast and structure of two parts (SSIM, without its constants)."""
    mean, other = ours.mean(), theirs.mean()
    below = max(ours.size - 1, 1)
    spread, spread_other = ((part - part.mean()) ** 2 for part in (ours, theirs))
    shared = ((ours - mean) * (theirs - other)).sum() / below
    above = 4 * mean * other * shared
    under = (mean**2 + other**2) * (spread.sum() + spread_other.sum()) / below
    if above == 0:
        return float(under == 0)
    return float(above / (under + EPSILON))


def weighted_f(shares_HW: Array, truth_HW: Array) -> float:
    """F with beta 1, where errors weigh less beside right pixels of the object, and more far away from it.

    Margolin, Zelnik-Manor, Tal: How to Evaluate Foreground Maps? CVPR 2014.
    """
    from scipy import ndimage  # half a second

    if not truth_HW.any():
        return 0.0
    error = np.abs(shares_HW - truth_HW)
    distance, nearest = ndimage.distance_transform_edt(~truth_HW, return_indices=True)
    spread = error[tuple(nearest)]  # outside the object: the error of the object's nearest pixel
    for axis in (0, 1):
        spread = ndimage.correlate1d(spread, GAUSS / GAUSS.sum(), axis=axis, mode="constant")
    weight = np.where(truth_HW, 1.0, 2 - np.exp(np.log(0.5) / 5 * distance))
    error = np.where(truth_HW & (spread < error), spread, error) * weight
    right, wrong = (1 - error[truth_HW]).sum(), error[~truth_HW].sum()
    recall, precision = 1 - error[truth_HW].mean(), right / (right + wrong + EPSILON)
    return float(2 * recall * precision / (recall + precision + EPSILON))
