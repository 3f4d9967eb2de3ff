"""Spatial and channel relations: maps are compared after each place, and each channel, has looked at all others.

The baseline "SCRM" of GHOST (Zhang et al., IEEE TGRS 2023, arXiv 2301.00131; official code: icey-zhang/GHOST), which follows the
self-attention of Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019. Written from the specification.

Differs from the official code: maps of more than ``max_positions`` places are averaged down first, because the relations of N
places are N x N numbers per image; student and teacher may differ in size (the larger is averaged down) and in channels (a 1x1
convolution adapts the student's).

Shape letters: B images, C channels, N places, H rows, W columns.
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
from edgekd.nn.relations import EPSILON, resized, same_size
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

RESIDUAL = 0.1
"""How much of what the others say is added to a map."""


class ScrmConfig(Config):
    """Spatial and channel relation maps (GHOST's baseline, 2023)."""

    name: Literal["scrm"]
    weight: float = Field(1.0, ge=0, le=10_000)
    """Weight of the distillation term."""
    layers: list[str] | None = None
    """Taps that are compared; null takes the last three maps that student and teacher share."""
    max_positions: int = Field(1024, ge=16, le=16_384)
    """N: places of a map at most; larger maps are averaged down."""

    def build(self, student: Loaded, teacher: Loaded) -> ScrmDistiller:
        """The Distiller, with adapters where channels differ."""
        return ScrmDistiller(self, map_channels(student, teacher, self.layers, method=self.name, last=3))


def spatial_relation(unit_BCN: Tensor) -> Tensor:
    """0.1 F A^T + F with A = softmax over the last axis of F^T F: [B, C, N]."""
    attention_BNN = torch.softmax(unit_BCN.transpose(1, 2) @ unit_BCN, dim=-1)
    return RESIDUAL * unit_BCN @ attention_BNN.transpose(1, 2) + unit_BCN


def channel_relation(unit_BCN: Tensor) -> Tensor:
    """0.1 A F + F with A = softmax over the last axis of (the row's largest - G), G = F F^T: [B, C, N]."""
    gram_BCC = unit_BCN @ unit_BCN.transpose(1, 2)
    attention_BCC = torch.softmax(gram_BCC.amax(-1, keepdim=True) - gram_BCC, dim=-1)
    return RESIDUAL * attention_BCC @ unit_BCN + unit_BCN


def relation_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """The mean absolute difference of the spatial relations plus that of the channel relations, a scalar.

    Every place's channels are scaled to length 1 first (its norm at least 1e-12).
    """
    ours, theirs = _unit(student_BCHW), _unit(teacher_BCHW.detach())
    return F.l1_loss(spatial_relation(ours), spatial_relation(theirs)) + F.l1_loss(
        channel_relation(ours), channel_relation(theirs)
    )


def _unit(maps_BCHW: Tensor) -> Tensor:
    flat_BCN = maps_BCHW.to(torch.promote_types(maps_BCHW.dtype, torch.float32)).flatten(2)
    return flat_BCN / flat_BCN.norm(dim=1, keepdim=True).clamp_min(EPSILON)


def fewer_places(maps: Tensor, most: int) -> Tensor:
    """The map, averaged down by halving both sides until it has no more places than allowed."""
    height, width = maps.shape[2:]
    while height * width > most:
        height, width = max(1, height // 2), max(1, width // 2)
    return resized(maps, [height, width])


class ScrmDistiller(Distiller):
    """The term ``scrm``."""

    def __init__(self, config: ScrmConfig, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.student_taps = self.teacher_taps = tuple(channels)
        self.adapters = ChannelAdapters(channels)

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        with torch.autocast(step.images.device.type, enabled=False):
            parts = []
            for role in self.student_taps:
                ours = self.adapters(role, step.student.taps[role].float())
                ours, theirs = same_size(ours, step.teacher.taps[role].float())
                most = self.config.max_positions
                parts.append(relation_distance(fewer_places(ours, most), fewer_places(theirs, most)))
        return {"scrm": self.config.weight * torch.stack(parts).sum()}
