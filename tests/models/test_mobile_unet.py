"""Mobile U-Net: the published size, its maps, and what it refuses; engines are in the tests of all families."""

import pytest
import torch

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.taps import capture


def config(**arguments):
    return ModelConfig(name="mobile_unet", arguments=arguments)


def build(classes=5, in_channels=3, **arguments):
    torch.manual_seed(0)
    return models.build(config(**arguments), num_classes=classes, in_channels=in_channels)


def test_the_published_size():
    """4.68 million without the classifier, on grey images."""
    module = build(2, 1, up="transposed")
    parameters = sum(value.numel() for value in module.parameters()) - sum(value.numel() for value in module.head.parameters())
    assert parameters / 1e6 == pytest.approx(4.68, abs=0.005)


@pytest.mark.parametrize("up", ["nearest", "transposed"])
@pytest.mark.parametrize("sides", [(32, 64), (48, 80)])
def test_every_pixel_gets_logits(up, sides):
    module = build(width=0.25, up=up).eval()
    assert module(torch.randn(2, 3, *sides)).shape == (2, 5, *sides)


def test_it_trains_traces_and_has_its_taps():
    module, images = build(width=0.5), torch.randn(2, 3, 64, 96)
    module(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    module.eval()
    taps = models.taps(config(width=0.5), module)
    with torch.no_grad(), capture(module, taps) as found:
        expected = module(images)
    shapes = {role: tuple(tensor.shape[1:]) for role, tensor in found.items()}
    assert shapes["stage1"] == shapes["up4"] == shapes["top"] == (8, 32, 48)
    assert shapes["stage2"] == shapes["up3"] == (12, 16, 24), "the two maps that CoCo and Graph Flow compare"
    assert shapes["stage4"] == shapes["up1"] == (48, 4, 6)
    assert shapes["bottom"] == (640, 2, 3)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(module)(images), expected)


@pytest.mark.parametrize("arguments", [{"width": 0}, {"up": "bilinear"}])
def test_arguments_that_cannot_be(arguments):
    with pytest.raises(RecipeError, match="width must be above 0, up nearest or transposed"):
        build(**arguments)
