"""PSPNet: every place sees averages over the whole image and over its parts.

Zhao, Shi, Qi, Wang, Jia: Pyramid Scene Parsing Network. CVPR 2017, arXiv 1612.01105.

Differs from the paper: logits are enlarged to the image's sides (bilinear), as it does before the loss; there is no auxiliary
classifier behind stage 3; the backbone's stem is the ResNet's own 7 x 7 convolution, which torchvision's weights fit.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models import backbones
from edgekd.models.backbones import conv_norm_act, enlarged
from edgekd.models.initial import initialise

TAPS = backbones.STAGES | {"bottom": "backbone.stage4", "pyramid": "pyramid", "top": "head@input", "head": "head"}
"""Role -> module path: the backbone's maps, the last with its averages, what the classifier reads (behind dropout), scores."""


class Pyramid(nn.Module):
    """A map, and behind it its averages over coarse grids, each enlarged to the map's sides.

    [B, C, H, W] to [B, C + grids * (C / grids), H, W].

    Args:
        channels: C.
        grids: Cells along a side.
    """

    def __init__(self, channels: int, grids: Sequence[int]) -> None:
        super().__init__()
        self.each = max(1, channels // len(grids))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(grid), conv_norm_act(channels, self.each)) for grid in grids
        )

    def forward(self, maps: Tensor) -> Tensor:
        """The map and its averages."""
        size = maps.shape[-2:]
        far = [F.interpolate(branch(maps), size=size, mode="bilinear", align_corners=False) for branch in self.branches]
        return torch.cat([maps, *far], 1)


class PSPNet(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, K, H, W].

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        backbone: One of :data:`edgekd.models.backbones.NAMES`.
        width: Multiplier of the backbone's channels.
        output_stride: Of the map that is pooled: 8 (published) or 16, with ResNets also 32.
        decoder: Channels of what the classifier reads.
        grids: Cells along a side of each grid of averages.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        backbone: str,
        width: float,
        output_stride: int,
        decoder: int,
        grids: Sequence[int],
    ) -> None:
        super().__init__()
        if decoder < 1 or not grids or min(grids) < 1:
            raise ValueError(f"decoder and grids must be at least 1; received {decoder} and {list(grids)}")
        self.backbone = backbones.build(backbone, in_channels, width, output_stride)
        channels = self.backbone.channels[-1]
        self.pyramid = Pyramid(channels, grids)
        self.fuse = conv_norm_act(channels + len(grids) * self.pyramid.each, decoder, 3)
        self.dropout, self.head = nn.Dropout2d(0.1), nn.Conv2d(decoder, num_classes, 1)
        for part in (self.pyramid, self.fuse, self.head):
            initialise(part)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits = self.head(self.dropout(self.fuse(self.pyramid(self.backbone(images)[-1]))))
        return enlarged(logits, images)


def pspnet(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet18",
    width: float = 1.0,
    output_stride: int = 8,
    decoder: int = 128,
    grids: Sequence[int] = (1, 2, 3, 6),
) -> PSPNet:
    """The usual student of the distillation literature; its teacher is ``backbone: resnet101, decoder: 512``."""
    return PSPNet(num_classes, in_channels, backbone, width, output_stride, decoder, grids)
