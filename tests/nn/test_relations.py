"""Attention maps, sizes and embeddings."""

import math

import pytest
import torch

from edgekd.nn.relations import Embedding, attention_map, cosine_similarities, resized, same_size, unit_vectors


def test_attention_map_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    assert attention_map(maps).tolist() == [[[[5.0, 2.0]]]]
    assert attention_map(maps.bfloat16()).dtype == torch.float32
    assert attention_map(maps.double()).dtype == torch.float64


def test_unit_vectors():
    vectors = unit_vectors(torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]]))
    torch.testing.assert_close(vectors, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_cosines_agree_with_loops():
    nodes = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cosine_similarities(nodes)
    for b, image in enumerate(nodes.movedim(1, -1).tolist()):
        for i, one in enumerate(image):
            for j, other in enumerate(image):
                lengths = [math.sqrt(sum(value * value for value in node)) + 1e-8 for node in (one, other)]
                expected = sum(x * y for x, y in zip(one, other, strict=True)) / (lengths[0] * lengths[1])
                assert found[b, i, j].item() == pytest.approx(expected)
    assert found.abs().max() <= 1
    assert cosine_similarities(torch.zeros(1, 2, 3)).abs().max() == 0, "no division by zero"
    assert cosine_similarities(nodes.bfloat16()).dtype == torch.float32


def test_with_its_length_constant_a_node_is_pulled_along_its_own_direction_too():
    nodes = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]], dtype=torch.float64)
    gradients = {}
    for detach in (False, True):
        given = nodes.clone().requires_grad_()
        cosine_similarities(given, detach_norm=detach, epsilon=0.0)[0, 0, 1].backward()
        gradients[detach] = given.grad[0, :, 0].tolist()
    # d/df of f . g / (|f| |g|) with f = (3, 4), g = (1, 0): g / 5, less (f . g) f / 125 where the length follows
    assert gradients[True] == pytest.approx([0.2, 0.0])
    assert gradients[False] == pytest.approx([0.2 - 9 / 125, -12 / 125])


def test_the_larger_map_is_averaged_down():
    one, other = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 3, 2, 8)
    small, narrow = same_size(one, other)
    assert small.shape == (1, 1, 2, 4)
    assert narrow.shape == (1, 3, 2, 4)
    assert small[0, 0].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert resized(one, [4, 4]) is one


def test_an_embedding_is_float32_under_autocast():
    torch.manual_seed(0)
    embedding = Embedding(4, 3, relu=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = embedding(torch.randn(8, 4).bfloat16())
    assert out.dtype == torch.float32
    assert (out >= 0).all()
    assert (Embedding(4, 3, relu=False)(torch.randn(8, 4)) < 0).any()
