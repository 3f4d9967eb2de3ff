"""Slimmable segmenters are ordinary ones at each of their widths."""

import pytest
import torch

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.flops import macs
from edgekd.nn.slimmable import at_width, plain_state, widths_of
from edgekd.nn.taps import capture

SIDES = (32, 48)
SMALL = [
    ("slim_unet", {"width": 4, "depth": 2}),
    ("slim_pspnet", {"width": 0.125, "decoder": 16, "grids": [1, 2]}),
    ("slim_pspnet", {"backbone": "mobilenet_v2", "width": 0.5, "decoder": 8, "widths": [1, 0.5]}),
    ("slim_deeplabv3plus", {"width": 0.0625, "decoder": 64, "output_stride": 32, "widths": [1, 0.5, 0.25]}),
    ("slim_deeplabv3plus", {"backbone": "resnet18", "width": 0.125, "decoder": 32, "separable": False, "widths": [1, 0.5]}),
    ("slim_deeplabv3plus", {"backbone": "mobilenet_v2", "width": 0.5, "decoder": 32, "widths": [1, 0.5]}),
]
CONFIGS = [ModelConfig(name=name, arguments=arguments) for name, arguments in SMALL]
SLIM = CONFIGS[0]


def build(config=SLIM):
    torch.manual_seed(0)
    return models.build(config, num_classes=5, in_channels=3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.arguments.get('backbone', '')}")
def test_every_width_is_an_ordinary_net(config):
    """Bit for bit, in evaluation mode; and at the full width it begins as the ordinary one of the same seed does."""
    module, images = build(config), torch.randn(2, 3, *SIDES)
    begins = build(models.at_width(config, 1.0)).state_dict()
    assert all(torch.equal(value, begins[name]) for name, value in plain_state(module, 1.0).items())
    with torch.no_grad():
        for width in widths_of(module):
            with at_width(module, width):
                module(images * 2)  # running statistics
        module.eval()
        last = None
        for width in widths_of(module):
            plain = build(models.at_width(config, width)).eval()
            plain.load_state_dict(plain_state(module, width))
            with at_width(module, width):
                assert torch.equal(module(images), plain(images))
            assert last is None or macs(plain, (3, *SIDES)) < last
            last = macs(plain, (3, *SIDES))


def test_a_width_multiplies_what_counts_channels():
    assert models.at_width(SLIM, 0.75) == ModelConfig(name="unet", arguments={"width": 3, "depth": 2})
    config = ModelConfig(name="slim_pspnet", arguments={"width": 1, "grids": [1, 2]})
    assert models.at_width(config, 0.25) == ModelConfig(name="pspnet", arguments={"width": 0.25, "grids": [1, 2], "decoder": 32})


def test_the_macs_of_a_width_are_those_of_the_ordinary_net():
    module = build()
    with at_width(module, 0.5):
        assert macs(module, (3, *SIDES)) == macs(build(models.at_width(SLIM, 0.5)), (3, *SIDES))


def test_a_third_may_be_written_with_seven_digits():
    """At the bottom, 48 channels, the digits that are missing would cost a channel, and the cut net would not fit."""
    config = ModelConfig(name="slim_unet", arguments={"width": 3, "widths": [1, 0.3333333]})
    plain = build(models.at_width(config, 0.3333333))
    plain.load_state_dict(plain_state(build(config), 0.3333333))


def test_it_has_the_taps_of_a_unet_at_every_width():
    module = build().eval()
    config = ModelConfig(name="slim_unet", arguments={"width": 4})
    deep = build(config).eval()
    taps = models.taps(config, deep)
    with torch.no_grad(), at_width(deep, 0.5), capture(deep, taps) as found:
        deep(torch.randn(1, 3, 32, 32))
    assert found["stage4"].shape[1] == found["bottom"].shape[1] // 2 == 16
    assert widths_of(module) == models.widths(SLIM) == (1.0, 0.75, 0.5, 0.25)
    assert models.widths(ModelConfig(name="unet")) == ()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "slim_unet",
            {"width": 6},
            r"width 0\.75 is no whole number of channels: encoder\.1\.conv1\.weight would be \[9, 4, 3, 3\]",
        ),
        ("slim_unet", {"width": 2, "widths": [1, 0.25]}, "width must be at least 1"),
        ("slim_unet", {"width": 4, "widths": [0.5]}, "1 must be one of them"),
        ("slim_unet", {"width": 4, "widths": 1}, "cannot be built"),
        ("slim_unet", {"width": 4, "depth": 9}, "depth within 1 and 4"),
        ("slim_pspnet", {"width": 0.25, "grids": [1, 2, 3]}, r"in the ordinary pspnet of that width \[\d+"),
        ("slim_pspnet", {"backbone": "resnet20"}, "backbone must be one of resnet18"),
        ("slim_deeplabv3plus", {"decoder": 0}, "decoder must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(name, arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(ModelConfig(name=name, arguments=arguments))


def test_widths_that_cannot_be_are_refused_where_they_are_asked_for():
    with pytest.raises(RecipeError, match="1 must be one of them"):
        models.widths(ModelConfig(name="slim_unet", arguments={"widths": [0.5]}))
