"""Attention-based feature distillation against loops."""

import math

import pytest
import torch

from edgekd.distill.afd import attention, matched_distance
from edgekd.nn.relations import attention_map, resized, unit_vectors


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_by_loops():
    keys, queries = drawn(2, 3, 2, 5), drawn(2, 2, 5, seed=1)
    found = attention(keys, queries)
    for image in range(2):
        for t in range(2):
            scores = [
                sum(keys[image, s, t, i].item() * queries[image, t, i].item() for i in range(5)) / math.sqrt(5) for s in range(3)
            ]
            total = sum(map(math.exp, scores))
            for s in range(3):
                assert found[image, t, s].item() == pytest.approx(math.exp(scores[s]) / total)


def test_distance_by_loops():
    student = [drawn(2, 3, 4, 4), drawn(2, 5, 2, 2, seed=1)]
    teacher = [drawn(2, 2, 4, 4, seed=2), drawn(2, 6, 2, 2, seed=3), drawn(2, 1, 4, 4, seed=4)]
    weights = torch.softmax(drawn(2, 3, 2, seed=5), 2)
    total = 0.0
    for t, theirs in enumerate(teacher):
        for image in range(2):
            for s, ours in enumerate(student):
                pooled = resized(attention_map(ours), list(theirs.shape[2:]))
                one, other = unit_vectors(pooled)[image], unit_vectors(attention_map(theirs))[image]
                far = sum((a - b) ** 2 for a, b in zip(one.tolist(), other.tolist(), strict=True)) / len(one)
                total += weights[image, t, s].item() * far / 2
    assert matched_distance(student, teacher, weights).item() == pytest.approx(total)


def test_by_hand():
    """One block each: the attention is 1, and the distance that of two orthogonal vectors of two places."""
    one, other = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert matched_distance([one], [other], torch.ones(1, 1, 1)).item() == 1
    assert matched_distance([one], [one], torch.ones(1, 1, 1)).item() == 0


def test_attention_adds_up_to_one_and_prefers_what_fits():
    keys = torch.zeros(1, 3, 1, 4)
    keys[0, 1, 0, 0] = 20.0
    queries = torch.tensor([[[5.0, 0, 0, 0]]])
    found = attention(keys, queries)
    assert found.sum(2).item() == pytest.approx(1)
    assert found.argmax(2).item() == 1


def test_gradients():
    teacher = drawn(2, 2, 3, 3, seed=2).requires_grad_()
    weights = torch.softmax(drawn(2, 1, 1), 2)
    assert torch.autograd.gradcheck(
        lambda one: matched_distance([one], [teacher.detach()], weights), drawn(2, 3, 3, 3).requires_grad_()
    )
    matched_distance([drawn(2, 3, 3, 3).requires_grad_()], [teacher], weights).backward()
    assert teacher.grad is None
