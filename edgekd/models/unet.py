"""U-Net with batch norms, whose sides stay as they are: every convolution is padded.

Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation. MICCAI 2015, arXiv 1505.04597.

Differs from the paper: padded convolutions with batch norms, so that the output has the image's sides; nearest enlargement and a
convolution in place of transposed ones, which every engine runs on integers; ``width`` and ``depth`` scale it down.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

DEEPEST = 4
TAPS = {f"stage{index + 1}": f"encoder.{index}" for index in range(DEEPEST)} | {"bottom": "bottom", "top": "decoder.0.blocks"}
"""Role -> module path, of a net with depth 4."""


@dataclass(frozen=True)
class Layers:
    """What a U-Net is made of: edgekd.models.slim_unet has others."""

    conv: Callable[[Sequence[int], int, int], nn.Module]
    """Channels of each joined input, channels of the output, sides of the kernel: a padded convolution without bias."""
    first: Callable[[int, int], nn.Module]
    """The 3x3 convolution of images: their channels, those of the output."""
    last: Callable[[int, int], nn.Module]
    """The 1x1 convolution with bias that gives logits: channels of the input, classes."""
    norm: Callable[[int], nn.Module]
    """A batch norm of so many channels."""


PLAIN = Layers(
    conv=lambda inputs, channels, size: nn.Conv2d(sum(inputs), channels, size, padding=size // 2, bias=False),
    first=lambda inputs, channels: nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
    last=lambda inputs, classes: nn.Conv2d(inputs, classes, 1),
    norm=nn.BatchNorm2d,
)


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and ReLU: [B, Cin, H, W] to [B, Cout, H, W]."""

    def __init__(self, first: nn.Module, channels: int, layers: Layers) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number in (1, 2):
            parts[f"conv{number}"] = first if number == 1 else layers.conv([channels], channels, 3)
            parts[f"norm{number}"] = layers.norm(channels)
            parts[f"act{number}"] = nn.ReLU()
        super().__init__(parts)


class Up(nn.Module):
    """Enlarges a coarse map, joins it with a fine one, and convolves both."""

    def __init__(self, coarse: int, fine: int, layers: Layers) -> None:
        super().__init__()
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.narrow = nn.Sequential(layers.conv([coarse], fine, 1), layers.norm(fine), nn.ReLU())
        self.blocks = DoubleConv(layers.conv([fine, fine], fine, 3), fine, layers)

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
        layers: What it is made of.

    Raises:
        ValueError: ``width`` or ``depth`` is out of range.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, depth: int, layers: Layers = PLAIN) -> None:
        super().__init__()
        if width < 1 or not 1 <= depth <= DEEPEST:
            raise ValueError(f"width must be at least 1 and depth within 1 and {DEEPEST}; received {width} and {depth}")
        widths = [width * 2**index for index in range(depth + 1)]
        self.encoder = nn.ModuleList([DoubleConv(layers.first(in_channels, width), width, layers)])
        self.encoder.extend(
            DoubleConv(layers.conv([before], channels, 3), channels, layers) for before, channels in pairwise(widths[:-1])
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = DoubleConv(layers.conv([widths[-2]], widths[-1], 3), widths[-1], layers)
        self.decoder = nn.ModuleList(Up(coarse, fine, layers) for fine, coarse in pairwise(widths))
        self.head = layers.last(width, num_classes)

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
