"""MobileNetV2 for small images: inverted residuals with linear bottlenecks.

Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, arXiv 1801.04381, table 2. Written from the
paper. Differs from it as the distillation literature does for 32-pixel images: strides multiply to 16 and not 32 (the 24-channel
blocks keep the resolution), the first block has its expansion layer too (by 1), channels are rounded to the nearest whole number,
and the activation is ReLU and not ReLU6. That literature's student is ``width: 0.5`` (0.81 M parameters for 100 classes).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from edgekd.models.initial import initialise

TAPS = {
    "stem": "stem",
    "stage1": "stage1",
    "stage2": "stage2",
    "stage3": "stage3",
    "stage4": "stage4",
    "pool": "flatten",
    "logits": "fc",
}
"""Role -> module path. A stage ends with a linear bottleneck: its output has no activation, by design of the paper."""

Row = tuple[int, int, int, int]
STAGES: tuple[tuple[Row, ...], ...] = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
"""Per stage, rows of: expansion t, channels c, repetitions n, stride s of the first repetition."""
OUTPUT_STRIDES = (8, 16)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection: [B, Cin, H, W] to [B, Cout, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _conv_bn_relu(in_channels, hidden, 1)
        self.depthwise = _conv_bn_relu(hidden, hidden, 3, stride=stride, groups=hidden, dilation=dilation)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H/stride, W/stride]."""
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
        num_classes: Length of the logits.
        in_channels: Channels of the images.
        width: Multiplier of all channels but the last layer's 1280, which only grows with it; above 0.
    """

    def __init__(self, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        self.stem, (self.stage1, self.stage2, self.stage3, self.stage4), channels = _trunk(in_channels, width, 16)
        last = round(1280 * max(1.0, width))
        self.head = _conv_bn_relu(channels[-1], last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(last, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, num_classes]."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.fc(self.flatten(self.pool(self.head(x))))


class MobileNetV2Maps(nn.Module):
    """Images [B, in_channels, H, W] to four maps, the finest first, of strides 2, 4, 8 and 16: for networks that draw.

    Args:
        in_channels: Channels of the images.
        width: Multiplier of all channels, above 0.
        output_stride: Of the last map: 16; or 8, where the last stage dilates its convolutions, all but the first.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, in_channels: int, width: float = 1.0, output_stride: int = 16) -> None:
        super().__init__()
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {', '.join(map(str, OUTPUT_STRIDES))}; received {output_stride}")
        self.stem, (self.stage1, self.stage2, self.stage3, self.stage4), self.channels = _trunk(in_channels, width, output_stride)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four maps."""
        one = self.stage1(self.stem(images))
        two = self.stage2(one)
        three = self.stage3(two)
        return one, two, three, self.stage4(three)

    @staticmethod
    def from_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a MobileNetV2 of this file without those behind its stages; torchvision's has other strides and layers."""
        return {name: value for name, value in state.items() if not name.startswith(("head.", "fc."))}


def _trunk(in_channels: int, width: float, output_stride: int) -> tuple[nn.Module, list[nn.Sequential], tuple[int, ...]]:
    """The stem, the four stages, and the stages' channels."""
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")
    channels = max(1, round(32 * width))
    stem = _conv_bn_relu(in_channels, channels, 3, stride=2)
    stages, widths, reached, dilation = [], [], 2, 1
    for rows in STAGES:
        blocks = []
        for expansion, base, repetitions, stride in rows:
            out_channels = max(1, round(base * width))
            dilates = stride > 1 and reached >= output_stride
            reached *= 1 if dilates else stride
            for index in range(repetitions):
                step = stride if index == 0 and not dilates else 1
                blocks.append(InvertedResidual(channels, out_channels, expansion, step, dilation))
                channels = out_channels
                if dilates and index == 0:
                    dilation *= stride
        stages.append(nn.Sequential(*blocks))
        widths.append(channels)
    return stem, stages, tuple(widths)


def _conv_bn_relu(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2 * dilation, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def mobilenetv2(*, num_classes: int, in_channels: int = 3, width: float = 1.0) -> MobileNetV2:
    """The paper's table 2 with strides for small images."""
    return MobileNetV2(num_classes=num_classes, in_channels=in_channels, width=width)
