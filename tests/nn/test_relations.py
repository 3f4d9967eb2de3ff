"""Attention maps, sizes and embeddings."""

import torch

from edgekd.nn.relations import Embedding, attention_map, resized, same_size, unit_vectors


def test_attention_map_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    assert attention_map(maps).tolist() == [[[[5.0, 2.0]]]]
    assert attention_map(maps.bfloat16()).dtype == torch.float32
    assert attention_map(maps.double()).dtype == torch.float64


def test_unit_vectors():
    vectors = unit_vectors(torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]]))
    torch.testing.assert_close(vectors, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


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
