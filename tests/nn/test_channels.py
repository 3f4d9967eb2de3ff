"""The channel plan: what pruning did, as data."""

import pytest
import torch
from torch import nn

from edgekd.errors import ArtifactError
from edgekd.nn.channels import apply_channel_plan, channel_plan


class Wrapped(nn.Module):
    """A layer that reports the size of the layer inside it."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)

    @property
    def out_channels(self):
        return self.conv.out_channels

    def forward(self, x):
        return self.conv(x)


def model(channels):
    return nn.Sequential(
        Wrapped(channels), nn.BatchNorm2d(channels), nn.LayerNorm([channels, 2, 2]), nn.Flatten(), nn.Linear(4 * channels, 5)
    )


def test_a_plan_gives_a_model_anothers_shapes():
    small, rebuilt = model(3), model(8)
    apply_channel_plan(rebuilt, channel_plan(small))
    rebuilt.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 2, 2)
    assert torch.equal(rebuilt.eval()(images), small.eval()(images))
    assert channel_plan(rebuilt) == channel_plan(small)
    assert rebuilt[2].normalized_shape == (3, 2, 2)


def test_what_a_property_computes_is_not_recorded():
    plan = channel_plan(model(3))
    assert "0" not in plan
    assert plan["0.conv"]["attributes"] == {"in_channels": 3, "out_channels": 3, "groups": 1}


def test_frozen_parameters_stay_frozen_and_types_stay():
    small, rebuilt = model(3), model(8).double()
    rebuilt[4].weight.requires_grad_(False)
    apply_channel_plan(rebuilt, channel_plan(small))
    assert not rebuilt[4].weight.requires_grad
    assert rebuilt[4].weight.dtype == torch.float64
    assert isinstance(rebuilt[4].weight, nn.Parameter)
    assert not isinstance(rebuilt[1].running_mean, nn.Parameter)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"9": {"attributes": {}, "shapes": {}}}, "'9', which Sequential does not have"),
        ({"4": {"attributes": {}, "shapes": {"scale": [3]}}}, "4.scale, which Linear does not have"),
    ],
)
def test_a_plan_of_another_model(plan, message):
    with pytest.raises(ArtifactError, match=message):
        apply_channel_plan(model(3), plan)
