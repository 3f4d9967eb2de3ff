"""Random changes of images and their masks alike: scale and crop, flips, colours.

Ours and not kornia's, as augment.py says. Choices are drawn for the global batch, so that every process can take its share.

Shape letters: B images, H rows, W columns, C channels.
"""

from __future__ import annotations

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


class MaskAugmentConfig(FlipsAndColours):
    """Random changes of training images and their masks; off by default."""

    scale: float = Field(0.0, ge=0, lt=1)
    """Enlarge or shrink by a random factor within 1 - scale and 1 + scale, at a random place; what no image covers is ignored."""


@dataclass(frozen=True)
class MaskDraw:
    """The random choices for one batch."""

    numbers: Tensor
    """float64 [B, 8], uniform in 0..1: scale, place (2), flips (2), hue, saturation, value."""

    def part(self, start: int, stop: int) -> MaskDraw:
        """The choices for a stretch of the batch."""
        return MaskDraw(self.numbers[start:stop])


def draw(batch: int, generator: torch.Generator) -> MaskDraw:
    """Choose for a batch. All numbers are always drawn, so that switching one change off leaves the others as they were."""
    return MaskDraw(torch.rand(batch, 8, generator=generator, dtype=torch.float64))


def transform(split: Split, indices: Array, config: MaskAugmentConfig, choice: MaskDraw) -> tuple[Tensor, Tensor]:
    """The chosen images and masks, changed.

    Args:
        split: What to take from.
        indices: int64 [B].
        config: What is switched on.
        choice: One choice per image.

    Returns:
        uint8 [B, H, W, C], and labels uint8 [B, H, W].
    """
    images = np.empty((len(indices), *split.images.shape[1:]), dtype=np.uint8)
    labels = np.empty((len(indices), *split.labels.shape[1:]), dtype=np.uint8)
    for row, index in enumerate(indices.tolist()):
        images[row], labels[row] = _one(split.images[index], split.labels[index], config, choice.numbers[row].tolist())
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
