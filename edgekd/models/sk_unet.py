"""U-Net of selective kernels, with attention by strips on its way up: the teacher that Graph Flow's authors call FANet.

Zou et al.: Graph Flow: Cross-layer Graph Flow Distillation for Dual Efficient Medical Image Segmentation, arXiv 2203.08667; the
teacher of CoCo DistillNet (arXiv 2108.12173) and generalizable distillation (arXiv 2207.12995). Its parts: Li, Wang, Hu, Yang:
Selective Kernel Networks, CVPR 2019, arXiv 1903.06586; Hou, Zhang, Cheng, Feng: Strip Pooling, CVPR 2020, arXiv 2003.13328. From
the specification of what the code of the first computes: with ``up: transposed`` it has, for two classes and grey images,
38,292,162 parameters, the specified 38.29 million. (:mod:`edgekd.models.fanet` is the network of another paper.)

Differs from that code: coarse maps are narrowed by a 1x1 convolution and enlarged by their nearest values, which every engine
runs on integers; ``up: transposed`` has the published transposed convolutions. The softmax over two branches is a sigmoid of
their difference, and strips of one row or one column are added without being enlarged first: both compute the same.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.backbones import conv_norm_act
from edgekd.models.initial import initialise

LEVELS = 4
GRIDS = ((3, 6), (12, 18), (3, 6))
"""Cells along a side of the averages, the coarsest map of the decoder first."""
TAPS = {
    **{f"stage{number}": f"encoder.{number - 1}" for number in (1, 2, 3)},
    "bottom": "encoder.3",
    **{f"up{number}": f"decoder.{number - 1}.enlarge" for number in (1, 2, 3)},
    **{f"attention{number}": f"decoder.{number - 1}.attend" for number in (1, 2, 3)},
    "top": "head@input",
    "head": "head",
}
"""Role -> module path: maps of strides 1, 2, 4; the coarsest, 8; the decoder's, of 4, 2, 1, before they are joined and last."""


class SelectiveKernels(nn.Module):
    """What a 5x5 and a 3x3 convolution see, as much of either as the whole image asks: [B, C, H, W] to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large, self.small = (_conv_norm(channels, channels, kernel, act=True, bias=True) for kernel in (5, 3))
        inner = max(1, channels // 2)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_norm(channels, inner, 1, act=True, bias=True))
        self.for_large, self.for_small = (nn.Conv2d(inner, channels, 1) for _ in range(2))
        self.gate = nn.Sigmoid()

    def forward(self, maps: Tensor) -> Tensor:
        """The weighted mean of both."""
        large, small = self.large(maps), self.small(maps)
        asked = self.squeeze(large + small)
        share: Tensor = self.gate(self.for_large(asked) - self.for_small(asked))
        out: Tensor = small + share * (large - small)
        return out


class Block(nn.Module):
    """1x1, selective kernels, 1x1, and what went in, added: [B, Cin, H, W] to [B, C, H, W]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_norm(in_channels, channels, 1, act=True),
            *(SelectiveKernels(channels), nn.BatchNorm2d(channels), nn.ReLU()),
            *_conv_norm(channels, channels, 1),
        )
        self.short = nn.Sequential() if in_channels == channels else _conv_norm(in_channels, channels, 1)
        self.act = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """The block's result."""
        out: Tensor = self.act(self.body(maps) + self.short(maps))
        return out


class StripAttention(nn.Module):
    """Adds to every place what its surroundings, its row and its column have: [B, C, H, W], none negative, to the same shape.

    Args:
        channels: C.
        grids: Cells along a side of two averages.
        gated: The averages have half the channels and are joined, and the strips are multiplied by the map; else all are added.
    """

    def __init__(self, channels: int, grids: Sequence[int], gated: bool) -> None:
        super().__init__()
        half = max(1, channels // 2) if gated else channels
        self.gated = gated
        self.near, self.far = (conv_norm_act(channels, channels) for _ in range(2))
        self.place = _conv_norm(channels, channels, 3)
        self.averages = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(grid), *_conv_norm(channels, half, 3)) for grid in grids)
        self.row = _conv_norm(channels, channels, (1, 3))
        self.column = _conv_norm(channels, channels, (3, 1))
        self.act = nn.ReLU()
        self.mix_near = conv_norm_act(channels + 2 * half if gated else channels, channels, 3)
        self.mix_far = conv_norm_act(channels, channels, 3)
        self.mix = _conv_norm(2 * channels, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """The map with what was added."""
        size = maps.shape[-2:]
        near, far = self.near(maps), self.far(maps)
        seen = [self.place(near), *(F.interpolate(part(near), size=size, mode="nearest") for part in self.averages)]
        around = self.mix_near(self.act(torch.cat(seen, 1) if self.gated else seen[0] + seen[1] + seen[2]))
        strips = self.mix_far(self.act(self.row(far.mean(2, keepdim=True)) + self.column(far.mean(3, keepdim=True))))
        if self.gated:  # of two results of ReLU: another one changes nothing, and says that it needs no sign
            strips = self.act(strips * maps)
        out: Tensor = self.act(maps + self.mix(torch.cat([around, strips], 1)))
        return out


class Up(nn.Module):
    """Enlarges a coarse map, joins it with a fine one, and attends to both."""

    def __init__(self, coarse: int, fine: int, grids: Sequence[int], gated: bool, transposed: bool) -> None:
        super().__init__()
        self.enlarge: nn.Module = (
            nn.ConvTranspose2d(coarse, fine, 2, stride=2)
            if transposed
            else nn.Sequential(*_conv_norm(coarse, fine, 1), nn.Upsample(scale_factor=2, mode="nearest"))
        )
        self.blocks = _level(2 * fine, fine)
        self.attend = StripAttention(fine, grids, gated)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """[B, C1, H / 2, W / 2] and [B, C2, H, W] to [B, C2, H, W]."""
        out: Tensor = self.attend(self.blocks(torch.cat([self.enlarge(coarse), fine], 1)))
        return out


class SKUNet(nn.Module):
    """Images [B, in_channels, H, W], sides multiples of 8, to logits [B, K, H, W]. While it trains, B is at least 2.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        width: Channels of the finest maps; every coarser level has twice as many.
        up: How coarse maps are enlarged.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, up: Literal["nearest", "transposed"]) -> None:
        super().__init__()
        if width < 1 or up not in ("nearest", "transposed"):
            raise ValueError(f"width must be at least 1, up nearest or transposed; received {width}, {up!r}")
        widths = [width * 2**level for level in range(LEVELS)]
        self.encoder = nn.ModuleList(_level(*pair) for pair in pairwise([in_channels, *widths]))
        self.pool = nn.MaxPool2d(2)
        ups = zip(pairwise(reversed(widths)), GRIDS, strict=True)
        self.decoder = nn.ModuleList(
            Up(coarse, fine, grids, gated=fine == width, transposed=up == "transposed") for (coarse, fine), grids in ups
        )
        self.dropout, self.head = nn.Dropout2d(0.5), nn.Conv2d(width, num_classes, 1)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x, maps = self.encoder[0](images), []
        for stage in self.encoder[1:]:
            maps.append(x)
            x = stage(self.pool(x))
        for up in self.decoder:
            x = up(x, maps.pop())
        logits: Tensor = self.head(self.dropout(x))
        return logits


def _level(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(Block(in_channels, channels), Block(channels, channels))


def _conv_norm(
    in_channels: int, channels: int, kernel: int | tuple[int, int], *, act: bool = False, bias: bool = False
) -> nn.Sequential:
    high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    conv = nn.Conv2d(in_channels, channels, (high, wide), padding=(high // 2, wide // 2), bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), *([nn.ReLU()] if act else []))


def sk_unet(*, num_classes: int, in_channels: int, width: int = 64, up: Literal["nearest", "transposed"] = "nearest") -> SKUNet:
    """U-Net of selective kernels; ``up: transposed`` is the published one."""
    return SKUNet(num_classes, in_channels, width, up)
