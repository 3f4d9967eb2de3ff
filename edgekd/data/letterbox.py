"""Images and boxes on a square: the whole image, its sides in proportion, centred on grey.

Shape letters: M boxes of an image.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.data.base import Images
from edgekd.errors import DataError

GREY = 114
"""Fills what the image does not cover."""
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""Where a file says how it is to be turned, and the values that swap its sides."""
_PNG_SIGNATURE_BYTES, _PNG_CRC_BYTES = 8, 4
_PNG_TELLS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG file that may say it."""


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies on its square."""

    scale: float
    """Pixels of the square per pixel of the image."""
    left: int
    top: int
    width: int
    """Of the scaled image, in pixels."""
    height: int

    def boxes(self, boxes_M4: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """x1, y1, x2, y2 on the square, from pixels of the image."""
        return boxes_M4 * self.scale + np.array([self.left, self.top, self.left, self.top])


def fit(width: int, height: int, size_px: int) -> Letterbox:
    """The place of an image of these sides on a square."""
    scale = size_px / max(width, height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    return Letterbox(scale, (size_px - wide) // 2, (size_px - high) // 2, wide, high)


def displayed_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as it is shown, turned as its file says; only the header is read.

    Raises:
        DataError: The file is no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            width, height = file.size
            # Pillow's own getexif decodes a PNG file, to see what follows its pixels: 46 ms instead of 0.5 at 1024 x 1024
            brief = file.format == "PNG" and not _tells_after_pixels(path)
            exif = Image.Image.getexif(file) if brief else file.getexif()
            turned = exif.get(_EXIF_ORIENTATION) in _TURNED
    except Exception as error:  # Pillow's formats raise OSError, SyntaxError, ValueError, struct.error and others
        raise _unreadable(path, error) from error
    return (height, width) if turned else (width, height)


def _tells_after_pixels(path: Path) -> bool:
    """Whether a PNG file has texts or Exif data after its pixels; chunks are skipped, not read."""
    pixels = False
    with path.open("rb") as stream:
        stream.seek(_PNG_SIGNATURE_BYTES)
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in _PNG_TELLS:
                return True
            pixels = pixels or kind == b"IDAT"
            stream.seek(length + _PNG_CRC_BYTES, 1)
    return False


def decode(path: Path, size_px: int, channels: int, infrared: Path | None = None) -> Images:
    """One image on its square.

    Args:
        path: An 8-bit image that Pillow reads.
        size_px: Side of the square.
        channels: 1 (grey), 3 (RGB), or 4: RGB and the first channel of an infrared image.
        infrared: That image, with 4 channels; it must have the same sides.

    Returns:
        uint8 [size_px, size_px, channels].

    Raises:
        DataError: A file is no such image, or the two differ in size.
    """
    image = open_image(path, "L" if channels == 1 else "RGB")
    colours = _placed(image, size_px)
    if channels != 4:
        return colours
    assert infrared is not None  # the loader names one per image
    other = open_image(infrared, "RGB")
    if other.size != image.size:
        sides = " instead of ".join(f"{width} x {height}" for width, height in (other.size, image.size))
        raise DataError(f"{infrared} has other sides than {path}: {sides}", hint="give images of one scene in one size")
    return np.concatenate([colours, _placed(other.getchannel(0), size_px)], axis=2)


def open_image(path: Path, mode: str) -> Any:
    """A Pillow image as it is shown, turned as its file says, in a mode (RGB or L).

    Raises:
        DataError: The file is no 8-bit image that Pillow reads.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":
                raise ValueError(f"its pixels have more than 8 bits (mode {file.mode})")
            image = ImageOps.exif_transpose(file) or file
            # a palette with transparency loses it in two steps, or Pillow warns
            return (image.convert("RGBA") if image.mode == "P" else image).convert(mode)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _placed(image: Any, size_px: int) -> Images:
    from PIL import Image

    width, height = image.size
    place = fit(width, height, size_px)
    if image.size != (place.width, place.height):
        image = image.resize((place.width, place.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(place.height, place.width, -1)
    square = np.full((size_px, size_px, pixels.shape[2]), GREY, dtype=np.uint8)
    square[place.top : place.top + place.height, place.left : place.left + place.width] = pixels
    return square


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as an image: {error}", hint="repair or remove this file")
