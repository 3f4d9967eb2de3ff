"""The slimmable U-Net is an ordinary one at each of its widths."""

import pytest
import torch

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.flops import macs
from edgekd.nn.slimmable import at_width, plain_state, widths_of
from edgekd.nn.taps import capture

SLIM = ModelConfig(name="slim_unet", arguments={"width": 4, "depth": 2})


def build(config=SLIM):
    torch.manual_seed(0)
    return models.build(config, num_classes=5, in_channels=3)


def test_every_width_is_an_ordinary_unet():
    module, images = build(), torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for width in widths_of(module):
            with at_width(module, width):
                module(images * 2)  # running statistics
        module.eval()
        for width, channels in ((1.0, 4), (0.75, 3), (0.5, 2), (0.25, 1)):
            config = models.at_width(SLIM, width)
            assert config == ModelConfig(name="unet", arguments={"width": channels, "depth": 2})
            plain = build(config).eval()
            plain.load_state_dict(plain_state(module, width))
            with at_width(module, width):
                assert torch.equal(module(images), plain(images))
                assert macs(module, (3, 16, 24)) == macs(plain, (3, 16, 24))


def test_a_third_may_be_written_with_seven_digits():
    """At the bottom, 48 channels, the digits that are missing would cost a channel, and the cut net would not fit."""
    config = ModelConfig(name="slim_unet", arguments={"width": 3, "widths": [1, 0.3333333]})
    plain = build(models.at_width(config, 0.3333333))
    plain.load_state_dict(plain_state(build(config), 0.3333333))


def test_it_begins_as_the_ordinary_unet_does():
    """The same seed gives the same weights: a student alone is the same net."""
    plain = build(models.at_width(SLIM, 1.0))
    plain_now = plain.state_dict()
    assert all(torch.equal(value, plain_now[name]) for name, value in plain_state(build(), 1.0).items())


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
    ("arguments", "message"),
    [
        ({"width": 6}, r"width 6 times 0\.75 is no whole number of channels"),
        ({"width": 4, "widths": [0.5]}, "1 must be one of them"),
        ({"width": 4, "widths": 1}, "cannot be built"),
        ({"width": 4, "depth": 9}, "depth within 1 and 4"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(ModelConfig(name="slim_unet", arguments=arguments))


def test_widths_that_cannot_be_are_refused_where_they_are_asked_for():
    with pytest.raises(RecipeError, match="1 must be one of them"):
        models.widths(ModelConfig(name="slim_unet", arguments={"widths": [0.5]}))
