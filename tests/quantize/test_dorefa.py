"""DoReFa's quantizers against loops, stated gradients and invariants."""

import math

import pytest
import torch

from edgekd.quantize import dorefa


def drawn(*shape, seed=0, scale=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def weight_by_hand(weight, bits):
    """The equations, one number at a time."""
    values = [math.tanh(value) for value in weight.flatten().tolist()]
    largest, levels = max(map(abs, values)), 2**bits - 1
    found = []
    for value in values:
        unit = value / (2 * largest) + 0.5
        found.append(2 * round(levels * unit) / levels - 1)  # Python's round: ties to even
    return torch.tensor(found, dtype=torch.float64).view_as(weight)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_those_of_the_equations(bits):
    weight = drawn(4, 3, 3, 3)
    quantized = dorefa.weights(weight, bits)
    torch.testing.assert_close(quantized, weight_by_hand(weight, bits))
    distinct = quantized.unique()
    assert len(distinct) <= 2**bits
    assert quantized.abs().max() == 1
    # every level is an odd multiple of 1 / N, so the set is symmetric and has no zero
    odd = distinct * (2**bits - 1)
    torch.testing.assert_close(odd, odd.round())
    assert (odd.round() % 2 == 1).all()


def test_one_bit_is_the_sign_times_the_mean():
    weight = torch.tensor([-1.0, 0.5, 0.0, 2.5], requires_grad=True)
    quantized = dorefa.weights(weight, 1)
    assert quantized.tolist() == [-1.0, 1.0, 0.0, 1.0]
    (quantized * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert weight.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_full_precision_is_the_identity():
    weight, values = drawn(5), drawn(5, seed=1, scale=3)
    assert dorefa.weights(weight, 32) is weight
    assert dorefa.activations(values, 32) is values, "without the clamp"


@pytest.mark.parametrize("restore", [False, True])
def test_gradient_of_weights(restore):
    """(1 - tanh(W)^2) / max|tanh(W)|: the largest magnitude is a constant, the rounding is passed straight through."""
    weight = drawn(6, 2).requires_grad_()
    above = drawn(6, 2, seed=1)
    (dorefa.weights(weight, 3, restore_scale=restore) * above).sum().backward()
    bent = torch.tanh(weight.detach())
    expected = above * (1 - bent**2) / bent.abs().max()
    torch.testing.assert_close(weight.grad, expected * weight.detach().abs().max() if restore else expected)


def test_the_scale_of_small_weights_does_not_matter():
    weight = drawn(100, scale=1e-3)
    assert torch.equal(dorefa.weights(weight, 4), dorefa.weights(0.01 * weight, 4))
    restored = dorefa.weights(weight, 4, restore_scale=True)
    torch.testing.assert_close(restored, dorefa.weights(weight, 4) * weight.abs().max())


def test_weights_that_are_all_zero_stay_finite():
    weight = torch.zeros(3, requires_grad=True)
    quantized = dorefa.weights(weight, 4)
    quantized.sum().backward()
    assert quantized.tolist() == [0, 0, 0]
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_activations(bits):
    values = torch.tensor([-0.5, 0.0, 0.1, 0.3, 0.5, 0.74, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    quantized = dorefa.activations(values, bits)
    levels = 2**bits - 1
    if bits > 1:
        assert quantized.tolist() == [round(levels * min(max(value, 0), 1)) / levels for value in values.tolist()]
        assert torch.equal(dorefa.activations(quantized, bits), quantized), "idempotent"
    else:
        assert quantized.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    quantized.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0], "the ends of the range pass their gradient"


def test_ties_round_to_even():
    assert dorefa.uniform(torch.tensor([0.5, 1.5, 2.5]) / 3, 2).mul(3).round().tolist() == [0, 2, 2]


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_hold_the_values_exactly_up_to_7_bits(bits, restore):
    weight = drawn(4, 3, 3, 3).float()
    codes, step = dorefa.weight_codes(weight, bits, restore_scale=restore)
    assert codes.dtype == torch.int8
    assert codes.abs().max() == 2**bits - 1
    torch.testing.assert_close(codes * step, dorefa.weights(weight, bits, restore_scale=restore))
    assert dorefa.int8_error(weight, bits) < 1e-6


def test_8_bits_of_256_levels_lose_at_most_half_a_step():
    weight = drawn(2000)
    codes, step = dorefa.weight_codes(weight, 8)
    assert (codes * step - dorefa.weights(weight, 8)).abs().max() <= step / 2 + 1e-9
    assert 0 < dorefa.int8_error(weight, 8) < 0.02


def test_8_bits_of_int8_levels_lose_nothing():
    weight = drawn(2000)
    codes, step = dorefa.weight_codes(weight, 8, levels=dorefa.INT8_LEVELS)
    assert codes.abs().max() == 127
    torch.testing.assert_close(codes * step, dorefa.weights(weight, 8, levels=dorefa.INT8_LEVELS))
