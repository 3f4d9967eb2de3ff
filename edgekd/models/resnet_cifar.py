"""ResNets for small images: a 3x3 stem at full resolution and three stages of basic blocks.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385, section 4.2 (depth = 6n + 2). Written from
the paper, with two habits of the distillation literature, so that results compare: where the shape changes, the shortcut is a 1x1
convolution (option B), and the "x4" models have four times the channels (32 in the stem, then 64, 128, 256; Tian et al.,
Contrastive Representation Distillation, ICLR 2020, arXiv 1910.10699, appendix).
"""

from torch import Tensor, nn

from edgekd.models.initial import initialise

TAPS = {"stem": "stem", "stage1": "stage1", "stage2": "stage2", "stage3": "stage3", "pool": "flatten", "logits": "fc"}
"""Role -> module path. A stage ends with its last block's ReLU."""

NARROW = (16, 16, 32, 64)
"""Channels of the stem and of the three stages."""
TIMES_4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [B, Cin, H, W] to [B, Cout, H/stride, W/stride].

    Every ReLU here and in the other families is its own module (a quantizer belongs to one place in the graph) and works out of
    place (a tap may read its input).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H/stride, W/stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class ResNet(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        depth: Layers with weights on the longest path: 6n + 2 for n blocks per stage.
        channels: Of the stem and of the three stages, before ``width``.
        num_classes: Length of the logits.
        in_channels: Channels of the images.
        width: Multiplier of all channels, above 0.
    """

    def __init__(
        self, depth: int, channels: tuple[int, int, int, int], *, num_classes: int, in_channels: int, width: float
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        stem, first, second, third = (max(1, round(count * width)) for count in channels)
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.stage1 = _stage(blocks, stem, first, stride=1)
        self.stage2 = _stage(blocks, first, second, stride=2)
        self.stage3 = _stage(blocks, second, third, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(third, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, num_classes]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.flatten(self.pool(x)))


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet8(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """One block per stage, 16-32-64 channels."""
    return ResNet(8, NARROW, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet14(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Two blocks per stage, 16-32-64 channels."""
    return ResNet(14, NARROW, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet20(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Three blocks per stage, 16-32-64 channels."""
    return ResNet(20, NARROW, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet32(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Five blocks per stage, 16-32-64 channels."""
    return ResNet(32, NARROW, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet56(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Nine blocks per stage, 16-32-64 channels."""
    return ResNet(56, NARROW, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet8x4(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """One block per stage, 64-128-256 channels."""
    return ResNet(8, TIMES_4, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet32x4(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Five blocks per stage, 64-128-256 channels."""
    return ResNet(32, TIMES_4, num_classes=num_classes, in_channels=in_channels, width=width)
