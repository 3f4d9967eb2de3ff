"""Hierarchical context loss: maps are compared as they are and averaged over coarser and coarser grids.

Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review. CVPR 2021, arXiv 2104.09044 ("HCL", section 3.4); official code:
dvlab-research/ReviewKD. Written from the specification.

Differs from the paper: without its fusion modules between levels, as GHOST (IEEE TGRS 2023, arXiv 2301.00131) uses the loss on
twins; where channels differ, a 1x1 convolution adapts the student's map.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.distill.base import Distiller, map_channels
from edgekd.nn.adapters import ChannelAdapters
from edgekd.nn.relations import same_size
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

GRIDS = (4, 2, 1)
"""Sides of the grids, in cells; only those smaller than the map count."""


class HclConfig(Config):
    """Hierarchical context loss (Chen et al. 2021)."""

    name: Literal["hcl"]
    weight: float = Field(0.1, ge=0, le=10_000)
    """Weight of the distillation term."""
    layers: list[str] | None = None
    """Taps that are compared; null takes every map that student and teacher share."""

    def build(self, student: Loaded, teacher: Loaded) -> HclDistiller:
        """The Distiller, with adapters where channels differ."""
        return HclDistiller(self, map_channels(student, teacher, self.layers, method=self.name))


def hierarchical_context(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """[MSE + sum over grids of 2^-j MSE of the averages in the grid] / the sum of these weights, a scalar.

    j = 1, 2, .. counts the grids that are smaller than the map: a map of 2 rows keeps only the grid of 1 cell, with weight 1/2.

    Args:
        student_BCHW: [B, C, H, W].
        teacher_BCHW: The same shape; no gradient flows into it.
    """
    theirs = teacher_BCHW.detach()
    total, weights = F.mse_loss(student_BCHW, theirs), 1.0
    for number, side in enumerate([side for side in GRIDS if side < student_BCHW.shape[2]], start=1):
        far = F.mse_loss(F.adaptive_avg_pool2d(student_BCHW, side), F.adaptive_avg_pool2d(theirs, side))
        total = total + 2.0**-number * far
        weights += 2.0**-number
    return total / weights


class HclDistiller(Distiller):
    """The term ``hcl``."""

    def __init__(self, config: HclConfig, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.student_taps = self.teacher_taps = tuple(channels)
        self.adapters = ChannelAdapters(channels)

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        parts = []
        for role in self.student_taps:
            ours = self.adapters(role, step.student.taps[role]).float()
            parts.append(hierarchical_context(*same_size(ours, step.teacher.taps[role].float())))
        return {"hcl": self.config.weight * torch.stack(parts).sum()}
