"""Spatial and channel relations against loops."""

import math

import pytest
import torch

from edgekd.distill.scrm import channel_relation, fewer_places, relation_distance, spatial_relation


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(values):
    exponents = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponents) for value in exponents]


def unit(maps):
    """[C][N] with every place scaled to length 1."""
    channels, places = len(maps), len(maps[0])
    norms = [max(math.sqrt(sum(maps[c][n] ** 2 for c in range(channels))), 1e-12) for n in range(places)]
    return [[maps[c][n] / norms[n] for n in range(places)] for c in range(channels)]


def spatial_by_hand(f):
    channels, places = len(f), len(f[0])
    rows = [softmax([sum(f[c][i] * f[c][j] for c in range(channels)) for j in range(places)]) for i in range(places)]
    return [[0.1 * sum(f[c][j] * rows[i][j] for j in range(places)) + f[c][i] for i in range(places)] for c in range(channels)]


def channel_by_hand(f):
    channels, places = len(f), len(f[0])
    gram = [[sum(f[a][n] * f[b][n] for n in range(places)) for b in range(channels)] for a in range(channels)]
    rows = [softmax([max(row) - value for value in row]) for row in gram]
    return [[0.1 * sum(rows[a][b] * f[b][n] for b in range(channels)) + f[a][n] for n in range(places)] for a in range(channels)]


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 2, 3, 1), (2, 5, 2, 3)])
def test_agrees_with_loops(shape):
    student, teacher = drawn(*shape), drawn(*shape, seed=1)
    totals = [[], []]
    for one, other in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        for total, relation in zip(totals, (spatial_by_hand, channel_by_hand), strict=True):
            a, b = relation(unit(one)), relation(unit(other))
            total += [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    expected = sum(sum(total) / len(total) for total in totals)
    assert relation_distance(student, teacher).item() == pytest.approx(expected)


def test_one_place_by_hand():
    """One place and one channel: every softmax is 1, so both relations are 1.1 times the sign."""
    one = torch.tensor([[[2.0]]], dtype=torch.float64)
    assert spatial_relation(one / 2).item() == pytest.approx(1.1)
    assert channel_relation(one / 2).item() == pytest.approx(1.1)
    assert relation_distance(one[..., None], -one[..., None]).item() == pytest.approx(4.4)


def test_zero_for_equal_maps_and_blind_to_the_scale_of_a_place():
    student, teacher = drawn(2, 4, 3, 3), drawn(2, 4, 3, 3, seed=1)
    assert relation_distance(student, student).item() == 0
    scale = drawn(2, 1, 3, 3, seed=2).abs() + 0.1
    torch.testing.assert_close(relation_distance(scale * student, teacher), relation_distance(student, teacher))


def test_gradients():
    teacher = drawn(1, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: relation_distance(one, teacher.detach()), drawn(1, 3, 2, 2).requires_grad_())
    relation_distance(drawn(1, 3, 2, 2).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_large_maps_are_averaged_down():
    assert fewer_places(torch.zeros(1, 2, 64, 64), 1024).shape == (1, 2, 32, 32)
    assert fewer_places(torch.zeros(1, 2, 30, 40), 1024).shape == (1, 2, 15, 20)
    small = torch.zeros(1, 2, 32, 32)
    assert fewer_places(small, 1024) is small
