"""FANet: a real-time segmenter whose every scale looks at the whole image, at a cost linear in its places.

Hu, Perazzi, Heilbron, Wang, Lin, Saenko, Sclaroff: Real-Time Semantic Segmentation With Fast Attention. IEEE RA-L 2021, arXiv
2007.03815. Written from the paper. (The teacher that Graph Flow calls FANet is another network.)

Differs from the paper: no further reduction of the finest map, which is for videos of 1024 x 2048; the fused maps are enlarged by
their nearest values, which every engine moves as integers; ``width`` scales all channels but the keys'.

Shape letters: B images, C channels, N places, H rows, W columns, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.initial import initialise
from edgekd.models.resnet import ResNet

SCALES = 4
TAPS = (
    {f"stage{number}": f"backbone.stage{number}" for number in range(1, SCALES + 1)}
    | {f"attention{number}": f"attentions.{number - 1}" for number in range(1, SCALES + 1)}
    | {"bottom": "attentions.3", "top": "smooth.0", "head": "head"}
)
"""Role -> module path: the backbone's maps; what attention made of them; the coarsest of those, and the finest fused map."""


class FastAttention(nn.Module):
    """Adds to every place what it finds at the others: [B, C, H, W] to the same shape.

    Y = Q (K^T V) / N with queries and keys of length 1: without a softmax K^T V, [keys, C], is computed first.

    Args:
        channels: C.
        keys: Channels of queries and keys.
    """

    def __init__(self, channels: int, keys: int) -> None:
        super().__init__()
        self.query, self.key = (_conv_norm(channels, keys, 1, act=False) for _ in range(2))
        self.value = _conv_norm(channels, channels, 1)
        self.mix = _conv_norm(channels, channels, 1, act=False)
        self.act = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """The map with what was found."""
        query_BKN, key_BKN = (F.normalize(part(maps).flatten(2), dim=1, eps=1e-6) for part in (self.query, self.key))
        value_BCN = self.value(maps).flatten(2)
        context_BCK = value_BCN @ key_BKN.transpose(1, 2) / value_BCN.shape[2]
        found: Tensor = self.mix((context_BCK @ query_BKN).view(maps.shape))
        out: Tensor = self.act(maps + found)
        return out


class FANet(nn.Module):
    """Images [B, in_channels, H, W], sides multiples of 16, to logits [B, K, H, W].

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        width: Channels of the backbone's finest map, doubled at every stage; 64 is the published number.
        layers: Of the backbone: 18, 34 or 50.
        keys: Channels of queries and keys.

    Raises:
        ValueError: There is no such backbone, or no key.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, layers: int, keys: int) -> None:
        super().__init__()
        if keys < 1:
            raise ValueError(f"keys must be at least 1; received {keys}")
        self.backbone = ResNet(in_channels, layers, width)
        fused = 2 * width
        self.attentions = nn.ModuleList(FastAttention(channels, keys) for channels in self.backbone.channels)
        self.lateral = nn.ModuleList(_conv_norm(channels, fused, 1) for channels in self.backbone.channels)
        self.smooth = nn.ModuleList(_conv_norm(fused, fused, 3) for _ in range(SCALES))
        self.head = nn.Conv2d(fused, num_classes, 1)
        self.enlarge = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        maps = [attend(found) for attend, found in zip(self.attentions, self.backbone(images), strict=True)]
        x = self.smooth[-1](self.lateral[-1](maps[-1]))
        for index in reversed(range(SCALES - 1)):
            fine = self.lateral[index](maps[index])
            x = self.smooth[index](fine + F.interpolate(x, size=fine.shape[2:], mode="nearest"))
        logits: Tensor = self.enlarge(self.head(x))
        return logits


def _conv_norm(in_channels: int, channels: int, kernel: int, *, act: bool = True) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False), norm=nn.BatchNorm2d(channels)
    )
    if act:
        parts["act"] = nn.ReLU()
    return nn.Sequential(parts)


def fanet(*, num_classes: int, in_channels: int, width: int = 64, layers: int = 18, keys: int = 32) -> FANet:
    """FANet-18, as published; ``layers: 34`` is the larger one."""
    return FANet(num_classes, in_channels, width, layers, keys)
