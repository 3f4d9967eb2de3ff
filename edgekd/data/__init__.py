"""Data: every kind becomes a :class:`Dataset` of decoded uint8 images in four disjoint splits, with classes, boxes or masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edgekd.data import boxes, digits, image_folder, masks
from edgekd.data import callable as by_call
from edgekd.data.base import Dataset, Split
from edgekd.data.boxes import CocoConfig, YoloConfig
from edgekd.data.callable import CallableBoxesConfig, CallableConfig, CallableMasksConfig
from edgekd.data.digits import DigitsConfig
from edgekd.data.image_folder import ImageFolderConfig
from edgekd.data.masks import MasksConfig

AnyData = (
    DigitsConfig
    | ImageFolderConfig
    | CallableConfig
    | CallableBoxesConfig
    | CallableMasksConfig
    | CocoConfig
    | YoloConfig
    | MasksConfig
)
DataConfig = Annotated[AnyData, Field(discriminator="kind")]

__all__ = [
    "CallableBoxesConfig",
    "CallableConfig",
    "CallableMasksConfig",
    "CocoConfig",
    "DataConfig",
    "Dataset",
    "DigitsConfig",
    "ImageFolderConfig",
    "MasksConfig",
    "Split",
    "YoloConfig",
    "load",
    "preflight",
]


def load(config: AnyData, *, search: Sequence[Path]) -> Dataset:
    """Read, decode and check a data set.

    Args:
        config: The recipe's ``data`` section.
        search: Folders in which relative paths are looked up, in order.

    Raises:
        DataError: The data cannot be read or used; the message says what and where.
    """
    if isinstance(config, DigitsConfig):
        return digits.load(config)
    if isinstance(config, ImageFolderConfig):
        return image_folder.load(config, search)
    if isinstance(config, CocoConfig | YoloConfig):
        return boxes.load(config, search)
    if isinstance(config, MasksConfig):
        return masks.load(config, search)
    return by_call.load(config)


def preflight(config: AnyData, *, search: Sequence[Path]) -> None:
    """Cheap checks before any work: paths exist, splits differ, functions can be imported. Nothing is decoded.

    Raises:
        DataError: As :func:`load` would.
    """
    if isinstance(config, ImageFolderConfig):
        image_folder.preflight(config, search)
    elif isinstance(config, CocoConfig | YoloConfig):
        boxes.preflight(config, search)
    elif isinstance(config, MasksConfig):
        masks.preflight(config, search)
    elif isinstance(config, CallableConfig | CallableBoxesConfig | CallableMasksConfig):
        by_call.preflight(config)
