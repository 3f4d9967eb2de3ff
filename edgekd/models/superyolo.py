"""SuperYOLO's detector without its Focus layer: YOLOv5-s with ReLU, whose first convolution keeps the full resolution.

Zhang et al.: SuperYOLO: Super Resolution Assisted Object Detection in Multimodal Remote Sensing Imagery. IEEE TGRS 2023, arXiv
2209.13351; in the form of GHOST (IEEE TGRS 2023, arXiv 2301.00131; icey-zhang/GHOST). Strides are 4, 8 and 16. Every convolution
is Conv (no bias), BatchNorm, ReLU. The small net, for images of small objects, ends after block 17 and has one head.

Differs from the official code: ``width`` and ``depth`` scale the net down, 1.0 being the published one; the super-resolution
branch of the first training phase is not here.

Shape letters: B images, A anchors of a head, O = 5 + classes, H rows, W columns.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

FULL_BLOCKS, SMALL_BLOCKS = 24, 18
ANCHORS = 3
"""Boxes that each cell of a head predicts."""
STRIDES: dict[str, tuple[int, ...]] = {"superyolo": (4, 8, 16), "superyolo_small": (4,)}
"""Model -> pixels per cell of each head, the finest first."""

_BLOCKS = {f"block{index}": f"blocks.{index}" for index in range(FULL_BLOCKS)}
_STAGES = {"stage1": "blocks.2", "stage2": "blocks.4", "stage3": "blocks.6", "stage4": "blocks.9"}
TAPS = {**_STAGES, **_BLOCKS, "head0": "heads.0", "head1": "heads.1", "head2": "heads.2"}
"""Role -> module path: every block of the published numbering, the backbone's stages, and the raw maps of the heads."""
SMALL_TAPS = {
    **_STAGES,
    **{role: path for role, path in _BLOCKS.items() if int(role.removeprefix("block")) < SMALL_BLOCKS},
    "head0": "heads.0",
}


class Conv(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU: [B, Cin, H, W] to [B, Cout, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1) -> None:
        conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
        norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)
        super().__init__(OrderedDict(conv=conv, norm=norm, act=nn.ReLU()))


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution, with the input added where ``shortcut`` is set."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels, 1), Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], same shape."""
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C3(nn.Module):
    """Cross-stage partial block: cv3(concat(bottlenecks(cv1(x)), cv2(x)))."""

    def __init__(self, in_channels: int, channels: int, repetitions: int, shortcut: bool) -> None:
        super().__init__()
        hidden = channels // 2
        # in the published order: the bits of a plan are listed so
        self.cv1, self.cv2 = Conv(in_channels, hidden, 1), Conv(in_channels, hidden, 1)
        self.cv3 = Conv(2 * hidden, channels, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut) for _ in range(repetitions)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H, W]."""
        out: Tensor = self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))
        return out


class SPP(nn.Module):
    """Spatial pyramid pooling: max pools of 5, 9 and 13 pixels beside the map itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.cv1, self.cv2 = Conv(channels, hidden, 1), Conv(4 * hidden, channels, 1)
        self.pools = nn.ModuleList([nn.MaxPool2d(size, 1, size // 2) for size in (5, 9, 13)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], same shape."""
        x = self.cv1(x)
        out: Tensor = self.cv2(torch.cat([x, *(pool(x) for pool in self.pools)], 1))
        return out


class Concat(nn.Module):
    """Joins two maps along the channels, so that the result has a module path."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """[B, C1, H, W] and [B, C2, H, W] to [B, C1 + C2, H, W]."""
        return torch.cat([one, other], 1)


class SuperYOLO(nn.Module):
    """Images [B, in_channels, H, W], sides multiples of 16, to raw predictions [B, P, 5 + num_classes].

    P counts anchors: heads from the finest stride on, in a head by anchor, row and column. A prediction is (x, y, width, height,
    objectness, classes), all before the sigmoid (edgekd.tasks.detection).

    Args:
        heads: 3, or 1 for the small net.
        num_classes: Classes of objects.
        in_channels: Channels of the images.
        width: Multiplier of all channels, which become multiples of 8.
        depth: Multiplier of the repetitions of every C3, at least one.

    Raises:
        ValueError: ``width`` or ``depth`` is not above 0.
    """

    def __init__(self, heads: int, *, num_classes: int, in_channels: int, width: float, depth: float) -> None:
        super().__init__()
        if not width > 0 or not depth > 0:
            raise ValueError(f"width and depth must be above 0, got {width} and {depth}")

        def wide(channels: int) -> int:
            return max(8, math.ceil(channels * width / 8) * 8)

        c32, c64, c128, c256, c512 = map(wide, (32, 64, 128, 256, 512))
        once, thrice = (max(1, round(repetitions * depth)) for repetitions in (1, 3))
        blocks: list[nn.Module] = [
            Conv(in_channels, c32, 3),
            Conv(c32, c64, 3, 2),
            C3(c64, c64, once, True),
            Conv(c64, c128, 3, 2),
            C3(c128, c128, thrice, True),
            Conv(c128, c256, 3, 2),
            C3(c256, c256, thrice, True),
            Conv(c256, c512, 3, 2),
            SPP(c512),
            C3(c512, c512, once, False),
            Conv(c512, c256, 1),
            nn.Upsample(scale_factor=2, mode="nearest"),
            Concat(),
            C3(2 * c256, c256, once, False),
            Conv(c256, c128, 1),
            nn.Upsample(scale_factor=2, mode="nearest"),
            Concat(),
            C3(2 * c128, c128, once, False),
        ]
        sources = [c128]
        if heads > 1:
            blocks += [
                Conv(c128, c128, 3, 2),
                Concat(),
                C3(2 * c128, c256, once, False),
                Conv(c256, c256, 3, 2),
                Concat(),
                C3(2 * c256, c512, once, False),
            ]
            sources += [c256, c512]
        self.blocks = nn.ModuleList(blocks)
        self.outputs = 5 + num_classes
        self.heads = nn.ModuleList([nn.Conv2d(channels, ANCHORS * self.outputs, 1) for channels in sources])
        for stride, head in zip(STRIDES["superyolo"], self.heads, strict=False):
            self._bias(head, stride, num_classes)

    @torch.no_grad()
    def _bias(self, head: nn.Module, stride: int, num_classes: int) -> None:
        """Begin with few objects per image of 640 pixels and equally likely classes, as YOLOv5 does.

        For K = 1 its formula, log(0.6 / (K - 0.99)), gives +4.1, so one class begins as two do: log(0.6 / 1.01) = -0.5. Neither
        the loss nor the decoder looks at the class of a detector that has one.
        """
        bias = head.get_parameter("bias").view(ANCHORS, self.outputs)
        bias[:, 4] += math.log(8 / (640 / stride) ** 2)
        bias[:, 5:] += math.log(0.6 / (max(num_classes, 2) - 0.99))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, P, 5 + num_classes]."""
        blocks = self.blocks
        for index in range(4):
            x = blocks[index](x)
        quarter = x = blocks[4](x)
        x = blocks[5](x)
        eighth = blocks[6](x)
        x = blocks[7](eighth)
        top = blocks[10](blocks[9](blocks[8](x)))
        middle = blocks[14](blocks[13](blocks[12](blocks[11](top), eighth)))
        maps = [blocks[17](blocks[16](blocks[15](middle), quarter))]
        if len(blocks) > SMALL_BLOCKS:
            maps.append(blocks[20](blocks[19](blocks[18](maps[0]), middle)))
            maps.append(blocks[23](blocks[22](blocks[21](maps[1]), top)))
        found = [self._rows(head(each)) for head, each in zip(self.heads, maps, strict=True)]
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    def _rows(self, raw: Tensor) -> Tensor:
        """[B, A * O, H, W] to [B, A * H * W, O]."""
        return raw.unflatten(1, (ANCHORS, self.outputs)).permute(0, 1, 3, 4, 2).flatten(1, 3)


def superyolo(*, num_classes: int, in_channels: int = 3, width: float = 1.0, depth: float = 1.0) -> SuperYOLO:
    """Three heads."""
    return SuperYOLO(3, num_classes=num_classes, in_channels=in_channels, width=width, depth=depth)


def superyolo_small(*, num_classes: int, in_channels: int = 3, width: float = 1.0, depth: float = 1.0) -> SuperYOLO:
    """One head, of stride 4."""
    return SuperYOLO(1, num_classes=num_classes, in_channels=in_channels, width=width, depth=depth)
