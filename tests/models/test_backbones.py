"""Trunks of segmenters: the published counts, strides and dilations."""

import pytest
import torch
from torch import nn

from edgekd.models import backbones
from edgekd.models.mobilenet_v2 import MobileNetV2Maps, mobilenetv2
from edgekd.models.resnet import ResNet
from edgekd.nn.flops import parameters


@pytest.mark.parametrize(("layers", "count"), [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032), (101, 42_500_160)])
def test_the_published_counts(layers, count):
    """Without the classifier; the strides change none of them."""
    with torch.device("meta"):
        assert parameters(ResNet(3, layers)) == parameters(ResNet(3, layers, output_stride=8)) == count


def shapes(name, width, output_stride):
    torch.manual_seed(0)
    module = backbones.build(name, 3, width, output_stride).eval()
    with torch.no_grad():
        found = module(torch.randn(1, 3, 64, 96))
    assert tuple(one.shape[1] for one in found) == module.channels
    assert all(one.shape[2] * 3 == one.shape[3] * 2 for one in found)
    return module, [64 // one.shape[2] for one in found]


@pytest.mark.parametrize(("stride", "expected"), [(32, [4, 8, 16, 32]), (16, [4, 8, 16, 16]), (8, [4, 8, 8, 8])])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_strides_of_resnets(name, stride, expected):
    assert shapes(name, 0.125, stride)[1] == expected


@pytest.mark.parametrize(("stride", "expected"), [(16, [2, 4, 8, 16]), (8, [2, 4, 8, 8])])
def test_strides_of_mobilenets(stride, expected):
    module, found = shapes("mobilenet_v2", 0.25, stride)
    assert found == expected
    rates = [part.dilation[0] for part in module.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
    assert rates == ([1] * 17 if stride == 16 else [1] * 14 + [2] * 3)


def test_dilations_are_torchvisions():
    """A stage's first block dilates as the stage before: it is the one that would have had the stride."""
    module = ResNet(3, 50, 8, output_stride=8)
    rates = [[block.body.conv2.dilation[0] for block in getattr(module, f"stage{n}")] for n in (1, 2, 3, 4)]
    assert rates == [[1] * 3, [1] * 4, [1, *[2] * 5], [2, 4, 4]]
    assert all(block.body.conv1.dilation == (1, 1) for block in module.stage4)


def test_dilation_keeps_what_strides_would_throw_away():
    """With equal weights, the finer map has the coarser one's values at every second place."""
    torch.manual_seed(0)
    coarse, fine = ResNet(3, 18, 8).eval(), ResNet(3, 18, 8, output_stride=16).eval()
    fine.load_state_dict(coarse.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(fine(images)[3][:, :, ::2, ::2], coarse(images)[3])


def test_the_mobile_trunk_is_the_classifiers():
    classifier, maps = mobilenetv2(num_classes=10, width=0.25).eval(), MobileNetV2Maps(3, 0.25).eval()
    maps.load_state_dict({name: value for name, value in classifier.state_dict().items() if name in maps.state_dict()})
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        last = maps(images)[3]
        torch.testing.assert_close(classifier(images), classifier.fc(classifier.head(last).mean((2, 3))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet20", 1.0, 8), "backbone must be one of resnet18, resnet34, resnet50, resnet101, mobilenet_v2"),
        (("resnet18", 1.0, 4), "output_stride must be one of 8, 16, 32"),
        (("mobilenet_v2", 1.0, 32), "output_stride must be one of 8, 16"),
        (("resnet18", 0.0, 8), "width must be above 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        backbones.build(arguments[0], 3, *arguments[1:])
