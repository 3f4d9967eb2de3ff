"""From image bytes to a model's input, as io.json describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.engines.base import Array
from edgekd.errors import DataError


def normalize(images_NHWC: NDArray[np.uint8], preprocessing: Mapping[str, Any]) -> Array:
    """(images * scale - mean) / std in float32, transposed.

    Args:
        images_NHWC: uint8 [N, H, W, C], channels in the order of ``preprocessing["color"]``.
        preprocessing: ``scale`` (usually 1/255), ``mean`` and ``std`` (one value per channel, in units of the scaled image),
            ``layout`` (NCHW).

    Returns:
        float32 [N, C, H, W], contiguous.

    Raises:
        DataError: The images are not uint8 [N, H, W, C], or C is not the number of means and standard deviations.
    """
    check(images_NHWC, preprocessing)
    mean, std = (np.asarray(preprocessing[key], np.float32) for key in ("mean", "std"))
    scaled = images_NHWC.astype(np.float32) * np.float32(preprocessing["scale"])
    scaled -= mean
    scaled /= std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def check(images_NHWC: NDArray[Any], preprocessing: Mapping[str, Any]) -> None:
    """Refuse images that the preprocessing does not fit, without reading a pixel.

    Raises:
        DataError: The model takes no images, these are not uint8 [N, H, W, C], or C is not the number of means and standard
            deviations.
    """
    if not preprocessing:
        raise DataError(
            "the model's io.json has no preprocessing: it does not take images",
            hint="give an .npz file with an array for every input",
        )
    mean, std = (np.asarray(preprocessing[key], np.float32) for key in ("mean", "std"))
    if preprocessing.get("layout", "NCHW") != "NCHW":
        raise DataError(f"the model's layout is {preprocessing['layout']!r}; only NCHW is supported")
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or not images_NHWC.shape[3] == mean.size == std.size:
        raise DataError(
            f"expected images as uint8 [N, H, W, {mean.size}]; received {images_NHWC.dtype} {list(images_NHWC.shape)}",
            hint="save the images with numpy.save as uint8, channels last",
        )
