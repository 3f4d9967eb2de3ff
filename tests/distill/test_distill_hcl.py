"""Hierarchical context loss against loops and hand counts."""

import pytest
import torch

from edgekd.distill.hcl import hierarchical_context


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(image, side):
    """[C][H][W] averaged over a grid whose cells divide the map evenly."""
    size = len(image[0]) // side
    return [
        [
            [sum(channel[r * size + i][c * size + j] for i in range(size) for j in range(size)) / size**2 for c in range(side)]
            for r in range(side)
        ]
        for channel in image
    ]


def mse(one, other):
    flat = [
        (a - b) ** 2
        for x, y in zip(one, other, strict=True)
        for p, q in zip(x, y, strict=True)
        for a, b in zip(p, q, strict=True)
    ]
    return sum(flat) / len(flat)


@pytest.mark.parametrize(("size", "grids"), [(8, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_agrees_with_loops(size, grids):
    student, teacher = drawn(1, 3, size, size), drawn(1, 3, size, size, seed=1)
    one, other = student[0].tolist(), teacher[0].tolist()
    total, weights = mse(one, other), 1.0
    for number, side in enumerate(grids, start=1):
        total += 2**-number * mse(pooled(one, side), pooled(other, side))
        weights += 2**-number
    assert hierarchical_context(student, teacher).item() == pytest.approx(total / weights)


def test_two_rows_by_hand():
    """A map of 2 x 2: only the grid of one cell, with weight 1/2, divided by 1.5."""
    student, teacher = torch.tensor([[[[1.0, 1], [1, 5]]]]), torch.zeros(1, 1, 2, 2)
    assert hierarchical_context(student, teacher).item() == pytest.approx((28 / 4 + 0.5 * 2**2) / 1.5)


def test_a_constant_difference_is_its_square():
    teacher = drawn(2, 3, 8, 8)
    assert hierarchical_context(teacher + 0.5, teacher).item() == pytest.approx(0.25)
    assert hierarchical_context(teacher, teacher).item() == 0


def test_gradients():
    teacher = drawn(1, 2, 8, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: hierarchical_context(one, teacher.detach()), drawn(1, 2, 8, 8).requires_grad_())
    hierarchical_context(drawn(1, 2, 8, 8).requires_grad_(), teacher).backward()
    assert teacher.grad is None
