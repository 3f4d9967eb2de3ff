"""The distance of two Gaussians."""

import math

import pytest
import torch

from edgekd.nn.frechet import frechet_distance


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_dimension_by_hand():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0], [9.0]])
    assert frechet_distance(one, other) == pytest.approx((1 - 5) ** 2 + (math.sqrt(2) - 4) ** 2)


def test_diagonal_covariances_by_dimension():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    one, other = signs * torch.tensor([1.0, 2.0]), signs * torch.tensor([3.0, 5.0]) + torch.tensor([0.5, 0.0])
    assert frechet_distance(one, other) == pytest.approx(0.25 + 4 / 3 * ((3 - 1) ** 2 + (5 - 2) ** 2))


@pytest.mark.parametrize("count", [5, 40])
def test_zero_for_itself_symmetric_and_a_shift_squared(count):
    one, other = drawn(count, 12), drawn(count + 3, 12, seed=1) * 2
    shift = drawn(12, seed=2)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-6)
    assert frechet_distance(one, one + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)


def test_single_vectors_have_no_spread():
    assert frechet_distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])) == pytest.approx(25)
