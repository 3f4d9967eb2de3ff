"""Networks that make a vector of a map and a map of the vector, and the autoencoder of masks that such vectors are aligned with.

Qi et al.: Exploring Generalizable Distillation for Efficient Medical Image Segmentation. IEEE JBHI 2024, arXiv 2207.12995; the
layers of MSAN and of P-SAE as its released networks have them (XingqunQi-lab/GKD-Framework), as far as our specification knows
them.
Li, Wang, Hu, Yang: Selective Kernel Networks. CVPR 2019, arXiv 1903.06586.

Shape letters: B images, C channels, H rows, W columns, g rows and columns of a grid, N = g * g, D length of a vector.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.nn.relations import resized

HIDDEN = 64
"""Units between a channel's places and its one number."""
STRIDE_PX = 8
"""Of the autoencoder's coarsest map; the sides of its images are multiples of it."""


class AlignmentNet(nn.Module):
    """MSAN: an encoder from a map to a vector, and a header from such a vector to a map. Both compute in float32 at least.

    All channels share one perceptron over their places: one number a channel. Where C is not D, a linear layer makes D of the C
    numbers, and another one C of D.

    Args:
        channels: C, of the map.
        grid: g: maps of other sides are averaged to g x g first, and resized back (bilinear) last.
        length: D, of the vector.
    """

    def __init__(self, channels: int, grid: int, length: int) -> None:
        super().__init__()
        self.grid, places, differ = grid, grid * grid, channels != length
        self.encoder = nn.Sequential(nn.Linear(places, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))
        self.lengthen: nn.Module = nn.Linear(channels, length) if differ else nn.Identity()
        self.shorten: nn.Module = nn.Linear(length, channels) if differ else nn.Identity()
        self.header = nn.Sequential(nn.Linear(1, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, places))
        self.norm = nn.BatchNorm2d(channels)

    def encode(self, maps_BCHW: Tensor) -> Tensor:
        """E: [B, C, H, W] to z, [B, D]."""
        with torch.autocast(maps_BCHW.device.type, enabled=False):
            flat_BCN = resized(maps_BCHW.to(self.norm.weight.dtype), [self.grid, self.grid]).flatten(2)
            z: Tensor = self.lengthen(self.encoder(flat_BCN).squeeze(2))
        return z

    def decode(self, vectors_BD: Tensor, size: tuple[int, int]) -> Tensor:
        """H: [B, D] to [B, C, H, W].

        Args:
            vectors_BD: Of this net's encoder or of another's.
            size: H and W.
        """
        with torch.autocast(vectors_BD.device.type, enabled=False):
            flat_BCN = self.header(self.shorten(vectors_BD)[..., None])
            maps: Tensor = self.norm(flat_BCN.unflatten(2, (self.grid, self.grid)))
            return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)

    def forward(self, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The vector [B, D], and the map that it is decoded to, [B, C, H, W]."""
        z = self.encode(maps_BCHW)
        return z, self.decode(z, (maps_BCHW.shape[2], maps_BCHW.shape[3]))


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions, one with holes, that every channel weighs by what the whole map is like.

    [B, Cin, H, W] to [B, Cout, H, W]. Differs from the paper: no batch norm where a map has become one number a channel, so that
    one image is enough to train on.

    Args:
        inputs: Cin.
        channels: Cout.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, channels, 3, padding=holes, dilation=holes, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
            )
            for holes in (1, 2)
        )
        squeezed = max(channels // 16, 32)
        self.choose = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, 2 * channels))

    def forward(self, maps: Tensor) -> Tensor:
        """The weighted sum of both branches."""
        both = torch.stack([branch(maps) for branch in self.branches], 1)
        weights = self.choose(both.sum(1).mean((2, 3))).unflatten(1, (2, -1)).softmax(1)
        return (both * weights[..., None, None]).sum(1)


class MaskAutoencoder(nn.Module):
    """P-SAE's backbone: masks [B, planes, H, W], sides multiples of 8, to their logits, without skip connections.

    Args:
        planes: Planes of a mask.
        width: Channels of the finest map; 64 is the published width, with 512 channels at the bottom.
    """

    def __init__(self, planes: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.channels = widths[-1]
        self.encoder = nn.Sequential()
        for index, (before, channels) in enumerate(pairwise([planes, *widths])):
            if index:
                self.encoder.append(nn.MaxPool2d(2))
            self.encoder.extend([SelectiveKernel(before, channels), SelectiveKernel(channels, channels)])
        self.decoder = nn.Sequential(
            *(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in reversed(list(pairwise(widths)))),
            nn.Dropout2d(0.5),
            nn.Conv2d(width, planes, 1),
        )

    def encode(self, masks: Tensor) -> Tensor:
        """The bottleneck, [B, 8 width, H / 8, W / 8]."""
        maps: Tensor = self.encoder(masks)
        return maps

    def decode(self, maps: Tensor) -> Tensor:
        """A bottleneck's logits, [B, planes, H, W]."""
        logits: Tensor = self.decoder(maps)
        return logits

    def forward(self, masks: Tensor) -> Tensor:
        """The logits of what it makes of the masks."""
        return self.decode(self.encode(masks))
