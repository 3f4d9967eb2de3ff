"""Wide residual networks: pre-activation blocks, few layers, many channels.

Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, arXiv 1605.07146, table 1 (depth = 6n + 4, widening factor k). Written
from the paper, without dropout. As in the authors' networks, a block that changes the shape takes its 1x1 shortcut from the
activated input.
"""

from torch import Tensor, nn

from edgekd.models.initial import initialise

TAPS = {
    "stem": "stage1.0.relu1",
    "stage1": "stage2.0.relu1",
    "stage2": "stage3.0.relu1",
    "stage3": "relu",
    "pool": "flatten",
    "logits": "fc",
}
"""Role -> module path. Blocks are pre-activation: a stage's activated output is the first ReLU of the stage behind it."""


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, around a shortcut: [B, Cin, H, W] to [B, Cout, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.projection = None if same else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H/stride, W/stride]."""
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.projection is None else self.projection(active))


class WideResNet(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        depth: Layers with weights on the longest path: 6n + 4 for n blocks per stage.
        factor: The widening factor k; the stages have 16k, 32k and 64k channels.
        num_classes: Length of the logits.
        in_channels: Channels of the images.
    """

    def __init__(self, depth: int, factor: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stage1 = _stage(blocks, 16, 16 * factor, stride=1)
        self.stage2 = _stage(blocks, 16 * factor, 32 * factor, stride=2)
        self.stage3 = _stage(blocks, 32 * factor, 64 * factor, stride=2)
        self.bn = nn.BatchNorm2d(64 * factor)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(64 * factor, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, num_classes]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.bn(x)))))


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)))


def wrn_16_1(*, num_classes: int, in_channels: int = 3) -> WideResNet:
    """Two blocks per stage, 16-32-64 channels."""
    return WideResNet(16, 1, num_classes=num_classes, in_channels=in_channels)


def wrn_16_2(*, num_classes: int, in_channels: int = 3) -> WideResNet:
    """Two blocks per stage, 32-64-128 channels."""
    return WideResNet(16, 2, num_classes=num_classes, in_channels=in_channels)


def wrn_40_1(*, num_classes: int, in_channels: int = 3) -> WideResNet:
    """Six blocks per stage, 16-32-64 channels."""
    return WideResNet(40, 1, num_classes=num_classes, in_channels=in_channels)


def wrn_40_2(*, num_classes: int, in_channels: int = 3) -> WideResNet:
    """Six blocks per stage, 32-64-128 channels."""
    return WideResNet(40, 2, num_classes=num_classes, in_channels=in_channels)
