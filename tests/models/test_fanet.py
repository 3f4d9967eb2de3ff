"""FANet: its attention against loops, its maps, and what it refuses; engines are in the tests of all families."""

import math

import pytest
import torch

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.models.fanet import FastAttention
from edgekd.nn.taps import capture


def config(**arguments):
    return ModelConfig(name="fanet", arguments=arguments)


def build(**arguments):
    torch.manual_seed(0)
    return models.build(config(**arguments), num_classes=5, in_channels=3)


def test_attention_agrees_with_loops():
    """The long way: the cosine of every query with every key weighs every value."""
    torch.manual_seed(0)
    layer, maps = FastAttention(6, 4).double().eval(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    query, key, value = (part(maps).flatten(2).tolist() for part in (layer.query, layer.key, layer.value))
    places = 12
    found = torch.zeros(2, 6, places, dtype=torch.float64)
    for image in range(2):
        for here in range(places):
            asked = [row[here] for row in query[image]]
            for there in range(places):
                offered = [row[there] for row in key[image]]
                lengths = [math.sqrt(sum(entry * entry for entry in vector)) for vector in (asked, offered)]
                cosine = sum(a * b for a, b in zip(asked, offered, strict=True)) / (lengths[0] * lengths[1])
                for channel in range(6):
                    found[image, channel, here] += cosine * value[image][channel][there] / places
    expected = torch.relu(maps + layer.mix(found.view_as(maps)))
    torch.testing.assert_close(layer(maps), expected)


def test_places_without_a_direction_find_nothing():
    """Queries of length 0 do not divide by it."""
    layer = FastAttention(6, 4).eval()
    torch.nn.init.zeros_(layer.query.conv.weight)
    maps = torch.randn(1, 6, 3, 3, requires_grad=True)
    layer(maps).sum().backward()
    assert maps.grad.isfinite().all()


def test_the_size_follows_the_backbone():
    counts = [sum(value.numel() for value in build(layers=layers).backbone.parameters()) / 1e6 for layers in (18, 34)]
    assert counts == pytest.approx([11.18, 21.28], abs=0.01), "of ResNets without their classifier"


@pytest.mark.parametrize("sides", [(32, 64), (48, 80)])
def test_every_pixel_gets_logits_and_sees_the_whole_image(sides):
    module, images = build(width=4, keys=4).eval(), torch.randn(2, 3, *sides, requires_grad=True)
    logits = module(images)
    assert logits.shape == (2, 5, *sides)
    logits[0, 0, 8, 8].backward()
    assert (images.grad[0].abs().sum(0) > 0).float().mean() > 0.9


def test_it_trains_traces_and_has_its_taps():
    module, images = build(width=8, keys=4), torch.randn(2, 3, 64, 96)
    module(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    module.eval()
    taps = models.taps(config(width=8, keys=4), module)
    with torch.no_grad(), capture(module, taps) as found:
        expected = module(images)
    shapes = {role: tuple(tensor.shape[1:]) for role, tensor in found.items()}
    assert shapes["stage1"] == shapes["attention1"] == (8, 16, 24)
    assert shapes["stage4"] == shapes["bottom"] == (64, 2, 3)
    assert shapes["top"] == (16, 16, 24)
    assert shapes["head"] == (5, 16, 24)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(module)(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"keys": 0}, "keys must be at least 1"), ({"layers": 20}, "layers must be one of 18, 34, 50")]
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(**arguments)
