"""MobileNetV3-Large without its classifier: maps of strides 4, 8, 16 and 32 for networks that draw.

Howard et al.: Searching for MobileNetV3. ICCV 2019, arXiv 1905.02244, table 1. As in KD-SCFNet: the gate of the squeeze and
excitation is clip(0.2 u + 0.5, 0, 1), the first unit has its expansion (by 1) too, and there is no last 1 x 1 convolution.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

SLOPE = 0.2
"""Of the gate; torch's hard sigmoid has 1/6."""

Row = tuple[int, int, int, bool, bool, int]
STAGES: tuple[tuple[Row, ...], ...] = (
    ((3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1)),
    ((5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1)),
    (
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
    ),
    ((5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
)
"""Per stage, rows of: kernel, expanded channels, channels, squeeze and excitation, hard-swish in place of ReLU, stride."""


def divisible(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not below nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class SqueezeExcitation(nn.Module):
    """Every channel times a gate that all channels' means decide: [B, C, H, W], same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.act = nn.Conv2d(channels, channels // 4, 1), nn.ReLU()
        self.excite, self.gate = nn.Conv2d(channels // 4, channels, 1), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """The gated maps."""
        logits: Tensor = self.excite(self.act(self.squeeze(self.pool(x))))
        return x * self.gate(6 * SLOPE * logits)


class Unit(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze and excitation where wanted, 1x1 linear projection.

    [B, Cin, H, W] to [B, Cout, H / stride, W / stride].
    """

    def __init__(self, in_channels: int, width: float, row: Row) -> None:
        super().__init__()
        kernel, expanded, out, excites, swishes, stride = row
        hidden, channels, act = divisible(expanded * width), divisible(out * width), nn.Hardswish if swishes else nn.ReLU
        self.expand = _block(in_channels, hidden, 1, act=act)
        self.depthwise = _block(hidden, hidden, kernel, stride=stride, groups=hidden, act=act)
        self.excitation = SqueezeExcitation(hidden) if excites else nn.Identity()
        self.project = _block(hidden, channels, 1, act=None)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """The unit's result."""
        out: Tensor = self.project(self.excitation(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


class MobileNetV3(nn.Module):
    """Images [B, in_channels, H, W] to four maps, the finest first, of strides 4, 8, 16 and 32.

    Args:
        in_channels: Channels of the images.
        width: Multiplier of all channels, above 0; 1.0 is the published one.

    Raises:
        ValueError: ``width`` is out of range.
    """

    def __init__(self, in_channels: int, width: float = 1.0) -> None:
        super().__init__()
        if not 0 < width <= 8:
            raise ValueError(f"width must be above 0 and at most 8; received {width}")
        channels = divisible(16 * width)
        self.stem = _block(in_channels, channels, 3, stride=2, act=nn.Hardswish)
        stages, widths = [], []
        for rows in STAGES:
            units = []
            for row in rows:
                units.append(Unit(channels, width, row))
                channels = divisible(row[2] * width)
            stages.append(nn.Sequential(*units))
            widths.append(channels)
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.channels = tuple(widths)
        """Of the four maps."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four maps."""
        one = self.stage1(self.stem(images))
        two = self.stage2(one)
        three = self.stage3(two)
        return one, two, three, self.stage4(three)


def _block(
    in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None
) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts["norm"] = nn.BatchNorm2d(channels)
    if act is not None:
        parts["act"] = act()
    return nn.Sequential(parts)
