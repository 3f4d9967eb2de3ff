"""Fake quantization against slow references written from the equations."""

import math

import pytest
import torch

from edgekd.quantize.fake_quant import (
    SMALLEST_SCALE,
    Int8Weights,
    Quantizer,
    QuantLayer,
    fake_quantize,
    quantized_layer,
    quantized_weight,
    weight_scale,
)


def nearest_code(value, scale, low, high):
    """One value, by hand: divide, round half to even, clamp."""
    return min(max(round(value / scale), low), high)  # Python rounds halves to even


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 127), (0, 255), (-4, 3)])
def test_values(low, high):
    torch.manual_seed(0)
    values, scale = torch.randn(500) * 3, torch.tensor(0.037)
    values[:4] = torch.tensor([0.0, 1e9, -1e9, 0.037 * 2.5])
    expected = [nearest_code(v, float(scale), low, high) * float(scale) for v in values.tolist()]
    received = fake_quantize(values, scale, 0, low, high)
    wrong = (received - torch.tensor(expected)).abs() > 1e-6
    # a value within float32's resolution of a tie may go either way
    assert all(abs(v / float(scale) % 1 - 0.5) < 1e-4 for v in values[wrong].tolist())
    assert wrong.float().mean() < 0.01


def test_values_per_channel():
    weight, scale = torch.randn(3, 2, 5), torch.tensor([0.01, 0.1, 1.0])
    received = fake_quantize(weight, scale, 0, -127, 127)
    for channel in range(3):
        torch.testing.assert_close(received[channel], fake_quantize(weight[channel], scale[channel], 0, -127, 127))


def test_gradients_are_those_of_lsq():
    """Equations 3 and 5 of arXiv 1902.08153, value by value."""
    torch.manual_seed(1)
    values = (torch.randn(200) * 2).requires_grad_()
    scale = torch.tensor(0.11, requires_grad=True)
    weight = torch.randn(200)
    (fake_quantize(values, scale, 0, -8, 7) * weight).sum().backward()
    to_scale = 0.0
    for value, gradient, received in zip(values.tolist(), weight.tolist(), values.grad.tolist(), strict=True):
        ratio = value / 0.11
        if ratio <= -8:
            to_scale += gradient * -8
            assert received == 0
        elif ratio >= 7:
            to_scale += gradient * 7
            assert received == 0
        else:
            to_scale += gradient * (round(ratio) - ratio)
            assert received == pytest.approx(gradient)
    assert float(scale.grad) == pytest.approx(to_scale, rel=1e-4)


def test_gradient_per_channel_scale():
    values, scale = torch.randn(4, 6), torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    fake_quantize(values, scale, 0, -8, 7).square().sum().backward()
    for channel in range(4):
        alone = scale.detach()[channel].clone().requires_grad_()
        fake_quantize(values[channel], alone, 0, -8, 7).square().sum().backward()
        assert float(scale.grad[channel]) == pytest.approx(float(alone.grad), rel=1e-5)


def test_the_gradient_of_a_learned_scale_does_not_grow_with_the_number_of_values():
    """Section 2.2 of the paper: without it, scales of large tensors would move faster."""
    sizes = (100, 10_000)
    gradients = []
    for size in sizes:
        torch.manual_seed(2)
        quantizer = Quantizer(signed=True, learned=True)
        with torch.no_grad():
            quantizer.log_scale.fill_(math.log(0.02))
        quantizer(torch.full((1, size), 0.033)).sum().backward()
        gradients.append(float(quantizer.log_scale.grad))
    assert gradients[1] / gradients[0] == pytest.approx(math.sqrt(sizes[1] / sizes[0]), rel=1e-4)  # and not 100


def test_the_gradient_of_a_learned_scale_is_the_same_however_a_batch_is_shared_out():
    torch.manual_seed(3)
    images = torch.randn(8, 3, 4, 4)
    gradients = []
    for parts in (1, 2, 8):
        quantizer = Quantizer(signed=True, learned=True)
        with torch.no_grad():
            quantizer.log_scale.fill_(math.log(0.02))
        for part in images.chunk(parts):
            (quantizer(part).square().sum() / len(images)).backward()
        gradients.append(float(quantizer.log_scale.grad))
    assert gradients == pytest.approx([gradients[0]] * 3, rel=1e-4)


def test_a_step_never_becomes_zero_or_negative():
    quantizer = Quantizer(signed=True, learned=True)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(torch.randn(64)).square().sum().backward()
        optimizer.step()
        assert float(quantizer.scale().detach()) > 0


def test_weights_lose_at_most_half_a_step_and_reach_the_largest_code():
    weight = torch.randn(8, 4, 3, 3)
    scale = weight_scale(weight)
    rounded = quantized_weight(weight)
    column = scale.view(-1, 1, 1, 1)
    assert ((rounded - weight).abs() <= column / 2 * (1 + 1e-5)).all()
    codes = rounded / column
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert (codes.flatten(1).abs().amax(1).round() == 127).all()


def test_a_transposed_convolution_has_a_scale_per_output_channel():
    weight = torch.randn(3, 5, 2, 2) * torch.logspace(-3, 1, 5).view(1, 5, 1, 1)
    scale = weight_scale(weight, 1)
    torch.testing.assert_close(scale, weight.abs().amax((0, 2, 3)) / 127)
    assert ((quantized_weight(weight, 1) - weight).abs() <= scale.view(1, 5, 1, 1) / 2 * (1 + 1e-5)).all()


def test_a_channel_of_zeros_stays_zero():
    weight = torch.randn(2, 3)
    weight[0] = 0
    assert float(weight_scale(weight)[0]) == SMALLEST_SCALE
    assert (quantized_weight(weight)[0] == 0).all()


def test_the_gradient_passes_the_weights_unchanged():
    weight = torch.randn(4, 5, requires_grad=True)
    quantized_weight(weight).sum().backward()
    assert (weight.grad == 1).all()


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=2),
        torch.nn.Conv2d(4, 6, 1, bias=False, padding_mode="reflect", padding=0),
        torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        torch.nn.Linear(4, 6),
    ],
)
def test_a_quantized_layer_takes_over_the_parameters(layer):
    twin = quantized_layer(layer, Int8Weights())
    assert isinstance(twin, QuantLayer)
    assert twin.weight is layer.weight
    assert twin.bias is layer.bias
    assert list(twin.state_dict()) == list(layer.state_dict())
    images = torch.randn(2, 4) if isinstance(layer, torch.nn.Linear) else torch.randn(2, 4, 8, 8)
    axis = int(isinstance(layer, torch.nn.ConvTranspose2d))
    with torch.no_grad():
        expected = torch.func.functional_call(layer, {"weight": quantized_weight(layer.weight, axis)}, (images,))
    torch.testing.assert_close(twin(images), expected)


def test_half_precision_values_come_back_as_they_came():
    quantizer = Quantizer(signed=True, learned=False)
    assert quantizer(torch.randn(5, dtype=torch.bfloat16)).dtype == torch.bfloat16
