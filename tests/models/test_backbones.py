"""Trunks of segmenters: the published counts, strides and dilations, and weights that a classifier gives them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import toy
from pydantic import ValidationError
from torch import nn

from edgekd import models
from edgekd.errors import DataError, RecipeError
from edgekd.models import ModelConfig, backbones
from edgekd.models.mobilenet_v2 import MobileNetV2Maps, mobilenetv2
from edgekd.models.resnet import ResNet
from edgekd.nn.flops import parameters
from edgekd.nn.taps import run_until
from edgekd.train.stage import fresh


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


# -- weights of a classifier


class TheirBlock(nn.Module):
    """With torchvision's names, and a bottleneck where it is deep."""

    def __init__(self, before, inner, stride, deep):
        super().__init__()
        rows = [(before, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1)]
        rows = rows if deep else [(before, inner, 3, stride), (inner, inner, 3, 1)]
        self.count, after = len(rows), rows[-1][1]
        for number, (one, other, kernel, step) in enumerate(rows, 1):
            setattr(self, f"conv{number}", nn.Conv2d(one, other, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(other))
        self.downsample = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        out = x
        for number in range(1, self.count + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            out = out if number == self.count else out.relu()
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class TheirResNet(nn.Module):
    def __init__(self, deep, width=8, classes=7):
        super().__init__()
        self.conv1, self.bn1, before = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), width
        for number, depth in enumerate((3, 4, 6, 3) if deep else (2, 2, 2, 2)):
            blocks = []
            for index in range(depth):
                blocks.append(TheirBlock(before, width << number, 2 if number and not index else 1, deep))
                before = (width << number) * (4 if deep else 1)
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@pytest.mark.parametrize("layers", [18, 50])
def test_torchvisions_weights_fill_the_backbone(layers, tmp_path):
    torch.manual_seed(0)
    theirs = TheirResNet(layers == 50).train()
    images = torch.randn(2, 3, 64, 96)
    theirs(images)  # statistics of their own
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    config = ModelConfig(
        name="pspnet", arguments={"backbone": f"resnet{layers}", "width": 0.125, "output_stride": 32, "decoder": 8}
    )
    module = models.build(config, num_classes=5, in_channels=3).eval()
    head = module.head.weight.detach().clone()
    models.load_backbone(module, tmp_path / "w.pth")
    with torch.no_grad():
        torch.testing.assert_close(module.backbone(images)[3], theirs.eval()(images))
    assert torch.equal(module.head.weight, head), "the decoder keeps its own"


def test_they_fill_a_slimmable_backbone_at_every_width(tmp_path):
    torch.manual_seed(0)
    theirs = TheirResNet(deep=False).train()
    images = torch.randn(2, 3, 64, 96)
    theirs(images)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    arguments = {"backbone": "resnet18", "width": 0.125, "output_stride": 32, "decoder": 8, "widths": [1, 0.5]}
    module = models.build(ModelConfig(name="slim_pspnet", arguments=arguments), num_classes=5, in_channels=3).eval()
    models.load_backbone(module, tmp_path / "w.pth")
    with torch.no_grad():
        torch.testing.assert_close(module.backbone(images)[3], theirs.eval()(images))
    full, narrow = module.backbone.stage2[0].body.norm1.norms
    assert torch.equal(full.running_var, theirs.layer2[0].bn1.running_var)
    assert torch.equal(narrow.running_var, theirs.layer2[0].bn1.running_var[:8])
    narrow.running_var.fill_(1)
    assert not torch.equal(full.running_var[:8], narrow.running_var), "no memory in common"


def test_a_classifier_of_the_table_fills_the_mobile_backbone(tmp_path):
    classifier = mobilenetv2(num_classes=10, width=0.25).eval()
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    config = ModelConfig(name="deeplabv3plus", arguments={"backbone": "mobilenet_v2", "width": 0.25, "decoder": 16})
    module = models.build(config, num_classes=5, in_channels=3).eval()
    models.load_backbone(module, tmp_path / "w.pth")
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(module.backbone(images)[3], classifier.stage4(run_until(classifier, "stage3", images)))


def test_a_recipe_names_the_file(tmp_path):
    theirs = TheirResNet(deep=False)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    config = ModelConfig(name="deeplabv3plus", arguments={"backbone": "resnet18", "width": 0.125}, backbone_weights="w.pth")
    context = SimpleNamespace(seed=0, search=(tmp_path,), dataset=toy.scenes())
    assert torch.equal(fresh(config, context).module.backbone.stem[0].weight, theirs.conv1.weight)


def test_weights_that_do_not_fit(tmp_path):
    torch.save(TheirResNet(deep=False).state_dict(), tmp_path / "w.pth")
    config = ModelConfig(name="pspnet", arguments={"width": 0.25})
    with pytest.raises(DataError, match=r"stem.0.weight \[8, 3, 7, 7\] instead of \[16, 3, 7, 7\]"):
        models.load_backbone(models.build(config, num_classes=5, in_channels=3), tmp_path / "w.pth")
    with pytest.raises(RecipeError, match="UNet has no backbone"):
        models.load_backbone(models.build(ModelConfig(name="unet"), num_classes=5, in_channels=3), tmp_path / "w.pth")
    with pytest.raises(ValidationError, match="remove backbone_weights, or weights"):
        ModelConfig(name="pspnet", weights="a.pth", backbone_weights="b.pth")
