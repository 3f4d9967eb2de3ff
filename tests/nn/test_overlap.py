"""Soft Dice of maps and of boundaries against numbers by hand and slow loops."""

import pytest
import torch

from edgekd.nn.overlap import boundary_dice_each, inner_edge, soft_dice, soft_dice_each, widened


def maps(seed=0, size=(2, 3, 6, 7)):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def around(image, row, column, size):
    """The values within a square about a place, as a list; outside the image there is nothing."""
    reach = size // 2
    rows, columns = range(max(0, row - reach), row + reach + 1), range(max(0, column - reach), column + reach + 1)
    return [image[r, c].item() for r in rows for c in columns if r < image.shape[0] and c < image.shape[1]]


def slow_boundary(image, size, counted=None):
    """Edges of one map, widened, by loops over places."""
    height, width = image.shape
    outside, edge, wide = 1 - image, torch.zeros_like(image), torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            edge[row, column] = max(around(outside, row, column, 3)) - outside[row, column]
    for row in range(height):
        for column in range(width):
            wide[row, column] = max(around(edge, row, column, size))
    return wide


def slow_dice(ours, theirs):
    both = sizes = 0.0
    for p, q in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
        both, sizes = both + p * q, sizes + p + q
    return 1 - (2 * both + 1) / (sizes + 1)


def test_dice_by_hand():
    ours, theirs = torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([[[[1.0, 0.0]]]])
    assert soft_dice(ours, theirs).item() == pytest.approx(1 - 3 / 3.5)
    assert soft_dice(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == 0, "two empty maps are equal"


def test_dice_agrees_with_a_loop():
    ours, theirs = maps(0), maps(1)
    found = soft_dice_each(ours, theirs)
    for image in range(2):
        for channel in range(3):
            assert found[image, channel].item() == pytest.approx(slow_dice(ours[image, channel], theirs[image, channel]))
    assert soft_dice(ours, theirs).item() == pytest.approx(found.mean().item())
    one = soft_dice_each(ours, theirs[:, :1])
    assert torch.allclose(one[:, 1], soft_dice_each(ours[:, 1:2], theirs[:, :1])[:, 0]), "one map stands beside all"


def test_of_equal_soft_maps_dice_is_not_zero():
    """And its gradient pushes them towards 0 and 1: what lies above half of the others' mean grows."""
    soft = maps().requires_grad_()
    value = soft_dice(soft, soft.detach())
    assert value > 0
    (gradient,) = torch.autograd.grad(value, soft)
    assert gradient.abs().max() > 0
    assert (gradient[soft > 0.9] < 0).all()
    assert (gradient[soft < 0.1] > 0).all()
    assert soft_dice(soft.round(), soft.round()).item() == pytest.approx(0)


@pytest.mark.parametrize("size", [1, 3, 5, 13])
def test_boundaries_agree_with_loops(size):
    ours, theirs = maps(2), maps(3)
    found = boundary_dice_each(ours, theirs, size)
    for image in range(2):
        for channel in range(3):
            expected = slow_dice(*(slow_boundary(part[image, channel], size) for part in (ours, theirs)))
            assert found[image, channel].item() == pytest.approx(expected)


def test_the_edge_lies_inside():
    square = torch.zeros(1, 1, 6, 6)
    square[..., 1:5, 1:5] = 1
    expected = square.clone()
    expected[..., 2:4, 2:4] = 0
    assert torch.equal(inner_edge(square), expected)
    assert torch.equal(widened(expected, 3)[0, 0, 0], torch.ones(6)), "the rows above and below are reached"
    for constant in (0.0, 0.3, 1.0):
        assert inner_edge(torch.full((1, 1, 5, 5), constant)).abs().max() == 0, "the image's own border is no boundary"


def test_pixels_that_do_not_count_are_like_the_outside():
    """Of a map whose last rows do not count, the result is that of the map without these rows."""
    ours, theirs = maps(4), maps(5)
    counted = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    counted[:, :, 4:] = False
    found = boundary_dice_each(ours, theirs, 3, counted)
    assert torch.allclose(found, boundary_dice_each(ours[:, :, :4], theirs[:, :, :4], 3))


def test_gradients():
    ours, theirs = maps(6, (1, 2, 4, 5)).requires_grad_(), maps(7, (1, 2, 4, 5))
    assert torch.autograd.gradcheck(lambda part: soft_dice(part, theirs), ours)
    assert torch.autograd.gradcheck(lambda part: boundary_dice_each(part, theirs, 3), ours)


def test_sixteen_bits_are_summed_in_more():
    ours = torch.full((1, 1, 256, 256), 0.9, dtype=torch.bfloat16)
    assert soft_dice(ours, ours).item() == pytest.approx(1 - ours.double().mean().item(), rel=1e-3)
