"""VGG for small images, with batch norm and one linear layer as its head.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, arXiv 1409.1556, table 1
(vgg13 is its column B). Written from the paper, with the changes that the distillation literature makes for 32-pixel images: the
two 4096-wide layers are gone, and so are the last two poolings, so that the last two stages work at an eighth of the resolution.
vgg8 has one convolution per stage.
"""

from collections import OrderedDict

from torch import Tensor, nn

from edgekd.models.initial import initialise

TAPS = {
    "stem": "features.stage1.2",
    "stage1": "features.stage1",
    "stage2": "features.stage2",
    "stage3": "features.stage3",
    "stage4": "features.stage4",
    "stage5": "features.stage5",
    "pool": "flatten",
    "logits": "fc",
}
"""Role -> module path. A stage ends with its last ReLU, before the pooling; the stem is the first ReLU."""

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images [B, in_channels, H, W], at least 8 pixels high and wide, to logits [B, num_classes].

    Args:
        convolutions: Per stage, 1 or more.
        num_classes: Length of the logits.
        in_channels: Channels of the images.
    """

    def __init__(self, convolutions: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, channels in enumerate(CHANNELS, start=1):
            layers[f"stage{index}"] = _stage(convolutions, in_channels, channels)
            if index <= 3:
                layers[f"pool{index}"] = nn.MaxPool2d(2)
            in_channels = channels
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(in_channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, num_classes]."""
        return self.fc(self.flatten(self.pool(self.features(x))))


def _stage(convolutions: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        # The batch norm makes the bias idle; it stays because the published networks count it among their parameters.
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)


def vgg8(*, num_classes: int, in_channels: int = 3) -> VGG:
    """One convolution per stage."""
    return VGG(1, num_classes=num_classes, in_channels=in_channels)


def vgg13(*, num_classes: int, in_channels: int = 3) -> VGG:
    """Two convolutions per stage."""
    return VGG(2, num_classes=num_classes, in_channels=in_channels)
