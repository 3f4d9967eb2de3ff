"""Arithmetic that 16 bits are too few for."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(values: Tensor) -> Tensor:
    """In float32 at least: exponentials, powers and sums over whole maps lose too much in 16 bits. float64 stays as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
