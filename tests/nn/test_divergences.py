"""Divergences against loops and hand counts."""

import math

import pytest
import torch

from edgekd.nn.divergences import channel_divergence, pixel_divergence

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean_pixel", "sum_over_batch", "mean_element"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(values, temperature):
    exponents = [math.exp(value / temperature) for value in values]
    return [exponent / sum(exponents) for exponent in exponents]


def divergence(student, teacher, temperature):
    """KL(teacher || student) of two lists of numbers behind a softmax."""
    pairs = zip(shares(student, temperature), shares(teacher, temperature), strict=True)
    return sum(t * math.log(t / s) for s, t in pairs)


def cross_entropy(student, teacher, temperature):
    pairs = zip(shares(student, temperature), shares(teacher, temperature), strict=True)
    return -sum(t * math.log(s) for s, t in pairs)


def over_places(measure, student, teacher, temperature):
    """The sum over all images and places."""
    total = 0.0
    for one, other in zip(student.movedim(1, -1).tolist(), teacher.movedim(1, -1).tolist(), strict=True):
        for ours, theirs in zip(one, other, strict=True):
            total += sum(measure(s, t, temperature) for s, t in zip(ours, theirs, strict=True))
    return total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_channels_agree_with_loops(temperature):
    student, teacher = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    total = 0.0
    for one, other in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        total += sum(divergence(ours, theirs, temperature) for ours, theirs in zip(one, other, strict=True))
    assert channel_divergence(student, teacher, temperature).item() == pytest.approx(total * temperature**2 / (2 * 3))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("form", "measure"), [("kl", divergence), ("ce", cross_entropy)])
@REDUCTIONS
def test_places_agree_with_loops(temperature, form, measure, reduction):
    student, teacher = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    count = {"mean_pixel": 2 * 4 * 5, "sum_over_batch": 4 * 5, "mean_element": 2 * 3 * 4 * 5}[reduction]
    expected = over_places(measure, student, teacher, temperature) * temperature**2 / count
    found = pixel_divergence(student, teacher, temperature, reduction=reduction, form=form)
    assert found.item() == pytest.approx(expected)


def test_two_values_by_hand():
    """Shares of (1/2, 1/2) seen from (3/4, 1/4), over places and over channels."""
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[math.log(3), 0.0]]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert channel_divergence(student, teacher).item() == pytest.approx(expected)
    assert pixel_divergence(student.view(1, 2, 1, 1), teacher.view(1, 2, 1, 1)).item() == pytest.approx(expected)


@pytest.mark.parametrize(("measure", "level"), [(channel_divergence, (2, 3, 1, 1)), (pixel_divergence, (2, 1, 4, 4))])
def test_zero_for_equal_maps_and_blind_to_the_level(measure, level):
    teacher = drawn(2, 3, 4, 4)
    assert measure(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert measure(teacher + drawn(*level, seed=2), teacher).item() == pytest.approx(0, abs=1e-12)
    assert measure(drawn(2, 3, 4, 4, seed=1), teacher).item() > 0


@pytest.mark.parametrize("form", ["kl", "ce"])
def test_the_gradient_of_a_place_is_the_difference_of_the_shares(form):
    student, teacher = drawn(2, 3, 4, 5).requires_grad_(), drawn(2, 3, 4, 5, seed=1)
    pixel_divergence(student, teacher, reduction="sum_over_batch", form=form).backward()
    torch.testing.assert_close(student.grad, (student.detach().softmax(1) - teacher.softmax(1)) / 20)
    equal = teacher.clone().requires_grad_()
    pixel_divergence(equal, teacher, form=form).backward()
    assert equal.grad.abs().max() < 1e-15


def test_the_cross_entropy_of_equal_maps_is_the_teachers_entropy():
    teacher = drawn(2, 3, 4, 5)
    entropy = over_places(cross_entropy, teacher, teacher, 1.0)
    assert pixel_divergence(teacher, teacher, reduction="sum_over_batch", form="ce").item() == pytest.approx(entropy / 20)


@pytest.mark.parametrize("measure", [channel_divergence, pixel_divergence])
def test_gradients(measure):
    teacher = drawn(1, 2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: measure(one, teacher.detach(), 2.0), drawn(1, 2, 3, 3).requires_grad_())
    measure(drawn(1, 2, 3, 3).requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("measure", [channel_divergence, pixel_divergence])
def test_16_bits_are_summed_in_float32(measure):
    student, teacher = drawn(1, 2, 3, 3).bfloat16(), drawn(1, 2, 3, 3, seed=1).bfloat16()
    assert measure(student, teacher).dtype == torch.float32
    assert measure(student, teacher).item() == pytest.approx(measure(student.double(), teacher.double()).item(), rel=1e-5)
