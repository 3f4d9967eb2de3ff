"""Random changes of images and their masks alike: scale and crop, flips, colours.

Ours and not kornia's, as augment.py says. Choices are drawn for the global batch, so that every process can take its share.

Shape letters: B images, H rows, W columns, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from edgekd.data.augment_boxes import GREY, FlipsAndColours, resized
from edgekd.data.base import IGNORE, Split

Array = npt.NDArray[Any]
SIDES_PX = 32
"""Sides of batches are multiples of it: the stride of the coarsest map of common networks."""


class MaskAugmentConfig(FlipsAndColours):
    """Random changes of training images and their masks; off by default."""

    scale: float = Field(0.0, ge=0, lt=1)
    """Enlarge or shrink by a random factor within 1 - scale and 1 + scale, at a random place; what no image covers is ignored."""
    shrink: float = Field(0.0, ge=0, lt=1)
    """Give each batch sides of its own, drawn from the multiples of 32 pixels within 1 - shrink and 1 of the height; the width
    follows. For models that take images of any sides."""

    def sides(self, height: int, width: int, share: float) -> tuple[int, int]:
        """Height and width of a batch's images.

        Args:
            height: Of the data's images.
            width: Of the data's images.
            share: Which of the possible sides, 0..1.
        """
        least = max(1, math.ceil(height * (1 - self.shrink) / SIDES_PX - 1e-9))  # 352 x (1 - 0.36...) may be 224.00000000000003
        heights = [SIDES_PX * number for number in range(least, height // SIDES_PX + 1)]
        if not self.shrink or not heights:
            return height, width
        chosen = heights[min(int(share * len(heights)), len(heights) - 1)]
        return chosen, max(1, round(width * chosen / height / SIDES_PX)) * SIDES_PX


@dataclass(frozen=True)
class MaskDraw:
    """The random choices for one batch."""

    numbers: Tensor
    """float64 [B, 8], uniform in 0..1: scale, place (2), flips (2), hue, saturation, value."""
    share: float
    """Uniform in 0..1: the sides of the whole batch."""

    def part(self, start: int, stop: int) -> MaskDraw:
        """The choices for a stretch of the batch."""
        return MaskDraw(self.numbers[start:stop], self.share)


def draw(batch: int, generator: torch.Generator) -> MaskDraw:
    """Choose for a batch. All numbers are always drawn, so that switching one change off leaves the others as they were."""
    numbers = torch.rand(batch, 8, generator=generator, dtype=torch.float64)
    # the fraction of a sum of uniform numbers is uniform, and independent of any of them
    return MaskDraw(numbers, float(numbers.sum()) % 1)


def transform(split: Split, indices: Array, config: MaskAugmentConfig, choice: MaskDraw) -> tuple[Tensor, Tensor]:
    """The chosen images and masks, changed.

    Args:
        split: What to take from.
        indices: int64 [B].
        config: What is switched on.
        choice: One choice per image.

    Returns:
        uint8 [B, H, W, C], and labels uint8 [B, H, W]; smaller than the data's where ``shrink`` says so.
    """
    height, width, channels = split.images.shape[1:]
    sides = config.sides(height, width, choice.share)
    images = np.empty((len(indices), *sides, channels), dtype=np.uint8)
    labels = np.empty((len(indices), *sides), dtype=np.uint8)
    whole, size = (0.0, 0.0, float(width), float(height)), (sides[1], sides[0])
    for row, index in enumerate(indices.tolist()):
        image, classes = _one(split.images[index], split.labels[index], config, choice.numbers[row].tolist())
        if sides != (height, width):
            image, classes = resized(image, size, whole), resized(classes[..., None], size, whole, nearest=True)[..., 0]
        images[row], labels[row] = image, classes
    return torch.from_numpy(images), torch.from_numpy(labels)


def _one(image: Array, labels: Array, config: MaskAugmentConfig, numbers: list[float]) -> tuple[Array, Array]:
    zoom, down, across, mirror, upside, *colours = numbers
    factor = 1 + config.scale * (2 * zoom - 1)
    if factor != 1:
        image, labels = _scaled(image, labels, factor, down, across)
    if config.flip and mirror < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if config.flip_vertical and upside < 0.5:
        image, labels = image[::-1], labels[::-1]
    return config.coloured(image, colours), labels


def _scaled(image: Array, labels: Array, factor: float, down: float, across: float) -> tuple[Array, Array]:
    """A random part, enlarged; or the whole, shrunk, at a random place."""
    height, width = labels.shape
    high, wide = round(height * factor), round(width * factor)
    if factor > 1:
        # whole pixels of the enlarged image, of which the result shows a part
        top, left = round(down * (high - height)), round(across * (wide - width))
        box = (left / factor, top / factor, min(width, (left + width) / factor), min(height, (top + height) / factor))
        return resized(image, (width, height), box), resized(labels[..., None], (width, height), box, nearest=True)[..., 0]
    high, wide = max(1, high), max(1, wide)
    top, left = round(down * (height - high)), round(across * (width - wide))
    found, classes = np.full_like(image, GREY), np.full_like(labels, IGNORE)
    whole = (0.0, 0.0, float(width), float(height))
    found[top : top + high, left : left + wide] = resized(image, (wide, high), whole)
    classes[top : top + high, left : left + wide] = resized(labels[..., None], (wide, high), whole, nearest=True)[..., 0]
    return found, classes
