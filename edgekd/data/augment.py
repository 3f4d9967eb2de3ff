"""Random flips, shifted crops and cutout on whole uint8 batches.

Ours and not kornia's, because kornia works on float images and draws per sample; here a batch stays uint8, a quarter of the
bytes, and a crop is one copy of whole rows. Choices are drawn for the global batch, so that every process can take its share.

Shape letters: B images, H rows, W columns, C channels, P padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from edgekd._config import Config


class AugmentConfig(Config):
    """Random changes of training images; off by default."""

    flip: bool = False
    """Mirror left and right, half of the images."""
    crop_padding_px: int = Field(default=0, ge=0, le=64)
    """Add a black border this wide, then cut the old size out at a random place; 0 does not crop."""
    cutout_px: int = Field(default=0, ge=0, le=256)
    """Blacken a square of this side around a random pixel; it may reach over the edge. 0 does not."""


@dataclass(frozen=True)
class Draw:
    """The random choices for one batch."""

    flip: Tensor
    """bool [B]."""
    shift: Tensor
    """int64 [B, 2]: row and column at which the crop starts in the padded image."""
    centre: Tensor
    """int64 [B, 2]: row and column of the cutout's centre."""

    def part(self, start: int, stop: int) -> Draw:
        """The choices for a stretch of the batch."""
        return Draw(self.flip[start:stop], self.shift[start:stop], self.centre[start:stop])


def draw(batch: int, height: int, width: int, config: AugmentConfig, generator: torch.Generator) -> Draw:
    """Choose for a batch. All numbers are always drawn, so that switching one change off leaves the others as they were."""
    flip = torch.rand(batch, generator=generator) < 0.5
    shift = torch.randint(0, 2 * config.crop_padding_px + 1, (batch, 2), generator=generator)
    rows = torch.randint(0, height, (batch,), generator=generator)
    columns = torch.randint(0, width, (batch,), generator=generator)
    return Draw(flip & config.flip, shift, torch.stack([rows, columns], dim=1))


def transform(images_BHWC: Tensor, config: AugmentConfig, choice: Draw) -> Tensor:
    """Crop, flip, then cut out, as chosen.

    Args:
        images_BHWC: uint8 [B, H, W, C], contiguous.
        config: What is switched on.
        choice: One choice per image.

    Returns:
        uint8 [B, H, W, C].
    """
    B, H, W, C = images_BHWC.shape
    if B == 0:
        return images_BHWC  # a process's share of a short last batch may be empty, and nothing can be unfolded
    if P := config.crop_padding_px:
        padded = F.pad(images_BHWC, (0, 0, P, P, P, P))
        # every run of W * C bytes that starts at a pixel, as a view: one index_select copies whole rows of the crops
        runs = padded.view(-1).unfold(0, W * C, C)
        rows = torch.arange(B)[:, None] * (H + 2 * P) + choice.shift[:, :1] + torch.arange(H)
        images_BHWC = runs.index_select(0, (rows * (W + 2 * P) + choice.shift[:, 1:]).view(-1)).view(B, H, W, C)
    if config.flip:
        images_BHWC = torch.where(choice.flip[:, None, None, None], images_BHWC.flip(2), images_BHWC)
    if side := config.cutout_px:
        top, left = (choice.centre - side // 2).unbind(1)
        in_rows = (torch.arange(H) >= top[:, None]) & (torch.arange(H) < top[:, None] + side)
        in_columns = (torch.arange(W) >= left[:, None]) & (torch.arange(W) < left[:, None] + side)
        images_BHWC = images_BHWC.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[..., None], 0)
    return images_BHWC


def apply(images_BHWC: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Draw for a batch and transform it.

    Args:
        images_BHWC: uint8 [B, H, W, C].
        config: What is switched on.
        generator: The only source of randomness.

    Returns:
        uint8 [B, H, W, C].
    """
    B, H, W, _ = images_BHWC.shape
    return transform(images_BHWC, config, draw(B, H, W, config, generator))
