"""ShuffleNetV2 for small images: units that keep one half of the channels and transform the other.

Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018, arXiv 1807.11164, figure 3 (c, d)
and table 5. Written from the paper. For 32-pixel images the stem keeps the resolution and the first max-pooling is gone.

Differs in form, not in function, in the channel shuffle. The paper concatenates both halves, interleaves them by reshaping, and
splits down the middle. The order inside a half is free, so the same network comes out when the concatenation is split into its
even and its odd channels. That needs no reshape, which engines run as a copy with a change of layout.
"""

from torch import Tensor, cat, nn

from edgekd.models.initial import initialise

TAPS = {
    "stem": "stem",
    "stage1": "stage1",
    "stage2": "stage2",
    "stage3": "stage3",
    "pool": "flatten",
    "logits": "fc",
}
"""Role -> module path. Both halves of a stage's output end with a ReLU."""

CHANNELS = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024), 2.0: (244, 488, 976, 2048)}
"""Width -> channels of the three stages and of the last 1x1 convolution: the paper's table 5."""
UNITS = (4, 8, 4)


class Unit(nn.Module):
    """Keeps the even channels, transforms the odd ones: [B, C, H, W] to [B, C, H, W], C even."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        return cat((x[:, 0::2], self.branch(x[:, 1::2])), dim=1)


class DownUnit(nn.Module):
    """Transforms all channels in both branches and halves the resolution: [B, Cin, H, W] to [B, C, H/2, W/2], C even."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.shortcut = nn.Sequential(*_depthwise(in_channels, stride=2), *_pointwise(in_channels, half))
        self.branch = _branch(in_channels, half, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, C, H/2, W/2]."""
        return cat((self.shortcut(x), self.branch(x)), dim=1)


class ShuffleNetV2(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        num_classes: Length of the logits.
        in_channels: Channels of the images.
        width: One of the paper's four: 0.5, 1.0, 1.5 or 2.0.
    """

    def __init__(self, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        if width not in CHANNELS:
            raise ValueError(f"width must be one of {', '.join(map(str, CHANNELS))}, got {width}")
        first, second, third, last = CHANNELS[width]
        stem = 24
        self.stem = nn.Sequential(nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.stage1 = _stage(UNITS[0], stem, first)
        self.stage2 = _stage(UNITS[1], first, second)
        self.stage3 = _stage(UNITS[2], second, third)
        self.head = nn.Sequential(*_pointwise(third, last))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(last, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, num_classes]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.flatten(self.pool(self.head(x))))


def fixed_channels(model: nn.Module) -> list[nn.Module]:
    """The convolutions whose output channels pruning must leave alone: a unit tells its halves by the channels' positions."""
    units = [module for module in model.modules() if isinstance(module, Unit | DownUnit)]
    branches = [unit.branch for unit in units] + [unit.shortcut for unit in units if isinstance(unit, DownUnit)]
    return [[layer for layer in branch if isinstance(layer, nn.Conv2d)][-1] for branch in branches]


def _stage(units: int, in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, channels), *(Unit(channels) for _ in range(units - 1)))


def _branch(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_pointwise(in_channels, channels), *_depthwise(channels, stride), *_pointwise(channels, channels))


def _pointwise(in_channels: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


def shufflenetv2(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ShuffleNetV2:
    """The paper's table 5 with a stem for small images."""
    return ShuffleNetV2(num_classes=num_classes, in_channels=in_channels, width=width)
