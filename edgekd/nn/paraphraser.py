"""An autoencoder that says a teacher's maps in as many channels as the student has.

Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer. NeurIPS 2018, arXiv 1802.04977. As in
WrinkleXuan/Graph-FLow, without batch norms.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

SLOPE = 0.1


class Paraphraser(nn.Module):
    """Three 3x3 convolutions to fewer channels and three transposed ones back, each with a leaky ReLU, the last one too.

    Args:
        channels: Of the teacher's map.
        factors: Of the paraphrase: the student's channels.
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = _layers(nn.Conv2d, (channels, channels, factors, factors))
        self.decoder = _layers(nn.ConvTranspose2d, (factors, factors, channels, channels))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, factors, H, W]."""
        paraphrase: Tensor = self.encoder(maps)
        return paraphrase

    def restored(self, maps: Tensor) -> Tensor:
        """What the decoder makes of the paraphrase: the same shape as the maps'."""
        restored: Tensor = self.decoder(self(maps))
        return restored


def _layers(kind: type[nn.Conv2d | nn.ConvTranspose2d], widths: tuple[int, ...]) -> nn.Sequential:
    parts = [(kind(before, after, 3, padding=1), nn.LeakyReLU(SLOPE)) for before, after in pairwise(widths)]
    return nn.Sequential(*(layer for part in parts for layer in part))
