"""Mobile U-Net: MobileNetV2 as the way down, inverted residuals on the way up.

The student of CoCo DistillNet (Zou, Sun; BIBM 2021, arXiv 2108.12173), Graph Flow (Zou et al.; arXiv 2203.08667) and of
generalizable distillation (arXiv 2207.12995), after Sandler et al., MobileNetV2, CVPR 2018, arXiv 1801.04381. Written from the
specification of what their code computes.

Differs from it: ReLU and not ReLU6, as edgekd's other MobileNetV2; coarse maps are narrowed by a 1x1 convolution and enlarged by
their nearest values, which every engine runs on integers. ``up: transposed`` has the published transposed convolutions.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.initial import initialise
from edgekd.models.mobilenet_v2 import InvertedResidual

TAPS = {
    **{f"stage{number}": f"encoder.{number - 1}" for number in (1, 2, 3, 4)},
    "bottom": "encoder.4",
    **{f"up{number}": f"decoder.{number - 1}" for number in (1, 2, 3, 4)},
    "top": "decoder.3",
}
"""Role -> module path: maps of strides 2, 4, 8, 16; the coarsest, 32; and those of the decoder, 16, 8, 4, 2."""

Row = tuple[int, int, int, int]
STAGES: tuple[tuple[Row, ...], ...] = (
    ((1, 16, 1, 1),),
    ((6, 24, 2, 2),),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
"""Per map, rows of: expansion, channels, repetitions, stride of the first repetition; table 2 of MobileNetV2."""
STEM, LAST, NARROW, EXPANSION = 32, 1280, 3, 6


class Up(nn.Module):
    """Enlarges a coarse map, joins it with a fine one, and makes one of both.

    Args:
        coarse: Channels of the coarse map.
        fine: Of the fine one, and of the result.
        transposed: By a transposed 4x4 convolution.
    """

    def __init__(self, coarse: int, fine: int, transposed: bool) -> None:
        super().__init__()
        self.narrow: nn.Module = (
            nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1)
            if transposed
            else nn.Sequential(nn.Conv2d(coarse, fine, 1, bias=False), nn.BatchNorm2d(fine))
        )
        self.transposed = transposed
        self.both = InvertedResidual(2 * fine, fine, EXPANSION, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """[B, C1, H / 2, W / 2] and [B, C2, H, W] to [B, C2, H, W]; the halves of odd sides are rounded up."""
        x = self.narrow(coarse)
        high, wide = fine.shape[2], fine.shape[3]
        x = x[:, :, :high, :wide] if self.transposed else F.interpolate(x, size=(high, wide), mode="nearest")
        out: Tensor = self.both(torch.cat([x, fine], 1))
        return out


class MobileUNet(nn.Module):
    """Images [B, in_channels, H, W], sides multiples of 16, to logits [B, K, H, W].

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        width: Multiplier of all channels, above 0.
        up: How coarse maps are enlarged.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, num_classes: int, in_channels: int, width: float, up: Literal["nearest", "transposed"]) -> None:
        super().__init__()
        if not width > 0 or up not in ("nearest", "transposed"):
            raise ValueError(f"width must be above 0, up nearest or transposed; received {width}, {up!r}")
        channels = _scaled(STEM, width)
        self.stem = _conv_norm_act(in_channels, channels, 3, stride=2)
        stages, widths = [], []
        for rows in STAGES:
            blocks = []
            for expansion, base, repetitions, stride in rows:
                for index in range(repetitions):
                    blocks.append(InvertedResidual(channels, _scaled(base, width), expansion, stride if index == 0 else 1))
                    channels = _scaled(base, width)
            stages.append(nn.Sequential(*blocks))
            widths.append(channels)
        widths[-1] = _scaled(LAST, width)
        stages[-1].append(_conv_norm_act(channels, widths[-1], 1))
        self.encoder = nn.ModuleList(stages)
        self.decoder = nn.ModuleList(Up(coarse, fine, up == "transposed") for coarse, fine in pairwise(reversed(widths)))
        self.narrow = nn.Conv2d(widths[0], NARROW, 1)
        self.head = nn.Conv2d(NARROW, num_classes, 1)
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x, maps = self.stem(images), []
        for stage in self.encoder:
            x = stage(x)
            maps.append(x)
        x = maps.pop()
        for up in self.decoder:
            x = up(x, maps.pop())
        logits: Tensor = self.enlarge(self.head(self.narrow(x)))
        return logits


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _conv_norm_act(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def mobile_unet(
    *, num_classes: int, in_channels: int, width: float = 1.0, up: Literal["nearest", "transposed"] = "nearest"
) -> MobileUNet:
    """Mobile U-Net; ``up: transposed`` is the published one."""
    return MobileUNet(num_classes, in_channels, width, up)
