"""PSPNet and DeepLabV3+: their equations, sizes and taps; engines are in test_segmenters.py."""

import pytest
import torch
import torch.nn.functional as F

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.models.deeplab import AtrousPyramid
from edgekd.models.pspnet import Pyramid
from edgekd.nn.flops import parameters
from edgekd.nn.taps import capture
from edgekd.prune.importance import prune

SMALL = {
    "pspnet": {"width": 0.125, "decoder": 8},
    "deeplabv3plus": {"backbone": "mobilenet_v2", "width": 0.25, "decoder": 16},
}
EVERY = pytest.mark.parametrize("name", SMALL)


def build(name, classes=5, **arguments):
    torch.manual_seed(0)
    return models.build(ModelConfig(name=name, arguments=arguments), num_classes=classes, in_channels=3)


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        ("pspnet", {}, 12.62),
        ("pspnet", {"backbone": "resnet101", "decoder": 512}, 65.58),
        ("deeplabv3plus", {}, 26.70),
        ("deeplabv3plus", {"backbone": "mobilenet_v2"}, 2.72),
    ],
)
def test_sizes(name, arguments, millions):
    with torch.device("meta"):
        assert parameters(build(name, 19, **arguments)) / 1e6 == pytest.approx(millions, abs=0.005)


@EVERY
@pytest.mark.parametrize("sides", [(64, 96), (50, 70)])
def test_every_pixel_gets_logits_and_every_weight_a_gradient(name, sides):
    module = build(name, **SMALL[name])
    logits = module.train()(torch.randn(2, 3, *sides))
    assert logits.shape == (2, 5, *sides)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@EVERY
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_taps_and_a_trace(name, backbone):
    arguments = SMALL[name] | {"backbone": backbone}
    config, module, images = (
        ModelConfig(name=name, arguments=arguments),
        build(name, **arguments).eval(),
        torch.randn(1, 3, 64, 96),
    )
    with torch.no_grad(), capture(module, models.taps(config, module)) as found:
        expected = module(images)
    stride = 8 if name == "pspnet" else 16
    assert found["stage4"].shape == (1, module.backbone.channels[-1], 64 // stride, 96 // stride)
    assert found["pyramid"].shape[2:] == found["stage4"].shape[2:]
    assert found["top"].shape == (1, arguments["decoder"], *((8, 12) if name == "pspnet" else (16, 24)))
    torch.testing.assert_close(module.head(found["top"]), found["head"])
    torch.testing.assert_close(F.interpolate(found["head"], size=(64, 96), mode="bilinear"), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(module)(images), expected)


def test_the_pyramid_keeps_the_map_and_adds_its_averages():
    torch.manual_seed(0)
    part, maps = Pyramid(8, (1, 4)).eval(), torch.randn(2, 8, 12, 20)
    with torch.no_grad():
        found = part(maps)
        grid = maps.reshape(2, 8, 4, 3, 4, 5).mean((3, 5))
        branch = part.branches[1][1](grid)
    assert found.shape == (2, 16, 12, 20)
    assert torch.equal(found[:, :8], maps)
    torch.testing.assert_close(found[:, 12:], F.interpolate(branch, size=(12, 20), mode="bilinear"))
    whole = part.branches[0][1](maps.mean((2, 3), keepdim=True))
    torch.testing.assert_close(found[:, 8:12], whole.expand(-1, -1, 12, 20))


@pytest.mark.parametrize("separable", [False, True])
def test_the_atrous_pyramid_sees_as_far_as_its_rates(separable):
    torch.manual_seed(0)
    part, maps = AtrousPyramid(2, 4, (2, 5), separable).eval(), torch.randn(1, 2, 16, 16, requires_grad=True)
    torch.nn.init.zeros_(part.mean[1].weight)  # which would see everything
    part.branches.apply(lambda layer: layer.weight.data.abs_() if isinstance(layer, torch.nn.Conv2d) else None)
    part.fuse.apply(lambda layer: layer.weight.data.abs_() if isinstance(layer, torch.nn.Conv2d) else None)
    positive = maps.abs()
    positive.retain_grad()
    part(positive)[0, :, 8, 8].sum().backward()
    rows, columns = (positive.grad[0].abs().sum(0) > 0).nonzero(as_tuple=True)
    offsets = {(int(row) - 8, int(column) - 8) for row, column in zip(rows, columns, strict=True)}
    assert offsets == {(rate * down, rate * across) for rate in (2, 5) for down in (-1, 0, 1) for across in (-1, 0, 1)}


def test_rates_follow_the_output_stride():
    rates = {
        stride: [
            branch[0].conv.dilation[0]
            for branch in build("deeplabv3plus", width=0.125, output_stride=stride).pyramid.branches[1:]
        ]
        for stride in (8, 16, 32)
    }
    assert rates == {8: [12, 24, 36], 16: [6, 12, 18], 32: [3, 6, 9]}


@EVERY
def test_what_is_pruned_still_trains(name):
    module = build(name, **SMALL[name] | {"decoder": 32})
    small = prune(module, torch.randn(2, 3, 64, 96), ratio=0.4, round_to=2, scope="layer")
    assert parameters(small) < 0.7 * parameters(module)
    assert small.train()(torch.randn(2, 3, 64, 96)).shape == (2, 5, 64, 96)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pspnet", {"grids": [1, 0]}, r"grids must be at least 1; received 128 and \[1, 0\]"),
        ("pspnet", {"backbone": "resnet20"}, "backbone must be one of resnet18"),
        ("deeplabv3plus", {"decoder": 0}, "decoder must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(name, arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(name, **arguments)
