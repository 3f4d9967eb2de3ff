"""U-Net's shapes and what it refuses; exports and quantization are in the tests of all models."""

import pytest
import torch

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.taps import capture


def build(**arguments):
    return models.build(ModelConfig(name="unet", arguments=arguments), num_classes=5, in_channels=3)


@pytest.mark.parametrize(("depth", "sides"), [(1, (6, 10)), (4, (32, 48))])
def test_every_pixel_gets_logits(depth, sides):
    module = build(width=4, depth=depth).eval()
    assert module(torch.randn(2, 3, *sides)).shape == (2, 5, *sides)


def test_the_published_size():
    """31.0 million parameters in the paper's form with transposed convolutions; ours narrows by 1 x 1 ones instead."""
    convolutions = [part for part in build(width=64).modules() if isinstance(part, torch.nn.Conv2d)]
    assert len(convolutions) == 23, "as many as the paper's"
    assert convolutions[-1].out_channels == 5
    down, up = [64, 128, 256, 512, 1024], [64, 128, 256, 512]
    assert [part.out_channels for part in convolutions if part.kernel_size == (3, 3)][::2] == [*down, *up]


def test_every_output_sees_far():
    """The bottom sees most of the image, and skips carry single pixels."""
    module = build(width=4).eval()
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    module(image)[0, 0, 16, 16].backward()
    seen = image.grad[0].abs().sum(0) > 0
    assert seen.float().mean() > 0.5


def test_it_trains_traces_and_has_its_taps():
    config = ModelConfig(name="unet", arguments={"width": 4})
    module = models.build(config, num_classes=5, in_channels=3)
    images = torch.randn(2, 3, 32, 48)
    module(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    module.eval()
    taps = models.taps(config, module)
    with torch.no_grad(), capture(module, taps) as found:
        expected = module(images)
    shapes = {role: tuple(tensor.shape[1:]) for role, tensor in found.items()}
    assert shapes["stage1"] == shapes["top"] == (4, 32, 48)
    assert shapes["stage4"] == (32, 4, 6)
    assert shapes["bottom"] == (64, 2, 3)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(module)(images), expected)


@pytest.mark.parametrize("name", ["unet", "slim_unet"])
def test_a_shallower_net_has_the_taps_of_the_stages_that_it_has(name):
    config = ModelConfig(name=name, arguments={"width": 4, "depth": 2})
    module = models.build(config, num_classes=5, in_channels=3)
    assert list(models.taps(config, module)) == ["stage1", "stage2", "bottom", "top"]


@pytest.mark.parametrize("arguments", [{"depth": 0}, {"depth": 5}, {"width": 0}])
def test_arguments_that_cannot_be(arguments):
    with pytest.raises(RecipeError, match="depth within 1 and 4"):
        build(**arguments)
