"""Images with masks: a class for every pixel.

Labels of a split are uint8 [N, H, W]: the class of each pixel, or 255 where it is neither trained on nor counted. Splits are in
an order that only the files' names decide: every stretch is a fair sample, so val and calib can be cut off its front.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from edgekd._config import Config
from edgekd.data import cache
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE, Dataset, Images, Labels, Part, assemble, carve, check_images_differ, order_by_hash
from edgekd.data.image_folder import EXTENSIONS, SplitsConfig, names_in_file
from edgekd.data.letterbox import open_image
from edgekd.data.paths import find
from edgekd.errors import DataError

STEP_PX = 16
"""Sides are multiples of it: the coarsest map of edgekd's models has that stride."""


class MasksConfig(Config):
    """Your images with a mask each: single-channel images whose values are classes."""

    kind: Literal["masks"]
    root: str
    """The folder that holds the data; a relative path is looked up under $EDGEKD_DATA, then beside the recipe. A file classes.txt
    in it names the classes, one a line."""
    size_px: tuple[int, int]
    """Height and width, multiples of 16: images are resized (bilinear), masks too (nearest)."""
    splits: SplitsConfig = SplitsConfig()
    """Names of the splits, which `images` and `masks` are made of."""
    images: str = "{split}/images"
    """Folder of a split's images, under root."""
    masks: str = "{split}/masks"
    """Folder of a split's masks; an image and its mask have the same name before the dot. 255 is ignored."""
    valid: str | None = None
    """Folder of masks that are 0 where a pixel is to be ignored, such as outside the field of view of a retinal image."""
    threshold: int | None = Field(default=None, ge=1, le=255)
    """For masks that are pictures of 0 and 255: values of at least it are class 1, all others class 0; null takes values as
    classes."""
    channels: Literal[1, 3] = 3
    """Colour, or 1 for grey."""
    classes: list[str] | None = None
    """Names, in the order of the masks' values; null reads classes.txt, or numbers them."""
    calibration_images: int = Field(default=128, ge=1)
    """Images carved out of train for calib where no split is given for it; at most a tenth of train."""
    val_images: int = Field(default=500, ge=1)
    """Images carved out of train for val where no split is given for it; at most a tenth of train."""
    labelled: float = Field(default=1.0, gt=0, le=1)
    """Share of the training images that keep their labels, always the same images; no pixel of the others counts: for methods
    that learn from unlabelled images too. What learns from labels alone, such as the teacher, does not see the others."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many images per split, for a quick try; always the same ones."""
    cache: Literal["disk", "memory"] = "disk"
    """Decode once into $EDGEKD_CACHE (or ~/.cache/edgekd), or into memory at every start."""
    augment: MaskAugmentConfig = MaskAugmentConfig()
    """Random changes of training images and their masks."""

    @field_validator("size_px")
    @classmethod
    def _sides(cls, sides: tuple[int, int]) -> tuple[int, int]:
        if any(not STEP_PX <= side <= 2048 or side % STEP_PX for side in sides):
            raise ValueError(f"both sides must be multiples of {STEP_PX} within {STEP_PX} and 2048; received {list(sides)}")
        return sides

    @field_validator("images", "masks", "valid")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and "{split}" not in pattern:
            raise ValueError(f"{pattern!r} must contain {{split}}, or all splits would be the same")
        return pattern


@dataclass(frozen=True)
class Item:
    """One image and what belongs to it."""

    image: Path
    mask: Path
    valid: Path | None


def preflight(config: MasksConfig, search: Sequence[Path]) -> None:
    """Check that folders are there, without listing or decoding images.

    Raises:
        DataError: One is missing.
    """
    _folders(config, find(config.root, search))


def load(config: MasksConfig, search: Sequence[Path]) -> Dataset:
    """List, decode and split images and masks.

    Raises:
        DataError: A file is missing, damaged, or two splits share one; the message says what and where.
    """
    root = find(config.root, search)
    folders = _folders(config, root)
    warnings: list[str] = []
    items = {name: _items(name, *paths, limit=config.limit, warnings=warnings) for name, paths in folders.items()}
    check_images_differ({name: [item.image for item in found] for name, found in items.items()})
    parts = {name: _decoded(found, config, warnings) for name, found in items.items()}
    classes = _classes(config, root, parts)
    _check_values(items, parts, classes)
    wanted = {"calib": config.calibration_images, "val": config.val_images}
    carved, notes = carve(parts["train"], {name: count for name, count in wanted.items() if name not in parts})
    train = carved["train"].labels
    train[max(1, round(config.labelled * len(train))) :] = IGNORE  # the order is that of the names' hashes: a fair sample
    return assemble({**parts, **carved}, classes, [*warnings, *notes])


def _folders(config: MasksConfig, root: Path) -> dict[str, tuple[Path, Path, Path | None]]:
    """Split -> folders of images, masks and valid masks."""
    found = {}
    for name, split in config.splits:
        if split is not None:
            images, masks = (_folder(root, pattern.format(split=split), name) for pattern in (config.images, config.masks))
            valid = None if config.valid is None else _folder(root, config.valid.format(split=split), name)
            found[name] = images, masks, valid
    return found


def _folder(root: Path, path: str, name: str) -> Path:
    try:
        folder = find(path, [root])
    except DataError as error:
        optional = name in ("val", "calib")
        raise DataError(
            f"a folder of {name} is missing: {error.message}",
            hint=f"set data.splits.{name}: null to carve it out of train" if optional else "correct data.splits, images or masks",
        ) from error
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder of images of {name}")
    return folder


def _images(folder: Path) -> dict[str, Path]:
    """Name before the dot -> file.

    Raises:
        DataError: Two images have one name.
    """
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if path.suffix.lower() in EXTENSIONS and entry.is_file():
            if path.stem in found:
                raise DataError(f"{path} and {found[path.stem].name} have the same name", hint="keep one of the two")
            found[path.stem] = path
    return found


def _items(name: str, images: Path, masks: Path, valid: Path | None, *, limit: int | None, warnings: list[str]) -> list[Item]:
    """Images with their masks, ordered by the hash of their names."""
    pictures, others = _images(images), _images(masks)
    if not pictures:
        raise DataError(f"no images in {images}", hint=f"images end with: {', '.join(sorted(EXTENSIONS))}")
    if extra := len(set(others) - set(pictures)):
        warnings.append(f"{extra} masks of {masks} have no image and were left out")
    kept = {} if valid is None else _images(valid)
    chosen = order_by_hash(list(pictures), str, limit)
    for stem in chosen:
        for folder, files in ((masks, others), *([(valid, kept)] if valid is not None else [])):
            if stem not in files:
                raise DataError(f"{pictures[stem]} of {name} has no mask in {folder}", hint=f"expected {stem} with any ending")
    return [Item(pictures[stem], others[stem], kept.get(stem)) for stem in chosen]


def _decoded(items: list[Item], config: MasksConfig, warnings: list[str]) -> Part:
    height, width = config.size_px
    # image and mask are one array with one more channel: decoded, cached and checked together
    shape = (len(items), height, width, config.channels + 1)

    def decode(index: int) -> Images:
        return _decode(items[index], config)

    def describe() -> dict[str, Any]:
        files = [path for item in items for path in (item.image, item.mask, item.valid) if path is not None]
        return {
            "masks": [str(path) for path in files],
            "stamps": cache.stamps(files),
            "valid": config.valid is not None,
            "threshold": config.threshold,
        }

    both, digests = cache.decode_all(config.cache, shape, decode, describe, warnings.append)
    return Part(both[..., : config.channels], np.array(both[..., -1]), digests)


def _decode(item: Item, config: MasksConfig) -> Images:
    """Image and mask, uint8 [H, W, C + 1]."""
    from PIL import Image

    height, width = config.size_px
    image = open_image(item.image, "RGB" if config.channels == 3 else "L")
    mask = _open_mask(item.mask)
    if mask.size != image.size:
        sides = " instead of ".join(f"{wide} x {high}" for wide, high in (mask.size, image.size))
        raise DataError(f"{item.mask} has other sides than its image: {sides}", hint="give each image a mask of its own size")
    labels = np.array(mask.resize((width, height), Image.Resampling.NEAREST))
    if config.threshold is not None:
        labels = (labels >= config.threshold).astype(np.uint8)
    if item.valid is not None:
        counted = np.asarray(open_image(item.valid, "L").resize((width, height), Image.Resampling.NEAREST))
        labels[counted == 0] = IGNORE
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, config.channels)
    return np.concatenate([pixels, labels[..., None]], axis=2)


def _open_mask(path: Path) -> Any:
    """A mask as it is: its values, or its palette's indices, are classes."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1"):
                raise ValueError(f"it has colours (mode {file.mode}); a mask has one value a pixel")
            file.load()
            return file.convert("L") if file.mode == "1" else file.copy()
    except Exception as error:  # Pillow's formats raise OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(f"{path} cannot be read as a mask: {error}") from error


def _classes(config: MasksConfig, root: Path, parts: Mapping[str, Part]) -> list[str]:
    if config.classes is not None:
        return config.classes
    if (named := names_in_file(root)) is not None:
        return named
    labels: Labels = parts["train"].labels
    return [str(index) for index in range(int(labels[labels != IGNORE].max(initial=0)) + 1)]


def _check_values(items: Mapping[str, list[Item]], parts: Mapping[str, Part], classes: Sequence[str]) -> None:
    for name, part in parts.items():
        for item, labels in zip(items[name], part.labels, strict=True):
            wrong = labels[(labels != IGNORE) & (labels >= len(classes))]
            if len(wrong):
                raise DataError(
                    f"{item.mask} has the value {int(wrong[0])}; with {len(classes)} classes 0 to {len(classes) - 1} are allowed,"
                    f" and {IGNORE} where a pixel does not count",
                    hint="name all classes in data.classes or classes.txt, or write the masks with the classes' numbers",
                )
