"""The distance of two samples of vectors, each taken for a Gaussian.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium. NIPS 2017, arXiv 1706.08500 (the Frechet Inception distance).

Shape letters: n vectors, D their length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(one_nD: Tensor, other_nD: Tensor) -> float:
    """||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1 C2)^1/2), with means m and unbiased covariances C, computed in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^1/2 C2 C1^1/2, below 0 only by rounding and cut there;
    so samples of fewer vectors than D will do. A sample of one vector has the covariance 0.

    Args:
        one_nD: [n, D], n at least 1.
        other_nD: [m, D], m at least 1.

    Returns:
        At least 0; 0 for equal samples.
    """
    (mean, spread), (other_mean, other_spread) = (_gaussian(sample.double()) for sample in (one_nD, other_nD))
    root = _root(spread)
    shared = torch.linalg.eigvalsh(root @ other_spread @ root).clamp_min(0).sqrt().sum()
    far = (mean - other_mean).square().sum() + spread.trace() + other_spread.trace() - 2 * shared
    return float(far.clamp_min(0))


def _gaussian(sample: Tensor) -> tuple[Tensor, Tensor]:
    mean = sample.mean(0)
    centred = sample - mean
    return mean, centred.T @ centred / max(1, len(sample) - 1)


def _root(spread: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(spread)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
