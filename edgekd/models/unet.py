"""U-Net with batch norms, whose sides stay as they are: every convolution is padded.

Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation. MICCAI 2015, arXiv 1505.04597.

Differs from the paper: padded convolutions with batch norms, so that the output has the image's sides; nearest enlargement and a
convolution in place of transposed ones, which every engine runs on integers; ``width`` and ``depth`` scale it down.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

DEEPEST = 4
TAPS = {f"stage{index + 1}": f"encoder.{index}" for index in range(DEEPEST)} | {"bottom": "bottom", "top": "decoder.0.blocks"}
"""Role -> module path, of a net with depth 4."""


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and ReLU: [B, Cin, H, W] to [B, Cout, H, W]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number, before in ((1, in_channels), (2, channels)):
            parts[f"conv{number}"] = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            parts[f"norm{number}"] = nn.BatchNorm2d(channels)
            parts[f"act{number}"] = nn.ReLU()
        super().__init__(parts)


class Up(nn.Module):
    """Enlarges a coarse map, joins it with a fine one, and convolves both."""

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.narrow = nn.Sequential(nn.Conv2d(coarse, fine, 1, bias=False), nn.BatchNorm2d(fine), nn.ReLU())
        self.blocks = DoubleConv(2 * fine, fine)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """[B, C1, H / 2, W / 2] and [B, C2, H, W] to [B, C2, H, W]."""
        out: Tensor = self.blocks(torch.cat([fine, self.enlarge(self.narrow(coarse))], 1))
        return out


class UNet(nn.Module):
    """Images [B, in_channels, H, W], sides multiples of 2^depth, to logits [B, K, H, W].

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        width: Channels of the finest maps; every coarser stage has twice as many.
        depth: Stages above the bottom.

    Raises:
        ValueError: ``width`` or ``depth`` is out of range.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        if width < 1 or not 1 <= depth <= DEEPEST:
            raise ValueError(f"width must be at least 1 and depth within 1 and {DEEPEST}; received {width} and {depth}")
        widths = [width * 2**index for index in range(depth + 1)]
        self.encoder = nn.ModuleList(DoubleConv(*pair) for pair in pairwise([in_channels, *widths[:-1]]))
        self.pool = nn.MaxPool2d(2)
        self.bottom = DoubleConv(*widths[-2:])
        self.decoder = nn.ModuleList(Up(coarse, fine) for fine, coarse in pairwise(widths))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x, maps = images, []
        for stage in self.encoder:
            x = stage(x)
            maps.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for index in reversed(range(len(maps))):
            x = self.decoder[index](x, maps[index])
        logits: Tensor = self.head(x)
        return logits


def unet(*, num_classes: int, in_channels: int, width: int = 16, depth: int = DEEPEST) -> UNet:
    """U-Net; 64 is the published width, 4 the published depth."""
    return UNet(num_classes, in_channels, width, depth)
