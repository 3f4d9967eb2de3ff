"""Random changes of images with boxes: mosaic, scale and shift, flips, colours.

Ours and not kornia's, as augment.py says; a mosaic needs other images of the split besides. Choices are drawn for the global
batch, so that every process can take its share.

Shape letters: B images, S side of an image, C channels, M boxes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.data.base import Split

GREY = 114
"""Fills what no image covers."""
TILES = 4
LEAST_PX, LEAST_SHARE = 2.0, 0.1
"""A box is left out where what remains of it has a smaller side, or is a smaller share of its area."""
Array = npt.NDArray[Any]


class FlipsAndColours(Config):
    """What boxes and masks have in common."""

    flip: bool = False
    """Mirror left and right, half of the images."""
    flip_vertical: bool = False
    """Mirror top and bottom, half of the images; for pictures taken from above."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Multiply the hue by a random factor within 1 - hue and 1 + hue."""
    saturation: float = Field(0.0, ge=0, le=1)
    """The same for the saturation."""
    value: float = Field(0.0, ge=0, le=1)
    """The same for the brightness, of every channel."""

    def coloured(self, image: Array, shares: Sequence[float]) -> Array:
        """An image, uint8 [H, W, C], with other colours.

        Args:
            image: The image.
            shares: Three numbers in 0..1, for hue, saturation and value.
        """
        ranges = (self.hue, self.saturation, self.value)
        return _coloured(image, [1 + gain * (2 * share - 1) for gain, share in zip(ranges, shares, strict=True)])


class BoxAugmentConfig(FlipsAndColours):
    """Random changes of training images; off by default."""

    mosaic: float = Field(0.0, ge=0, le=1)
    """Share of images that are put together of four, around a random centre."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Enlarge or shrink by a random factor within 1 - scale and 1 + scale."""
    translate: float = Field(0.0, ge=0, le=0.5)
    """Shift along each axis by at most so large a share of the side."""


@dataclass(frozen=True)
class BoxDraw:
    """The random choices for one batch."""

    numbers: Tensor
    """float64 [B, 11], uniform in 0..1: mosaic, its centre (2), scale, shift (2), flips (2), hue, saturation, value."""
    others: Tensor
    """int64 [B, 3]: the other images of a mosaic."""

    def part(self, start: int, stop: int) -> BoxDraw:
        """The choices for a stretch of the batch."""
        return BoxDraw(self.numbers[start:stop], self.others[start:stop])


def draw(batch: int, images: int, generator: torch.Generator) -> BoxDraw:
    """Choose for a batch. All numbers are always drawn, so that switching one change off leaves the others as they were."""
    numbers = torch.rand(batch, 11, generator=generator, dtype=torch.float64)
    return BoxDraw(numbers, torch.randint(0, images, (batch, TILES - 1), generator=generator))


def transform(split: Split, indices: Array, config: BoxAugmentConfig, choice: BoxDraw) -> tuple[Tensor, Tensor]:
    """The chosen images, changed.

    Args:
        split: What to take from.
        indices: int64 [B].
        config: What is switched on.
        choice: One choice per image.

    Returns:
        uint8 [B, S, S, C], and labels float32 [B, M, 6] as in edgekd.data.boxes.
    """
    size, channels = split.images.shape[1], split.images.shape[3]
    images = np.empty((len(indices), size, size, channels), dtype=np.uint8)
    boxes: list[Array] = []
    for row, index in enumerate(indices.tolist()):
        images[row], found = _one(split, index, config, choice.numbers[row].tolist(), choice.others[row].tolist())
        boxes.append(found)
    most = max([1, *(len(found) for found in boxes)])
    labels = np.zeros((len(boxes), most, split.labels.shape[2]), dtype=np.float32)
    labels[:, :, 0] = -1
    for row, found in enumerate(boxes):
        labels[row, : len(found)] = found
    return torch.from_numpy(images), torch.from_numpy(labels)


def _one(split: Split, index: int, config: BoxAugmentConfig, numbers: list[float], others: list[int]) -> tuple[Array, Array]:
    mosaic, across, down, zoom, right, below, mirror, upside, hue, saturation, value = numbers
    size = split.images.shape[1]
    if mosaic < config.mosaic:
        # four images meet at a point of a canvas twice as large; a window of its middle is cut out
        x, y = size * (0.5 + across), size * (0.5 + down)
        corners = [(x - size, y - size), (x, y - size), (x - size, y), (x, y)]
        tiles = list(zip([index, *others], corners, strict=True))
        middle = float(size)
    else:
        tiles, middle = [(index, (0.0, 0.0))], size / 2
    factor = 1 + config.scale * (2 * zoom - 1)
    shift = [config.translate * size * (2 * share - 1) for share in (right, below)]
    start = [middle - size / (2 * factor) - move / factor for move in shift]
    if len(tiles) == 1 and factor == 1 and shift == [0, 0]:
        image, boxes = np.array(split.images[index]), _real(split.labels[index])
    else:
        image, boxes = _window(split, tiles, start, factor)
    if config.flip and mirror < 0.5:
        image, boxes[:, [1, 3]] = image[:, ::-1], size - boxes[:, [3, 1]]
    if config.flip_vertical and upside < 0.5:
        image, boxes[:, [2, 4]] = image[::-1], size - boxes[:, [4, 2]]
    return config.coloured(image, (hue, saturation, value)), boxes


def _real(labels: Array) -> Array:
    """The rows that are boxes, as a copy."""
    return np.array(labels[labels[:, 0] >= 0])


def _window(split: Split, tiles: list[tuple[int, tuple[float, float]]], start: list[float], factor: float) -> tuple[Array, Array]:
    """A window of images laid out on a canvas.

    Args:
        split: The images.
        tiles: Image and left top corner on the canvas.
        start: Left top corner of the window on the canvas.
        factor: Pixels of the result per pixel of the canvas.
    """
    size, channels = split.images.shape[1], split.images.shape[3]
    result = np.full((size, size, channels), GREY, dtype=np.uint8)
    boxes = []
    for index, corner in tiles:
        left, top = ((corner[axis] - start[axis]) * factor for axis in (0, 1))
        # whole pixels of the result that the image covers, and the part of the image that they show
        x1, y1 = max(0, round(left)), max(0, round(top))
        x2, y2 = min(size, round(left + size * factor)), min(size, round(top + size * factor))
        rows = _real(split.labels[index])
        if x2 > x1 and y2 > y1:
            edges = ((x1, left), (y1, top), (x2, left), (y2, top))
            x3, y3, x4, y4 = (float(np.clip((edge - offset) / factor, 0, size)) for edge, offset in edges)
            if x4 > x3 and y4 > y3:
                result[y1:y2, x1:x2] = resized(split.images[index], (x2 - x1, y2 - y1), (x3, y3, x4, y4))
        placed = rows[:, 1:5] * factor + np.array([left, top, left, top])
        whole = np.prod(placed[:, 2:] - placed[:, :2], axis=1)
        # never over a neighbour's quarter: the image's own edge ends a box before
        rows[:, 1:5] = np.clip(placed, 0, size)
        sides = rows[:, 3:5] - rows[:, 1:3]
        kept = (sides >= LEAST_PX).all(1) & (np.prod(sides, axis=1) > LEAST_SHARE * whole)
        boxes.append(rows[kept])
    return result, np.concatenate(boxes)


def resized(image: Array, size: tuple[int, int], box: tuple[float, float, float, float], *, nearest: bool = False) -> Array:
    """A part of an image, resized.

    Args:
        image: uint8 [H, W, C].
        size: Width and height of the result.
        box: x1, y1, x2, y2 of the part, in pixels of the image.
        nearest: Take the nearest pixel, where values are no colours; else bilinear.
    """
    from PIL import Image

    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR

    def one(pixels: Array) -> Array:
        return np.asarray(Image.fromarray(pixels).resize(size, how, box=box))

    if image.shape[2] == 3:
        return one(image)
    # Pillow would take a fourth channel for transparency
    return np.stack([one(np.ascontiguousarray(image[:, :, channel])) for channel in range(image.shape[2])], axis=2)


def _coloured(image: Array, gains: list[float]) -> Array:
    """The image with hue, saturation and value multiplied; channels beyond the third, and grey ones, with the value alone."""
    from PIL import Image

    if gains == [1, 1, 1]:
        return image
    steps = np.arange(256)
    brighter = np.clip(steps * gains[2], 0, 255).astype(np.uint8)
    if image.shape[2] < 3:
        return brighter[image]
    if gains[:2] == [1, 1]:
        return brighter[image]  # in HSV the value is the largest channel, and the others follow it
    tables = [(steps * gains[0]).astype(np.int64) % 256, np.clip(steps * gains[1], 0, 255), np.clip(steps * gains[2], 0, 255)]
    hsv = Image.fromarray(np.ascontiguousarray(image[:, :, :3])).convert("HSV")
    rgb = np.asarray(hsv.point(np.concatenate(tables).astype(np.uint8).tolist()).convert("RGB"))
    return rgb if image.shape[2] == 3 else np.concatenate([rgb, brighter[image[:, :, 3:]]], axis=2)
