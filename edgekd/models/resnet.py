"""ResNets for large images without their classifier: maps of strides 4, 8, 16 and 32 for networks that draw.

He et al.: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv 1512.03385, table 1; with the stride of a bottleneck in
its 3 x 3 convolution, as everybody has it. Stages may keep the resolution of the one before and dilate their convolutions: Chen
et al., Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv 1706.05587.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

DEPTHS: dict[int, tuple[int, int, int, int]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Layers -> blocks of each stage; from 50 on, blocks are bottlenecks."""
BOTTLENECKS, EXPANSION = (50, 101), 4
OUTPUT_STRIDES = (8, 16, 32)
TORCHVISION = {
    r"conv1\.": "stem.0.",
    r"bn1\.": "stem.1.",
    r"layer(\d)\.(\d+)\.conv": r"stage\1.\2.body.conv",
    r"layer(\d)\.(\d+)\.bn": r"stage\1.\2.body.norm",
    r"layer(\d)\.(\d+)\.downsample\.": r"stage\1.\2.short.",
}
"""How its names begin, and how ours do."""


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck, and what went in, added.

    [B, Cin, H, W] to [B, C, H / stride, W / stride], C four times ``channels`` in a bottleneck. ``dilations`` are those of the
    3x3 convolution with the stride and of the one behind it.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, bottleneck: bool, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        if bottleneck:
            rows = [(in_channels, channels, 1, 1), (channels, channels, 3, stride), (channels, EXPANSION * channels, 1, 1)]
        else:
            rows = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (before, after, kernel, step) in enumerate(rows, 1):
            spread = 1 if kernel == 1 else dilations[0 if bottleneck or number == 1 else 1]
            parts[f"conv{number}"] = nn.Conv2d(before, after, kernel, step, kernel // 2 * spread, spread, bias=False)
            parts[f"norm{number}"] = nn.BatchNorm2d(after)
            if number < len(rows):
                parts[f"act{number}"] = nn.ReLU()
        self.body = nn.Sequential(parts)
        out = rows[-1][1]
        short: list[nn.Module] = []
        if stride > 1 or in_channels != out:
            short = [nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.short = nn.Sequential(*short)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The block's result."""
        out: Tensor = self.act(self.body(x) + self.short(x))
        return out


class ResNet(nn.Module):
    """Images [B, in_channels, H, W] to four maps, the finest first, of strides 4, 8, 16 and 32, none above ``output_stride``.

    Args:
        in_channels: Channels of the images.
        layers: 18, 34, 50 or 101.
        width: Channels of the first convolution, doubled at every stage; 64 is the published number.
        output_stride: Of the last map: 32, or 16 or 8, behind which convolutions dilate instead; what they compute at the
            coarser grid's places stays the same.

    Raises:
        ValueError: There is no such net.
    """

    def __init__(self, in_channels: int, layers: int = 50, width: int = 64, output_stride: int = 32) -> None:
        super().__init__()
        if layers not in DEPTHS or width < 1:
            raise ValueError(f"layers must be one of {', '.join(map(str, DEPTHS))}, width at least 1; received {layers}, {width}")
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {', '.join(map(str, OUTPUT_STRIDES))}; received {output_stride}")
        bottleneck = layers in BOTTLENECKS
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        stages, channels, widths, dilation = [], width, [], 1
        for number, blocks in enumerate(DEPTHS[layers]):
            inner = width * 2**number
            out = inner * (EXPANSION if bottleneck else 1)
            finer = 2 ** (number + 2) > output_stride
            before, dilation = dilation, dilation * (2 if finer else 1)
            first = Block(channels, inner, 1 if number == 0 or finer else 2, bottleneck, (before, dilation))
            rest = (Block(out, inner, 1, bottleneck, (dilation, dilation)) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
            channels = out
            widths.append(out)
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.channels = tuple(widths)
        """Of the four maps."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four maps."""
        one = self.stage1(self.stem(images))
        two = self.stage2(one)
        three = self.stage3(two)
        return one, two, three, self.stage4(three)

    @staticmethod
    def from_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of torchvision's ResNet of as many layers, by the names that they have here; without its classifier's."""
        return {_own_name(name): value for name, value in state.items() if not name.startswith("fc.")}


def _own_name(name: str) -> str:
    for theirs, ours in TORCHVISION.items():
        if found := re.match(theirs, name):
            return found.expand(ours) + name[found.end() :]
    return name
