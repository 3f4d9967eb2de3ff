"""Several changed copies of every image of a batch, with its mask: what a network is to say the same of.

Made where the batch is, from torch's generator, whose seed the training loop sets. Data augmentation (augment_masks.py) makes one
image of another; a view stands beside the image that it was made of.

Shape letters: K views, B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.data.base import IGNORE

BRIGHTNESS, CONTRAST, GAMMA = 0.2, 0.3, 0.4
"""The most that is added, and that contrast and the exponent differ from 1: the exponent as e^-0.4 to e^0.4."""
BLUR_PX, NOISE = 1.5, 0.05
"""The largest standard deviations, of the blur in pixels and of the noise in 0..1 units."""
ROTATION_DEGREES, SCALE = 15.0, 0.2
KERNEL_PX = 5


@dataclass(frozen=True)
class Views:
    """K copies of a batch."""

    images: Tensor
    """[K, B, C, H, W], normalised."""
    labels: Tensor
    """uint8 [K, B, H, W]; 255 where the image is not."""
    moved: tuple[bool, ...]
    """Of each view: its pixels stand elsewhere than the image's."""


def make_views(images: Tensor, labels: Tensor, count: int, mean: Tensor, std: Tensor) -> Views:
    """Views of a batch: all with other colours, blur and noise; every second one flipped, turned and scaled too.

    Args:
        images: [B, C, H, W], normalised with ``mean`` and ``std``.
        labels: uint8 [B, H, W], masks.
        count: K.
        mean: [C], in 0..1 units.
        std: [C], in 0..1 units.
    """
    mean, std = (value.view(1, -1, 1, 1).to(images) for value in (mean, std))
    pixels = images * std + mean
    found, classes = [], []
    moved = tuple(index % 2 == 1 for index in range(count))
    with torch.autocast(
        images.device.type, enabled=False
    ):  # places and pixels are no features: 16 bits would shift and band them
        for elsewhere in moved:
            changed, same = (photometric(pixels) - mean) / std, labels
            if elsewhere:
                changed, same = geometric(changed, labels)
            found.append(changed)
            classes.append(same)
    return Views(torch.stack(found), torch.stack(classes), moved)


def photometric(pixels: Tensor) -> Tensor:
    """Random brightness, contrast, gamma, blur and noise, drawn for every image: [B, C, H, W] in 0..1 to the same."""
    batch = len(pixels)
    bright, contrast, gamma, blur, noise = torch.rand(5, batch, 1, 1, 1).to(pixels)
    centre = pixels.mean((1, 2, 3), keepdim=True)
    changed = (pixels - centre) * (1 + CONTRAST * (2 * contrast - 1)) + centre + BRIGHTNESS * (2 * bright - 1)
    changed = changed.clamp(0, 1) ** torch.exp(GAMMA * (2 * gamma - 1))
    changed = _blurred(changed, BLUR_PX * blur.flatten())
    return (changed + NOISE * noise * torch.randn(pixels.shape).to(pixels)).clamp(0, 1)


def _blurred(pixels: Tensor, sigma_B: Tensor) -> Tensor:
    """A Gaussian blur of 5 x 5 pixels with a standard deviation for each image."""
    batch, channels, height, width = pixels.shape
    places = torch.arange(KERNEL_PX, device=pixels.device) - KERNEL_PX // 2
    line = torch.exp(-0.5 * (places / sigma_B.clamp_min(0.1)[:, None]) ** 2)
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(channels, 0).to(pixels.dtype)
    edge = (KERNEL_PX // 2,) * 4
    flat = F.pad(pixels.reshape(1, batch * channels, height, width), edge, mode="replicate")
    flat = F.conv2d(flat, line[:, None, :, None], groups=batch * channels)
    return F.conv2d(flat, line[:, None, None, :], groups=batch * channels).view(pixels.shape)


def geometric(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Random flips, rotations and scales, of images (bilinear, 0 outside) and masks (nearest, 255 outside) alike.

    Args:
        images: [B, C, H, W], normalised.
        labels: uint8 [B, H, W].
    """
    batch, _, height, width = images.shape
    turn, zoom, flip = torch.rand(3, batch)
    angle = math.radians(ROTATION_DEGREES) * (2 * turn - 1)
    factor = 1 / (1 + SCALE * (2 * zoom - 1))
    mirror = torch.where(flip < 0.5, -1.0, 1.0)
    # in coordinates of -1 to 1 over each side: a turn of pixels also has the ratio of the sides
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * factor * angle.cos(), -factor * angle.sin() * height / width
    theta[:, 1, 0], theta[:, 1, 1] = mirror * factor * angle.sin() * width / height, factor * angle.cos()
    grid = F.affine_grid(theta.to(images), [batch, 1, height, width], align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    # shifted by one, so that the 0 outside differs from class 0
    shifted = labels[:, None].to(images.dtype) + 1
    classes = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)[:, 0].round() - 1
    return moved, classes.where(classes >= 0, IGNORE).to(torch.uint8)
