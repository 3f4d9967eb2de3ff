"""DeepLabV3+: dilated convolutions at several rates over a coarse map, and a decoder that adds a fine one.

Chen, Zhu, Papandreou, Schroff, Adam: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation. ECCV
2018, arXiv 1802.02611.

Differs from the paper: logits are enlarged to the image's sides (bilinear), as it does before the loss; backbones are ResNets and
MobileNetV2 and not Xception.

Shape letters: B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models import backbones
from edgekd.models.backbones import MOBILE, conv_norm_act, enlarged
from edgekd.models.initial import initialise

FINE = 48
"""Channels of the fine map, where the decoder has 256; as many of any other decoder."""
PUBLISHED = 256
TAPS = backbones.STAGES | {"bottom": "backbone.stage4", "pyramid": "pyramid", "top": "head@input", "head": "head"}
"""Role -> module path: the backbone's maps, the last at all rates, what the classifier reads (behind dropout), its scores."""


def _convolution(in_channels: int, channels: int, dilation: int, separable: bool) -> nn.Module:
    """3x3, or a depthwise 3x3 and a 1x1 behind it, each with batch norm and ReLU."""
    if not separable:
        return conv_norm_act(in_channels, channels, 3, dilation)
    depthwise = conv_norm_act(in_channels, in_channels, 3, dilation, groups=in_channels)
    return nn.Sequential(depthwise, conv_norm_act(in_channels, channels))


class AtrousPyramid(nn.Module):
    """One place, its surroundings at several rates, and the mean of the whole map: [B, C, H, W] to [B, D, H, W].

    Args:
        in_channels: C.
        channels: D.
        rates: Dilations of the 3x3 convolutions.
        separable: Whether these are depthwise ones with a 1x1 convolution behind.
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], separable: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_norm_act(in_channels, channels), *(_convolution(in_channels, channels, rate, separable) for rate in rates)]
        )
        # no batch norm: it would have one value an image, and no running mean fits a batch of two
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, channels, 1), nn.ReLU())
        self.fuse = conv_norm_act((2 + len(rates)) * channels, channels)
        self.dropout = nn.Dropout(0.1)

    def forward(self, maps: Tensor) -> Tensor:
        """The fused map."""
        everywhere = F.interpolate(self.mean(maps), size=maps.shape[-2:], mode="nearest")
        out: Tensor = self.dropout(self.fuse(torch.cat([*(branch(maps) for branch in self.branches), everywhere], 1)))
        return out


class DeepLabV3Plus(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, K, H, W].

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        backbone: One of :data:`edgekd.models.backbones.NAMES`.
        width: Multiplier of the backbone's channels.
        output_stride: Of the coarse map: 16 or 8, with ResNets also 32.
        decoder: D, channels of the decoder.
        separable: Depthwise separable convolutions at all rates and in the decoder.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, num_classes: int, in_channels: int, backbone: str, width: float, output_stride: int, decoder: int, separable: bool
    ) -> None:
        super().__init__()
        if decoder < 1:
            raise ValueError(f"decoder must be at least 1; received {decoder}")
        self.backbone = backbones.build(backbone, in_channels, width, output_stride)
        self.finest = 1 if backbone == MOBILE else 0
        """Which of the backbone's maps has stride 4."""
        rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
        fine = fine_channels(decoder)
        self.pyramid = AtrousPyramid(self.backbone.channels[-1], decoder, rates, separable)
        self.fine = conv_norm_act(self.backbone.channels[self.finest], fine)
        self.decoder = nn.Sequential(
            _convolution(decoder + fine, decoder, 1, separable), _convolution(decoder, decoder, 1, separable)
        )
        self.dropout, self.head = nn.Dropout(0.1), nn.Conv2d(decoder, num_classes, 1)
        for part in (self.pyramid, self.fine, self.decoder, self.head):
            initialise(part)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        maps = self.backbone(images)
        fine = self.fine(maps[self.finest])
        coarse = enlarged(self.pyramid(maps[-1]), fine)
        logits = self.head(self.dropout(self.decoder(torch.cat([coarse, fine], 1))))
        return enlarged(logits, images)


def fine_channels(decoder: int) -> int:
    """Channels of the fine map that the decoder adds."""
    return max(1, FINE * decoder // PUBLISHED)


def deeplabv3plus(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet50",
    width: float = 1.0,
    output_stride: int = 16,
    decoder: int = PUBLISHED,
    separable: bool = True,
) -> DeepLabV3Plus:
    """The published decoder; with ``backbone: mobilenet_v2`` it is a student."""
    return DeepLabV3Plus(num_classes, in_channels, backbone, width, output_stride, decoder, separable)
