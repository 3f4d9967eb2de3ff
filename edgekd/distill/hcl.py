"""Hierarchical context loss: maps are compared as they are and averaged over coarser and coarser grids.

Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review. CVPR 2021, arXiv 2104.09044 ("HCL", section 3.4); official code:
dvlab-research/ReviewKD. Written from the specification.

Differs from the paper: without its fusion modules between levels, as GHOST (IEEE TGRS 2023, arXiv 2301.00131) uses the loss on
twins; where channels differ, a 1x1 convolution adapts the student's map.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.distill.base import Distiller, map_channels
from edgekd.nn.adapters import ChannelAdapters
from edgekd.nn.relations import hierarchical_context, same_size
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs


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
