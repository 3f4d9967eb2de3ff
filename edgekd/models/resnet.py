"""ResNets for large images without their classifier: maps of strides 4, 8, 16 and 32 for networks that draw.

He et al.: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv 1512.03385, table 1; with the stride of a bottleneck in
its 3 x 3 convolution, as everybody has it.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

DEPTHS: dict[int, tuple[int, int, int, int]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Layers -> blocks of each stage; with 50, blocks are bottlenecks."""
BOTTLENECKS, EXPANSION = (50,), 4


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck, and what went in, added.

    [B, Cin, H, W] to [B, C, H / stride, W / stride], C four times ``channels`` in a bottleneck.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            rows = [(in_channels, channels, 1, 1), (channels, channels, 3, stride), (channels, EXPANSION * channels, 1, 1)]
        else:
            rows = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (before, after, kernel, step) in enumerate(rows, 1):
            parts[f"conv{number}"] = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False)
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
    """Images [B, in_channels, H, W] to four maps, the finest first, of strides 4, 8, 16 and 32.

    Args:
        in_channels: Channels of the images.
        layers: 18, 34 or 50.
        width: Channels of the first convolution, doubled at every stage; 64 is the published number.

    Raises:
        ValueError: There is no such net.
    """

    def __init__(self, in_channels: int, layers: int = 50, width: int = 64) -> None:
        super().__init__()
        if layers not in DEPTHS or width < 1:
            raise ValueError(f"layers must be one of {', '.join(map(str, DEPTHS))}, width at least 1; received {layers}, {width}")
        bottleneck = layers in BOTTLENECKS
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        stages, channels, widths = [], width, []
        for number, blocks in enumerate(DEPTHS[layers]):
            inner = width * 2**number
            out = inner * (EXPANSION if bottleneck else 1)
            steps = [1 if number == 0 else 2] + [1] * (blocks - 1)
            stages.append(
                nn.Sequential(*(Block(channels if i == 0 else out, inner, step, bottleneck) for i, step in enumerate(steps)))
            )
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
