"""SCFNet: a small network that draws what stands out, its maps fused under the guidance of the deepest one.

Zhang, Liang, Shi: KD-SCFNet: Towards More Accurate and Efficient Salient Object Detection via Knowledge Distillation. arXiv
2208.02178; zhangjinCV/KD-SCFNet. Written from the specification. With MobileNetV3-Large x 0.5 and 16 channels it has the
published 788,298 parameters; the published teacher has ResNet-50 and 64 channels.

As in the official code: the finer map is multiplied by the fused map before it. The paper's figure has the deepest map there:
``low_guide: deep``. Differs from the official code: in evaluation mode the three side outputs are not computed, and the backbone
starts from random weights where no file is given.

Shape letters: B images, D channels of the decoder, H rows, W columns.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from edgekd.models.backbones import enlarged
from edgekd.models.initial import initialise
from edgekd.models.mobilenet_v3 import MobileNetV3
from edgekd.models.resnet import DEPTHS, ResNet

MOBILE = "mobilenet_v3"
BACKBONES = (MOBILE, *(f"resnet{layers}" for layers in DEPTHS))
MAPS = 4
TAPS = (
    {f"stage{number}": f"backbone.stage{number}" for number in (1, 2, 3, 4)}
    | {"fused1": "fusions.2", "fused2": "fusions.1", "fused3": "fusions.0", "context": "context"}
    | {"head": "heads.0"}
)
"""Role -> module path: the backbone's maps, the decoder's of the same strides, and the prediction before it is enlarged."""


class ConvNormAct(nn.Sequential):
    """3x3 convolution with a bias, batch norm, ReLU: [B, Cin, H, W] to [B, Cout, H, W]."""

    def __init__(self, in_channels: int, channels: int, dilation: int = 1) -> None:
        conv = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation)
        super().__init__(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels), act=nn.ReLU()))


class Fusion(nn.Module):
    """Semantics-guided contextual fusion of two maps, with D channels each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coarse, self.fine, self.both = (ConvNormAct(channels, channels) for _ in range(3))

    def forward(self, low: Tensor, high: Tensor, guide: Tensor, low_guide: Tensor) -> Tensor:
        """Fuse a finer map with a coarser one.

        Args:
            low: [B, D, H, W].
            high: [B, D, H', W'], coarser.
            guide: By which ``high`` is multiplied, of its shape.
            low_guide: By which ``low`` is multiplied, of its shape.

        Returns:
            [B, D, H, W].
        """
        coarse = self.coarse(high + high * guide)
        fine = self.fine(low + low * low_guide)
        out: Tensor = self.both(fine + enlarged(coarse, low))
        return out


class SCFNet(nn.Module):
    """Images [B, in_channels, H, W] to logits of what stands out.

    Sides that are multiples of 32 keep all maps aligned; any others work. Training gives [B, 4, H, W], the prediction and three
    side outputs from coarser and coarser maps; evaluation [B, 1, H, W], the prediction alone.

    Args:
        in_channels: Channels of the images.
        backbone: One of :data:`BACKBONES`.
        width: Multiplier of the backbone's channels; 1.0 is the published net.
        channels: D.
        low_guide: What a finer map is multiplied by: the fused map before it (the code), or the deepest map (the figure).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, in_channels: int, backbone: str, width: float, channels: int, low_guide: Literal["previous", "deep"]
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}; received {backbone!r}")
        if channels < 1 or low_guide not in ("previous", "deep"):
            raise ValueError(f"channels must be at least 1, low_guide previous or deep; received {channels}, {low_guide!r}")
        self.backbone = (
            MobileNetV3(in_channels, width)
            if backbone == MOBILE
            else ResNet(in_channels, int(backbone.removeprefix("resnet")), round(64 * width))
        )
        initialise(self.backbone)
        self.deep = low_guide == "deep"
        self.adapters = nn.ModuleList(ConvNormAct(before, channels) for before in self.backbone.channels)
        self.context = ConvNormAct(channels, channels, dilation=5)
        self.fusions = nn.ModuleList(Fusion(channels) for _ in range(MAPS - 1))
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for _ in range(MAPS))
        for part in (self.adapters, self.context, self.fusions, self.heads):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # every one has a bias

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        maps = [adapt(found) for adapt, found in zip(self.adapters, self.backbone(images), strict=True)]
        deepest = self.context(maps.pop())
        fused = [deepest]
        for number, fuse in enumerate(self.fusions):
            low, high = maps.pop(), fused[-1]
            guide = enlarged(deepest, high) if number else deepest
            fused.append(fuse(low, high, guide, enlarged(deepest if self.deep else high, low)))
        fused.reverse()
        drawn = MAPS if self.training else 1
        logits = [enlarged(head(found), images) for head, found in zip(self.heads[:drawn], fused[:drawn], strict=True)]
        return torch.cat(logits, 1) if self.training else logits[0]


def scfnet(
    *,
    num_classes: int,  # noqa: ARG001  one map, whatever stands out
    in_channels: int,
    backbone: str = MOBILE,
    width: float = 0.5,
    channels: int = 16,
    low_guide: Literal["previous", "deep"] = "previous",
) -> SCFNet:
    """The published student; its teacher is ``backbone: resnet50, width: 1.0, channels: 64``."""
    return SCFNet(in_channels, backbone, width, channels, low_guide)


def fixed_channels(model: nn.Module) -> list[nn.Module]:
    """The layers that side outputs read: no one sees those in evaluation mode, so pruning would not narrow them too."""
    if not isinstance(model, SCFNet):
        return []
    return [model.context.conv, *(fusion.both.conv for fusion in model.fusions)]  # type: ignore[union-attr,list-item]
