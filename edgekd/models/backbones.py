"""The trunks of segmenters, by name, and what their decoders are made of."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.initial import initialise
from edgekd.models.mobilenet_v2 import MobileNetV2Maps
from edgekd.models.resnet import DEPTHS, ResNet

MOBILE = "mobilenet_v2"
NAMES = (*(f"resnet{layers}" for layers in DEPTHS), MOBILE)
STAGES = {f"stage{number}": f"backbone.stage{number}" for number in (1, 2, 3, 4)}
"""Role -> module path, in a model that has a ``backbone``."""


def build(name: str, in_channels: int, width: float, output_stride: int) -> ResNet | MobileNetV2Maps:
    """A network from images to four maps, with first weights.

    Args:
        name: One of :data:`NAMES`.
        in_channels: Channels of the images.
        width: Multiplier of all channels; 1.0 is the published one.
        output_stride: Of the coarsest map: 8 or 16, with ResNets also 32.

    Raises:
        ValueError: An argument is out of range.
    """
    if name not in NAMES:
        raise ValueError(f"backbone must be one of {', '.join(NAMES)}; received {name!r}")
    if not 0 < width <= 8:
        raise ValueError(f"width must be above 0 and at most 8; received {width}")
    found: ResNet | MobileNetV2Maps = (
        MobileNetV2Maps(in_channels, width, output_stride)
        if name == MOBILE
        else ResNet(in_channels, int(name.removeprefix("resnet")), max(1, round(64 * width)), output_stride)
    )
    initialise(found)
    return found


def conv_norm_act(in_channels: int, channels: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: [B, Cin, H, W] to [B, C, H, W]."""
    conv = nn.Conv2d(in_channels, channels, kernel, 1, kernel // 2 * dilation, dilation, groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels), act=nn.ReLU()))


def enlarged(maps: Tensor, other: Tensor) -> Tensor:
    """Resized to another's sides, bilinearly."""
    return F.interpolate(maps, size=other.shape[-2:], mode="bilinear", align_corners=False)
