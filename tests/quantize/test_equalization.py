"""Cross-layer equalization: the function stays, the ranges meet."""

import copy

import pytest
import torch
from torch import nn
from toy import RESIZED

from edgekd import models
from edgekd.models.config import ModelConfig
from edgekd.quantize.equalization import equalize, input_range, pairs
from edgekd.quantize.placement import trace


def settled(module, channels=3, size_px=16):
    """Batch norms with statistics and gains of their own."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, -2, 2)  # negative gains too
            nn.init.normal_(part.bias)
    with torch.no_grad():
        for _ in range(3):
            module.train()(torch.randn(8, channels, size_px, size_px))
    return module.eval()


@pytest.mark.parametrize("name", [name for name in models.names() if name not in RESIZED])
def test_the_float_function_stays(name):
    torch.manual_seed(0)
    module = settled(models.build(ModelConfig(name=name), num_classes=10, in_channels=3), size_px=32)
    before = copy.deepcopy(module.state_dict())
    equalized, found = equalize(module)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, received = module(images), equalized(images)
    assert found or name == "sk_unet"  # there every map has two readers, or is joined with another
    assert float((received - expected).abs().max() / expected.abs().max()) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert equalized.state_dict().keys() == before.keys()


def test_equation_11_by_hand():
    one, two = nn.Linear(1, 2), nn.Linear(2, 1)
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[8.0], [1.0]]))
        one.bias.copy_(torch.tensor([4.0, -3.0]))
        two.weight.copy_(torch.tensor([[2.0, -9.0]]))
    equalized, _ = equalize(nn.Sequential(one, nn.ReLU(), two))
    # s = (sqrt(8 / 2), sqrt(1 / 9)) = (2, 1/3)
    assert torch.allclose(equalized[0].weight.flatten(), torch.tensor([4.0, 3.0]))
    assert torch.allclose(equalized[0].bias, torch.tensor([2.0, -9.0]))
    assert torch.allclose(equalized[2].weight.flatten(), torch.tensor([4.0, -3.0]))


def test_three_layers_with_a_depthwise_one_meet_in_the_geometric_mean():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)),
    )
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-1, 2, 6).view(-1, 1, 1, 1))

    def ranges(model):
        return torch.stack(
            [model[0].weight.flatten(1).abs().amax(1), model[2].weight.flatten(1).abs().amax(1), input_range(model[4], None)]
        )

    equalized, found = equalize(net)
    assert [(pair.first, pair.second) for pair in found] == [("0", "2"), ("2", "4")]
    middle = ranges(net).prod(0).pow(1 / 3)
    assert torch.allclose(ranges(equalized), middle.expand(3, 6), rtol=1e-3)


def test_batch_norms_count_in_both_ranges():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    )
    settled(net)
    equalized, _ = equalize(net)

    def folded(conv, norm):
        return conv.weight.flatten(1).abs().amax(1) * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()

    first, second = folded(equalized[0], equalized[1]), folded(equalized[3], equalized[4])
    assert torch.allclose(first, second, rtol=1e-3)
    assert torch.allclose(second, input_range(equalized[6], None), rtol=1e-3)


def test_a_grouped_convolutions_input_channels():
    layer = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).view(6, 2, 1, 1))  # outputs 0..2 read inputs 0 and 1, outputs 3..5 inputs 2 and 3
    assert input_range(layer, None).tolist() == [4.0, 5.0, 10.0, 11.0]


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between):
        super().__init__()
        self.one, self.between, self.two = nn.Conv2d(3, 3, 1), between, nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.two(self.between(self.one(x)))


class Twice(Net):
    def forward(self, x):
        return self.two(self.between(self.one(self.one(x))))


class Residual(Net):
    def forward(self, x):
        x = self.one(x)
        return x + self.two(self.between(x))


@pytest.mark.parametrize(
    "net",
    [
        Net(nn.ReLU6()),
        Net(nn.SiLU()),
        Net(nn.Sigmoid()),
        Net(nn.BatchNorm2d(3, affine=False)),
        Net(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))),
        Twice(nn.ReLU()),
        Residual(nn.ReLU()),
    ],
    ids=["relu6", "silu", "sigmoid", "norm without gain", "norm after relu", "called twice", "read twice"],
)
def test_what_ends_a_chain(net):
    traced, _ = trace(net.eval(), {})
    assert pairs(traced) == []


@pytest.mark.parametrize("between", [nn.Identity(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), nn.AvgPool2d(2), nn.Dropout()])
def test_what_passes_a_scale_on(between):
    traced, _ = trace(Net(between).eval(), {})
    assert [(pair.first, pair.second) for pair in pairs(traced)] == [("one", "two")]


def test_tied_weights_are_left_alone():
    net = Net(nn.ReLU())
    net.two.weight = net.one.weight
    traced, _ = trace(net.eval(), {})
    assert pairs(traced) == []


def test_a_dead_channel_does_not_blow_up_its_bias():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net[0].weight[1] = 1e-12
        net[0].bias[1] = 0.5
        net[2].weight[:, 2] = 0
    equalized, _ = equalize(net)
    assert float(equalized[0].bias[1].detach()) == 0.5
    assert all(parameter.isfinite().all() for parameter in equalized.parameters())
