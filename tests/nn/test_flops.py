"""Counting against numbers worked out by hand."""

import torch
from torch import nn

from edgekd import models
from edgekd.models import ModelConfig
from edgekd.nn.flops import layer_macs, macs, parameters


def test_resnet8_by_hand():
    model = models.build(ModelConfig(name="resnet8"), num_classes=10, in_channels=3)
    stem = 3 * 16 * 9 * 32 * 32
    stage1 = 2 * 16 * 16 * 9 * 32 * 32
    stage2 = (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 16 * 16  # two convolutions and the shortcut's 1x1
    stage3 = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 8 * 8
    assert macs(model, (3, 32, 32)) == stem + stage1 + stage2 + stage3 + 64 * 10 == 12_501_632
    convolutions = 3 * 16 * 9 + 2 * 16 * 16 * 9 + 16 * 32 * 9 + 32 * 32 * 9 + 16 * 32 + 32 * 64 * 9 + 64 * 64 * 9 + 32 * 64
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    assert parameters(model) == convolutions + norms + 64 * 10 + 10


def test_groups_divide_the_work():
    model = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert macs(model, (8, 5, 7)) == 8 * 9 * 5 * 7


def test_the_model_is_left_as_it_was():
    model = models.build(ModelConfig(name="resnet8"), num_classes=10, in_channels=3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs(model, (3, 16, 16))
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name]), name


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    assert parameters(nn.Sequential(layer, layer)) == 20


def test_layers_add_up_to_the_model():
    model = models.build(ModelConfig(name="shufflenetv2"), num_classes=10, in_channels=3)
    found = layer_macs(model, (3, 32, 32))
    assert sum(found.values()) == macs(model, (3, 32, 32))
    assert {path for path, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)} == set(found)


def test_a_transposed_and_a_shared_layer_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.shared = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return self.shared(self.shared(self.up(x)))

    net = Net()
    found = layer_macs(net, (4, 5, 7))
    assert found == {"up": 4 * 5 * 7 * 3 * 2 * 2, "shared": 2 * 6 * 6 * 10 * 14}
    assert sum(found.values()) == macs(net, (4, 5, 7))
