"""From an image file to pixels of the wanted size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.data.base import Images
from edgekd.errors import DataError


def decode_image(path: Path, size_px: int, channels: int) -> Images:
    """Read one image: shorter side resized to ``size_px`` (bicubic, antialiased), then the centre cut out.

    Args:
        path: An 8-bit image that Pillow reads.
        size_px: Height and width of the result.
        channels: 1 or 3.

    Returns:
        uint8 [size_px, size_px, channels].

    Raises:
        DataError: The file is no such image; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":
                raise ValueError(f"its pixels have more than 8 bits (mode {file.mode})")
            # a palette with transparency loses it in two steps, or Pillow warns
            image = (file.convert("RGBA") if file.mode == "P" else file).convert("RGB" if channels == 3 else "L")
            if image.size != (size_px, size_px):
                width, height = image.size
                scale = size_px / min(width, height)
                width, height = max(size_px, round(width * scale)), max(size_px, round(height * scale))
                image = image.resize((width, height), Image.Resampling.BICUBIC)
                left, top = (width - size_px) // 2, (height - size_px) // 2
                image = image.crop((left, top, left + size_px, top + size_px))
            return np.asarray(image).reshape(size_px, size_px, channels)
    except Exception as error:  # Pillow's formats raise OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(f"{path} cannot be read as an image: {error}", hint="repair or remove this file") from error
