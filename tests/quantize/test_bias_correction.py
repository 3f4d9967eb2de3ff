"""Empirical bias correction."""

import copy

import pytest
import torch
from torch import nn

from edgekd.quantize import qat
from edgekd.quantize.bias import correct_biases, output_means
from edgekd.quantize.fake_quant import quantized_weight
from edgekd.quantize.qat import QuantizerConfig

EXAMPLE = torch.zeros(2, 3, 8, 8)


def images(count=3, batch=16):
    torch.manual_seed(1)
    return [torch.rand(batch, 3, 8, 8) + 0.5 for _ in range(count)]  # all positive: a rounded weight then shifts the mean


def quantized(module, batches):
    model = qat.prepare(module, {}, QuantizerConfig(), EXAMPLE)
    qat.calibrate(model, batches)
    return model.eval()


def coarse(module):
    """Weights with one big value per output channel, so that all others are rounded badly."""
    torch.manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.weight.flatten(1)[:, 0] = 20.0
    return module.eval()


class Net(nn.Module):
    """With biases, with a batch norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3)
        self.two, self.norm = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = self.norm(self.two(self.one(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


def test_a_single_layer_by_hand():
    layer = coarse(nn.Sequential(nn.Conv2d(3, 2, 1)))
    batches = images()
    model = quantized(layer, batches)
    before = model.get_submodule("0").bias.detach().clone()
    assert correct_biases(model, layer, batches) == ["0"]
    every = torch.cat(batches)
    quantizer = next(iter(qat.named_quantizers(model).values()))
    with torch.no_grad():
        shift = nn.functional.conv2d(quantizer(every), quantized_weight(layer[0].weight)) - nn.functional.conv2d(
            every, layer[0].weight
        )
    assert torch.allclose(before - model.get_submodule("0").bias, shift.mean((0, 2, 3)), atol=1e-5)


def slow(model, reference, batches):
    """The same with a whole forward per layer."""
    for path, place in (("one", "one.bias"), ("two", "norm.running_mean"), ("fc", "fc.bias")):
        shift = output_means(model, [path], batches)[path] - output_means(reference, [path], batches)[path]
        with torch.no_grad():
            tensor = dict([*model.named_parameters(), *model.named_buffers()])[place]
            tensor.add_(shift if place.endswith("running_mean") else -shift)


def test_against_a_forward_per_layer():
    net, batches = coarse(Net()), images()
    model = quantized(net, batches)
    rival = copy.deepcopy(model)
    assert correct_biases(model, net, batches) == ["one", "two", "fc"]
    slow(rival, net, batches)
    for name, value in rival.state_dict().items():
        assert torch.allclose(value.float(), model.state_dict()[name].float(), atol=1e-4), name


def test_the_means_agree_afterwards():
    net, batches = coarse(Net()), images()
    model = quantized(net, batches)

    def off():
        found = output_means(model, ["fc"], batches)["fc"] - output_means(net, ["fc"], batches)["fc"]
        return float(found.abs().max())

    before = off()
    correct_biases(model, net, batches)
    assert off() < 1e-5 < before


def test_batches_of_unequal_size_weigh_by_their_images():
    net = coarse(Net())
    batches = [images(1, 30)[0], images(1, 2)[0] * 3]
    means = output_means(net, ["one", "fc"], batches)
    with torch.no_grad():
        whole = net.one(torch.cat(batches)).mean((0, 2, 3))
    assert torch.allclose(means["one"], whole, atol=1e-4)


def test_layers_without_a_place_and_layers_called_twice_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare, self.twice = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.twice(self.twice(self.bare(x)))

    net, batches = coarse(Odd()), images()
    model = quantized(net, batches)
    before = copy.deepcopy(model.state_dict())
    assert correct_biases(model, net, batches) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_linear_layers_on_four_axes_have_their_channels_last():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 7)

        def forward(self, x):
            return self.fc(x.permute(0, 2, 3, 1))

    net, batches = coarse(Last()), images()
    model = quantized(net, batches)
    assert correct_biases(model, net, batches) == ["fc"]
    expected, received = output_means(net, ["fc"], batches), output_means(model, ["fc"], batches)
    assert received["fc"].tolist() == pytest.approx(expected["fc"].tolist(), abs=1e-5)
