"""Images seen through windows: a model or an engine of the windows' size, moved over larger images, its logits averaged.

Shape letters: N images, P windows of an image, K classes, H rows, W columns, C channels, h and w rows and columns of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import model_validator
from torch import Tensor

from edgekd._config import Config
from edgekd.data.base import Dataset, Split
from edgekd.data.masks import STEP_PX


@dataclass(frozen=True)
class Windows:
    """Of a size, a step apart; the last ones end where the image ends."""

    size_px: tuple[int, int]
    """h and w."""
    stride_px: tuple[int, int]
    """From one window to the next, down and across; no larger than the window, or pixels would be left out."""

    def described(self) -> dict[str, list[int]]:
        """As io.json has them."""
        return {"size_px": list(self.size_px), "stride_px": list(self.stride_px)}

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """The top left corners of an image's windows, row by row."""
        rows, columns = (
            _starts(length, size, stride)
            for length, size, stride in zip((height, width), self.size_px, self.stride_px, strict=True)
        )
        return [(top, left) for top in rows for left in columns]

    def average(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """The mean of the logits of all windows that show a pixel.

        Args:
            model: Windows [B, C, h, w] to logits [B, K, h, w].
            images: [B, C, H, W], at least as large as a window.

        Returns:
            float32 [B, K, H, W].
        """
        height, width = images.shape[2:]
        sums: Tensor | None = None
        counts = images.new_zeros(height, width)
        for top, left in self.places(height, width):
            rows, columns = slice(top, top + self.size_px[0]), slice(left, left + self.size_px[1])
            logits = model(images[:, :, rows, columns]).float()
            if sums is None:
                sums = logits.new_zeros(len(images), logits.shape[1], height, width)
            sums[:, :, rows, columns] += logits
            counts[rows, columns] += 1
        assert sums is not None  # there is always a window
        return sums / counts

    def cut(self, split: Split) -> Split:
        """All windows of a split with their labels, image by image: N * P of them."""
        places = self.places(*split.images.shape[1:3])

        def parts(arrays: npt.NDArray[Any]) -> npt.NDArray[Any]:
            high, wide = self.size_px
            found = np.stack([arrays[:, top : top + high, left : left + wide] for top, left in places], axis=1)
            return found.reshape(-1, *found.shape[2:])

        return Split(split.name, parts(split.images), parts(split.labels))

    def stitch(self, logits: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float32]:
        """The logits of images from those of their windows, as :meth:`cut` orders them; pixels that several show are averaged.

        Args:
            logits: [N * P, K, h, w].
            height: H.
            width: W.

        Returns:
            float32 [N, K, H, W].
        """
        places = self.places(height, width)
        by_image = logits.reshape(-1, len(places), *logits.shape[1:])
        sums = np.zeros((len(by_image), logits.shape[1], height, width), np.float32)
        counts = np.zeros((height, width), np.float32)
        for index, (top, left) in enumerate(places):
            rows, columns = slice(top, top + self.size_px[0]), slice(left, left + self.size_px[1])
            sums[:, :, rows, columns] += by_image[:, index]
            counts[rows, columns] += 1
        return sums / counts


class WindowsConfig(Config):
    """Evaluate and deploy on windows of the images, whose logits are averaged where they overlap."""

    size_px: tuple[int, int]
    """Height and width of a window, multiples of 16: what engines take."""
    stride_px: tuple[int, int] | None = None
    """From one window to the next, down and across; null: two thirds of the window."""

    @model_validator(mode="after")
    def _fits(self) -> WindowsConfig:
        if any(not STEP_PX <= side <= 2048 or side % STEP_PX for side in self.size_px):
            raise ValueError(f"size_px must be multiples of {STEP_PX} within {STEP_PX} and 2048; received {list(self.size_px)}")
        stride = self.stride_px or (1, 1)
        if any(not 1 <= step <= side for step, side in zip(stride, self.size_px, strict=True)):
            raise ValueError(f"stride_px must be within 1 and the window's {list(self.size_px)}; received {list(stride)}")
        return self

    def build(self) -> Windows:
        """The windows."""
        return Windows(self.size_px, self.stride_px or (self.size_px[0] * 2 // 3, self.size_px[1] * 2 // 3))


def windowed(data: Dataset, windows: Windows) -> Dataset:
    """The data as an engine of the windows' size sees it; the training images stay whole."""
    val, test, calib = (windows.cut(split) for split in (data.val, data.test, data.calib))
    fingerprint = hashlib.sha256(f"{data.fingerprint} {windows}".encode()).hexdigest()
    return replace(data, val=val, test=test, calib=calib, fingerprint=fingerprint)


def _starts(length: int, size: int, stride: int) -> list[int]:
    return [*range(0, length - size, stride), length - size]
