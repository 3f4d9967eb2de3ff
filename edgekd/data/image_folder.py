"""Images in folders: <root>/<split>/<class>/<file>.

Classes are the class folders sorted by name, or, where <root>/classes.txt exists, its lines in its order. Only files directly in
a class folder count; other files are left out and counted in a warning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from edgekd._config import Config
from edgekd.data import cache
from edgekd.data.augment import AugmentConfig
from edgekd.data.base import Dataset, Images, Labels, Part, assemble, carve, stratified_order
from edgekd.data.decode import decode_image
from edgekd.data.paths import find
from edgekd.errors import DataError, nearest

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class SplitsConfig(Config):
    """Which folder under root holds which split."""

    train: str = "train"
    """Trained on."""
    val: str | None = "val"
    """Watched during training; null carves val_images out of train."""
    test: str = "test"
    """The evaluation split that reports quote."""
    calib: str | None = None
    """Sets activation ranges; null carves calibration_images out of train."""

    @model_validator(mode="after")
    def _distinct(self) -> SplitsConfig:
        names = {name: folder for name, folder in self if folder is not None}
        for one, other in combinations(names, 2):
            if names[one] == names[other]:
                raise ValueError(_clash(one, other, names[one])[0])
        return self


class ImageFolderConfig(Config):
    """Your images, in one folder per class."""

    kind: Literal["image_folder"] = "image_folder"
    root: str
    """The folder that holds the splits; a relative path is looked up under $EDGEKD_DATA, then beside the recipe."""
    splits: SplitsConfig = SplitsConfig()
    """Folders under root."""
    size_px: int = Field(ge=8, le=1024)
    """Height and width: the shorter side is resized to it (bicubic), the longer one cropped; images of this size stay as is."""
    channels: Literal[1, 3] = 3
    """Colour, or 1 for grey."""
    calibration_images: int = Field(default=512, ge=1)
    """Images carved out of train for calib where splits.calib is null; at most a tenth of train."""
    val_images: int = Field(default=1000, ge=1)
    """Images carved out of train for val where splits.val is null; at most a tenth of train."""
    limit_per_class: int | None = Field(default=None, ge=1)
    """Use only so many images per class and split, for a quick try; always the same ones."""
    cache: Literal["disk", "memory"] = "disk"
    """Decode once into $EDGEKD_CACHE (or ~/.cache/edgekd), or into memory at every start."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of one split, in stratified order."""

    folder: Path
    names: list[str]
    """class/file."""
    labels: Labels
    stamps: list[tuple[int, int]]
    """Size in bytes and modification time in nanoseconds."""
    identities: list[tuple[int, int]]
    """Device and inode: two names of one file, through links of any sort, have the same."""
    ignored: int
    """Entries that are no images."""


def preflight(config: ImageFolderConfig, search: Sequence[Path]) -> None:
    """Check folders and classes without listing or decoding the images.

    Raises:
        DataError: A folder is missing, two splits overlap, or their classes differ.
    """
    _classes(config, search)


def load(config: ImageFolderConfig, search: Sequence[Path]) -> Dataset:
    """List, decode and split the images.

    Raises:
        DataError: As :func:`preflight`, and: a class without images, one file in two splits, an unreadable image, a cache folder
            that cannot be written.
    """
    folders, classes = _classes(config, search)
    listings = {name: _list(folder, classes, config.limit_per_class) for name, folder in folders.items()}
    _check_files_differ(listings)
    warnings = [
        f"{listing.ignored} entries of {listing.folder} are no images and were left out"
        for listing in listings.values()
        if listing.ignored
    ]
    parts = {name: _decoded(listing, config, warnings) for name, listing in listings.items()}
    wanted = {"calib": config.calibration_images, "val": config.val_images}
    carved, notes = carve(parts["train"], {name: count for name, count in wanted.items() if name not in parts})
    return assemble({**parts, **carved}, classes, [*warnings, *notes])


def _classes(config: ImageFolderConfig, search: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """The resolved folder of every given split, and the classes, which all of them share."""
    root = find(config.root, search)
    if not root.is_dir():
        raise DataError(f"data.root {root} is a file; expected the folder that holds the splits")
    folders: dict[str, Path] = {}
    for name, folder in config.splits:
        if folder is not None:
            folders[name] = _split_folder(root, name, folder)
    for one, other in combinations(folders, 2):
        if folders[one] == folders[other] or folders[one] in folders[other].parents or folders[other] in folders[one].parents:
            message, hint = _clash(one, other, str(folders[other]))
            raise DataError(message, hint)
    present = {name: {entry.name for entry in os.scandir(folder) if _is_class(entry)} for name, folder in folders.items()}
    classes = _class_names(root, present["train"])
    for name, found in present.items():
        if extra := sorted(found - set(classes)):
            raise DataError(
                f"the class folder {extra[0]!r} is in {folders[name]} but not {_where(root)}{nearest(extra[0], classes)}",
                hint="give every class a folder in every split, or remove the extra one",
            )
        # calib needs no labels, so it need not have every class
        if (absent := [label for label in classes if label not in found]) and name != "calib":
            raise DataError(
                f"the class folder {absent[0]!r} is missing in {folders[name]}", hint="give every class a folder in every split"
            )
    if len(classes) < 2:
        raise DataError(
            f"{folders['train']} has {len(classes)} class folders; at least 2 are needed",
            hint="expected <root>/<split>/<class>/<file>",
        )
    return folders, classes


def _split_folder(root: Path, name: str, folder: str) -> Path:
    try:
        path = find(folder, [root])
    except DataError as error:
        hint = {
            "val": "set data.splits.val: null to carve val_images out of train",
            "calib": "set data.splits.calib: null to carve calibration_images out of train",
        }.get(name, f"correct data.splits.{name}")
        if ".." in Path(folder).parts:  # the folder may well be there, so doing without it is no remedy
            hint = f"correct data.splits.{name}: name a folder under data.root, or give an absolute path"
        there = ", ".join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:8]) or "no folders"
        raise DataError(f"data.splits.{name}: {error.message}; {root} has {there}", hint) from error
    if not path.is_dir():
        raise DataError(f"data.splits.{name}: {path} is a file; expected a folder with one folder per class")
    return path


def _clash(one: str, other: str, folder: str) -> tuple[str, str]:
    """Message and hint for two splits that share a folder."""
    if {one, other} == {"test", "calib"}:
        return (
            f"calib and test share the folder {folder!r}: setting ranges on the evaluation split would flatter its result",
            "set data.splits.calib: null to carve calibration_images out of train",
        )
    return (
        f"{one} and {other} share the folder {folder!r}; splits must be disjoint",
        "give each split a folder of its own, or null",
    )


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _where(root: Path) -> str:
    return "in classes.txt" if (root / "classes.txt").is_file() else "in train"


def _class_names(root: Path, present: set[str]) -> list[str]:
    named = names_in_file(root)
    return sorted(present) if named is None else named


def names_in_file(root: Path) -> list[str] | None:
    """The lines of classes.txt; None where there is no such file.

    Raises:
        DataError: It cannot be read, or names a class twice.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="write one class name per line, in UTF-8") from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} names the class {twice!r} twice", hint="give every class one line")
    return names


def _list(folder: Path, classes: Sequence[str], limit: int | None) -> Listing:
    found: list[tuple[str, int, os.stat_result]] = []
    ignored = 0
    for label, class_name in enumerate(classes):
        if not (folder / class_name).is_dir():
            continue  # only calib may lack a class
        before = len(found)
        with os.scandir(folder / class_name) as entries:
            for entry in entries:
                if os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                    found.append((f"{class_name}/{entry.name}", label, entry.stat()))
                else:
                    ignored += 1
        if len(found) == before:
            extensions = ", ".join(sorted(EXTENSIONS))
            raise DataError(
                f"no images in {folder / class_name}; it has {ignored} other entries", hint=f"images end with: {extensions}"
            )
    if not found:
        raise DataError(f"no images in {folder}", hint="expected <root>/<split>/<class>/<file>")
    order = stratified_order(np.array([label for _, label, _ in found], dtype=np.int64), [name for name, _, _ in found])
    chosen, taken = [], dict.fromkeys(range(len(classes)), 0)
    for index in order.tolist():
        label = found[index][1]
        taken[label] += 1
        if limit is None or taken[label] <= limit:
            chosen.append(found[index])
    # unequal classes are cut to equal ones by a limit, so the shares have changed; the hashes keep the order within a class
    order = stratified_order(np.array([label for _, label, _ in chosen], dtype=np.int64), [name for name, _, _ in chosen])
    chosen = [chosen[index] for index in order.tolist()]
    return Listing(
        folder=folder,
        names=[name for name, _, _ in chosen],
        labels=np.array([label for _, label, _ in chosen], dtype=np.int64),
        stamps=[(status.st_size, status.st_mtime_ns) for _, _, status in chosen],
        identities=[(status.st_dev, status.st_ino) for _, _, status in chosen],
        ignored=ignored,
    )


def _check_files_differ(listings: Mapping[str, Listing]) -> None:
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for split, listing in listings.items():
        for name, identity in zip(listing.names, listing.identities, strict=True):
            other, path = seen.setdefault(identity, (split, str(listing.folder / name)))
            if other != split:
                raise DataError(
                    f"{split} and {other} share a file: {listing.folder / name} is {path}",
                    hint="remove it, or the link to it, from one of the splits",
                )


def _decoded(listing: Listing, config: ImageFolderConfig, warnings: list[str]) -> Part:
    shape = (len(listing.names), config.size_px, config.size_px, config.channels)

    def decode(index: int) -> Images:
        return decode_image(listing.folder / listing.names[index], config.size_px, config.channels)

    def describe() -> dict[str, Any]:
        return {"folder": str(listing.folder), "files": listing.names, "stamps": listing.stamps}

    images, digests = cache.decode_all(config.cache, shape, decode, describe, warnings.append)
    return Part(images, listing.labels, digests)
