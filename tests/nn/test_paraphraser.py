"""Paraphrasers: their layers."""

import torch
from torch import nn

from edgekd.nn.paraphraser import Paraphraser


def test_layers_are_those_of_the_specification():
    """256 channels to 24: three convolutions and three transposed ones of 3 x 3 with biases, and nothing else that learns."""
    paraphraser = Paraphraser(256, 24)
    widths = [(256, 256), (256, 24), (24, 24)]
    encoder = sum(9 * before * after + after for before, after in widths)
    decoder = sum(9 * before * after + before for before, after in widths)
    assert sum(value.numel() for value in paraphraser.encoder.parameters()) == encoder
    assert sum(value.numel() for value in paraphraser.decoder.parameters()) == decoder
    kinds = [type(part) for part in [*paraphraser.encoder, *paraphraser.decoder]]
    assert kinds == [nn.Conv2d, nn.LeakyReLU] * 3 + [nn.ConvTranspose2d, nn.LeakyReLU] * 3


def test_shapes_and_signs():
    torch.manual_seed(0)
    paraphraser, maps = Paraphraser(5, 3), torch.randn(2, 5, 4, 6)
    assert paraphraser(maps).shape == (2, 3, 4, 6)
    assert paraphraser.restored(maps).shape == maps.shape
    assert paraphraser.restored(maps).min() < 0, "the last activation lets a tenth of negative values through"
