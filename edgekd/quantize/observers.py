"""Calibration: from the values that a tensor takes on real images to the scale of its quantizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLES = 1 << 16
CANDIDATES = 80


class Observer:
    """Keeps an even random sample of the values that it is shown, and their largest magnitude."""

    def __init__(self) -> None:
        self.largest = 0.0
        """Not finite as soon as one value is not."""
        self._parts: list[Tensor] = []
        self._share = 1.0
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, values: Tensor) -> None:
        """Look at one tensor."""
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
    def samples(self) -> Tensor:
        """What was kept, float32 [N]."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0)


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
