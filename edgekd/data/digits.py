"""The 1,797 handwritten digits that come with scikit-learn: real images, and no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from edgekd._config import Config
from edgekd.data.augment import AugmentConfig
from edgekd.data.base import Dataset, Part, assemble, image_digests, stratified_order

# 1,797 images: test 500, calib 100, val 197, train 1,000
BOUNDS = {"test": (0, 500), "calib": (500, 600), "val": (600, 797), "train": (797, 1797)}


class DigitsConfig(Config):
    """scikit-learn's digits, 8 x 8 with values 0 to 16, enlarged bilinearly. The split is always the same."""

    kind: Literal["digits"] = "digits"
    size_px: int = Field(default=32, ge=8, le=64)
    """Height and width of the images."""
    channels: Literal[1, 3] = 1
    """3 repeats the grey value, for models that expect colour."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""


def load(config: DigitsConfig) -> Dataset:
    """Read, enlarge and split the digits."""
    from PIL import Image
    from sklearn.datasets import load_digits  # imports SciPy: about a second

    bundle = load_digits()
    labels = bundle.target.astype(np.int64)
    order = stratified_order(labels, [str(index) for index in range(len(labels))])
    small = np.rint(bundle.images[order] * (255 / 16)).astype(np.uint8)
    size = (config.size_px, config.size_px)
    grey = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in small])
    images = np.repeat(grey[..., None], config.channels, axis=3)
    whole = Part(images, labels[order], image_digests(images))
    return assemble(
        {name: whole.cut(*bounds, given=True) for name, bounds in BOUNDS.items()}, [str(digit) for digit in range(10)]
    )
