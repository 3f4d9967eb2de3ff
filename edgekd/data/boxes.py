"""Data sets with boxes: COCO's annotation files, and YOLO's label files.

Labels of a split are float32 [N, M, 6], M the most boxes of any of its images: class, x1, y1, x2, y2 in pixels of the letterboxed
image (x to the right, y down), and 1 where a box is to be ignored: it is neither trained on nor counted. Rows without a box have
class -1.

Splits are in an order that only the files' names decide: every stretch is a fair sample, so val and calib can be cut off its
front.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from edgekd._config import Config
from edgekd.data import cache, letterbox
from edgekd.data.augment_boxes import BoxAugmentConfig
from edgekd.data.base import Dataset, Images, Labels, Part, assemble, carve, check_images_differ, order_by_hash
from edgekd.data.image_folder import EXTENSIONS, SplitsConfig
from edgekd.data.paths import find
from edgekd.errors import DataError, nearest

COLUMNS = 6
"""class, x1, y1, x2, y2, ignore."""
SMALLEST_PX = 2.0
"""Boxes with a smaller side on the letterboxed image are left out: no cell of a detector sees them."""
LARGEST_PX = 2048
"""Side of images at most."""
STEP_PX = 16
"""Images have a multiple of it as their side: the coarsest head of edgekd's detectors has that stride."""


class _BoxesConfig(Config):
    """What both kinds have in common."""

    root: str
    """The folder that holds the data; a relative path is looked up under $EDGEKD_DATA, then beside the recipe."""
    size_px: int = Field(ge=32, le=LARGEST_PX, multiple_of=STEP_PX)
    """Height and width, a multiple of 16: images are scaled to fit, and the rest is grey (letterbox)."""
    channels: Literal[1, 3, 4] = 3
    """Colour, grey (1), or colour and infrared (4)."""
    infrared: str | None = None
    """With 4 channels: where the infrared image of an image is, `{folder}` being its folder, `{stem}` and `{suffix}` its name,
    and `{prefix}` its stem up to the last underscore: `{folder}/../infrared/{stem}{suffix}`, or, of a_co.png and a_ir.png in one
    folder, `{folder}/{prefix}_ir{suffix}`."""
    calibration_images: int = Field(default=128, ge=1)
    """Images carved out of train for calib where no split is given for it; at most a tenth of train."""
    val_images: int = Field(default=500, ge=1)
    """Images carved out of train for val where no split is given for it; at most a tenth of train."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many images per split, for a quick try; always the same ones."""
    cache: Literal["disk", "memory"] = "disk"
    """Decode once into $EDGEKD_CACHE (or ~/.cache/edgekd), or into memory at every start."""
    augment: BoxAugmentConfig = BoxAugmentConfig()
    """Random changes of training images."""

    @model_validator(mode="after")
    def _infrared(self) -> _BoxesConfig:
        if (self.channels == 4) != (self.infrared is not None):
            raise ValueError("channels: 4 and infrared belong together: give both or neither")
        return self


class CocoConfig(_BoxesConfig):
    """Your images with boxes in COCO's JSON files."""

    kind: Literal["coco"]
    splits: SplitsConfig = SplitsConfig()
    """Names of the splits, which `images` and `annotations` are made of."""
    images: str = "{split}/images"
    """Folder of a split's images, under root."""
    annotations: str = "annotations/{split}.json"
    """Annotation file of a split, under root. `iscrowd: 1` marks boxes that are ignored."""

    @field_validator("images", "annotations")
    @classmethod
    def _pattern(cls, pattern: str) -> str:
        if "{split}" not in pattern:
            raise ValueError(f"{pattern!r} must contain {{split}}, or all splits would be the same")
        return pattern


class YoloConfig(_BoxesConfig):
    """Your images with boxes in YOLO's text files: images/a/b.jpg has labels/a/b.txt."""

    kind: Literal["yolo"]
    file: str = "data.yaml"
    """The file under root that names classes (`names`) and the folders of the splits (`train`, `val`, `test`, and `calib`)."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of one split, before they are decoded."""

    paths: list[Path]
    sizes: list[tuple[int, int]]
    """Width and height of each image as it is shown."""
    boxes: list[npt.NDArray[np.float64]]
    """Per image [M, 6]; boxes in pixels of the image as it is shown."""
    warnings: list[str] = field(default_factory=list)


def preflight(config: CocoConfig | YoloConfig, search: Sequence[Path]) -> None:
    """Check that folders and files are there, without reading annotations or images.

    Raises:
        DataError: One is missing.
    """
    root = find(config.root, search)
    if isinstance(config, CocoConfig):
        _coco_files(config, root)
    else:
        _yolo_file(config, root)


def load(config: CocoConfig | YoloConfig, search: Sequence[Path]) -> Dataset:
    """Read annotations, decode and split the images.

    Raises:
        DataError: A file is missing, damaged, or holds what no detector can learn from; the message says what and where.
    """
    root = find(config.root, search)
    listings, classes = _coco(config, root) if isinstance(config, CocoConfig) else _yolo(config, root)
    check_images_differ({name: listing.paths for name, listing in listings.items()})
    warnings = [warning for listing in listings.values() for warning in listing.warnings]
    parts = {name: _decoded(name, listing, config, warnings) for name, listing in listings.items()}
    wanted = {"calib": config.calibration_images, "val": config.val_images}
    carved, notes = carve(parts["train"], {name: count for name, count in wanted.items() if name not in parts})
    return assemble({**parts, **carved}, classes, [*warnings, *notes])


# --- COCO


def _coco_files(config: CocoConfig, root: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> its image folder and annotation file."""
    found = {}
    for name, split in config.splits:
        if split is not None:
            images = _under(root, config.images.format(split=split), f"images of {name}", name)
            annotations = _under(root, config.annotations.format(split=split), f"annotations of {name}", name)
            if not images.is_dir():
                raise DataError(f"the images of {name} are no folder: {images}", hint="correct data.splits or data.images")
            found[name] = images, annotations
    return found


def _under(root: Path, path: str, what: str, name: str) -> Path:
    try:
        return find(path, [root])
    except DataError as error:
        optional = name in ("val", "calib")
        raise DataError(
            f"the {what} are missing: {error.message}",
            hint=f"set data.splits.{name}: null to carve it out of train"
            if optional
            else "correct data.splits, data.images or data.annotations",
        ) from error


def _coco(config: CocoConfig, root: Path) -> tuple[dict[str, Listing], list[str]]:
    files = _coco_files(config, root)
    contents = {name: _read_json(annotations) for name, (_, annotations) in files.items()}
    categories = _categories(files["train"][1], contents["train"])
    for name, content in contents.items():
        other = _categories(files[name][1], content)
        if other != categories:
            raise DataError(f"{files[name][1]} has other categories than {files['train'][1]}", hint="give all splits the same")
    ids = {number: index for index, number in enumerate(sorted(categories))}
    listings = {
        name: _coco_listing(images, annotations, contents[name], ids, config) for name, (images, annotations) in files.items()
    }
    return listings, [categories[number] for number in sorted(categories)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="expected a COCO annotation file in JSON") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{path} has no list {key!r}", hint="expected a COCO annotation file: images, annotations, categories"
            )
    found: dict[str, Any] = content
    return found


def _categories(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """Id -> name, of the annotation file."""
    found: dict[int, str] = {}
    for index, entry in enumerate(content["categories"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or not isinstance(entry.get("name"), str):
            raise DataError(f"{path}: categories[{index}] needs an id (a whole number) and a name")
        if entry["id"] in found:
            raise DataError(f"{path}: two categories have the id {entry['id']}")
        found[entry["id"]] = entry["name"]
    if not found:
        raise DataError(f"{path} has no categories", hint="name at least one class")
    return found


def _coco_listing(
    images: Path, annotations: Path, content: Mapping[str, Any], ids: Mapping[int, int], config: CocoConfig
) -> Listing:
    names: dict[int, str] = {}
    stated: dict[int, tuple[Any, Any]] = {}
    seen: set[str] = set()
    for index, entry in enumerate(content["images"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or not isinstance(entry.get("file_name"), str):
            raise DataError(f"{annotations}: images[{index}] needs an id (a whole number) and a file_name")
        if entry["id"] in names:
            raise DataError(f"{annotations}: two images have the id {entry['id']}")
        if entry["file_name"] in seen:
            raise DataError(f"{annotations} lists the image {entry['file_name']} twice", hint="merge the two, with their boxes")
        seen.add(entry["file_name"])
        names[entry["id"]] = entry["file_name"]
        stated[entry["id"]] = entry.get("width"), entry.get("height")
    rows: dict[int, list[list[float]]] = {number: [] for number in names}
    for index, entry in enumerate(content["annotations"]):
        where = f"{annotations}: annotations[{index}]"
        if not isinstance(entry, dict) or not _is_id(entry.get("image_id"), rows):
            raise DataError(f"{where} belongs to an image that the file does not list")
        if not _is_id(entry.get("category_id"), ids):
            raise DataError(f"{where} has the category_id {entry.get('category_id')!r}; the file lists {sorted(ids)}")
        x, y, width, height = _four_numbers(where, entry.get("bbox"))
        rows[entry["image_id"]].append([ids[entry["category_id"]], x, y, x + width, y + height, float(entry.get("iscrowd") == 1)])
    chosen = order_by_hash(sorted(names, key=lambda number: names[number]), lambda number: names[number], config.limit)
    warnings = _left_out(images, seen, config.infrared)
    for number in chosen:
        if not (images / names[number]).is_file():
            raise DataError(
                f"{annotations} names the image {names[number]}, which is not in {images}", hint="correct data.images"
            )
    sizes = [letterbox.displayed_size(images / names[number]) for number in chosen]
    # boxes are pixels, so they belong to other pixels where an image was resized or turned after it was annotated
    other = [
        (names[number], size)
        for number, size in zip(chosen, sizes, strict=True)
        if all(isinstance(side, int) for side in stated[number]) and stated[number] != size
    ]
    if other:
        name, (width, height) = other[0]
        warnings.append(
            f"{len(other)} images have other sides than {annotations} says, for instance {name}, which is shown as"
            f" {width} x {height}: their boxes may be misplaced"
        )
    return Listing(
        [images / names[number] for number in chosen],
        sizes,
        [np.array(rows[number], dtype=np.float64).reshape(-1, COLUMNS) for number in chosen],
        warnings,
    )


def _is_id(value: Any, known: Mapping[int, Any]) -> bool:
    return isinstance(value, int | float) and value in known  # a list could not even be looked up


def _four_numbers(where: str, box: Any) -> tuple[float, float, float, float]:
    numbers = box if isinstance(box, list) else []
    if len(numbers) == 4 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        with contextlib.suppress(OverflowError):  # JSON's whole numbers have no end
            x, y, width, height = map(float, numbers)
            if np.isfinite([x, y, width, height]).all():
                return x, y, width, height
    raise DataError(f"{where}: bbox is {str(box)[:80]}; expected [x, y, width, height] in pixels")


def _left_out(folder: Path, named: set[str], infrared: str | None) -> list[str]:
    present = {entry.name for entry in os.scandir(folder) if os.path.splitext(entry.name)[1].lower() in EXTENSIONS}
    extra = len(present - {Path(name).name for name in named} - {path.name for path in _beside(folder, named, infrared)})
    return [f"{extra} images of {folder} have no entry in their annotation file and were left out"] if extra else []


# --- YOLO


class _YoloFile(Config):
    """What data.yaml says; Ultralytics' other keys are allowed and not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    train: str | list[str]
    test: str | list[str]
    names: list[str] | dict[int, str]
    path: str | None = None
    val: str | list[str] | None = None
    calib: str | list[str] | None = None


def _yolo_file(config: YoloConfig, root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The folders of every split, and the classes."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = find(config.file, [root])
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        read = _YoloFile.model_validate(content)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}", hint="expected names, train and test, and optionally path, val and calib"
        ) from error
    names = read.names if isinstance(read.names, list) else [read.names[index] for index in _contiguous(path, read.names)]
    if not names:
        raise DataError(f"{path}: names is empty", hint="name at least one class")
    base = _yolo_base(read.path, path.parent, root)
    folders = {}
    for split in ("train", "val", "test", "calib"):
        given = getattr(read, split)
        if given is not None:
            folders[split] = [_yolo_folder(folder, base) for folder in ([given] if isinstance(given, str) else given)]
    return folders, names


def _yolo_base(given: str | None, folder: Path, root: Path) -> Path:
    """What the folders of the splits are relative to."""
    if given is None:
        return folder
    try:
        return find(given, [folder, root])
    except DataError:
        if Path(given).is_absolute():
            raise
        return folder  # it is relative to a setting of Ultralytics, and data.root already says where the data is


def _yolo_folder(given: str, base: Path) -> Path:
    try:
        return find(given, [base])
    except DataError:
        if not given.startswith("../"):
            raise
        return find(given.removeprefix("../"), [base])  # as Ultralytics reads it: exported files begin so


def _contiguous(path: Path, names: Mapping[int, str]) -> range:
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{path}: names has the keys {sorted(names)}; expected 0 to {len(names) - 1}")
    return range(len(names))


def _yolo(config: YoloConfig, root: Path) -> tuple[dict[str, Listing], list[str]]:
    folders, names = _yolo_file(config, root)
    return {split: _yolo_listing(split, found, len(names), config) for split, found in folders.items()}, names


def _yolo_listing(split: str, folders: Sequence[Path], classes: int, config: YoloConfig) -> Listing:
    paths: list[Path] = []
    for folder in folders:
        if folder.is_file():  # a list of images, a path a line
            paths += [find(line.strip(), [folder.parent]) for line in _lines(folder) if line.strip()]
        else:
            paths += [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()]
    infrared = {_infrared_path(path, config.infrared) for path in paths}
    paths = [path for path in paths if path not in infrared]
    if not paths:
        extensions = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{split} has no images in {', '.join(map(str, folders))}", hint=f"images end with: {extensions}")
    chosen = order_by_hash(sorted(set(paths)), lambda path: f"{path.parent.name}/{path.name}", config.limit)
    sizes = [letterbox.displayed_size(path) for path in chosen]
    missing, boxes = 0, []
    for path, size in zip(chosen, sizes, strict=True):
        label = _label_file(path)
        missing += not label.is_file()
        boxes.append(_yolo_boxes(label, size, classes) if label.is_file() else np.zeros((0, COLUMNS)))
    if missing == len(chosen):
        raise DataError(
            f"no image of {split} has a label file; {_label_file(chosen[0])} was expected",
            hint="name the image folder images and the label folder labels",
        )
    return Listing(chosen, sizes, boxes, [f"{missing} images of {split} have no label file: taken as empty"] if missing else [])


def _label_file(image: Path) -> Path:
    """images/.../a.jpg -> labels/.../a.txt: the last folder called images counts."""
    parts = list(image.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="expected text in UTF-8") from error


def _yolo_boxes(label: Path, size: tuple[int, int], classes: int) -> npt.NDArray[np.float64]:
    rows = []
    width, height = size
    for number, line in enumerate(_lines(label), start=1):
        if not line.strip():
            continue
        words = line.split()
        try:
            index, x, y, wide, high = int(words[0]), *map(float, words[1:])
        except ValueError as error:
            raise DataError(f"{label}:{number}: expected `class x y width height`, received {line.strip()!r}") from error
        if not 0 <= index < classes:
            raise DataError(f"{label}:{number}: class {index}; the file of the data set names {classes} classes, from 0")
        if not all(np.isfinite(value) and -0.5 <= value <= 1.5 for value in (x, y, wide, high)):
            raise DataError(f"{label}:{number}: {line.strip()!r}: positions are shares of the image, 0 to 1")
        left, top = (x - wide / 2) * width, (y - high / 2) * height
        rows.append([index, left, top, left + wide * width, top + high * height, 0.0])
    return np.array(rows, dtype=np.float64).reshape(-1, COLUMNS)


# --- both


def _decoded(name: str, listing: Listing, config: CocoConfig | YoloConfig, warnings: list[str]) -> Part:
    if not listing.paths:
        raise DataError(f"the split {name} has no images")
    size, shape = config.size_px, (len(listing.paths), config.size_px, config.size_px, config.channels)
    infrared = [_infrared(path, config.infrared) for path in listing.paths]

    def decode(index: int) -> Images:
        return letterbox.decode(listing.paths[index], size, config.channels, infrared[index])

    def describe() -> dict[str, Any]:
        files = [path for path in (*listing.paths, *infrared) if path is not None]
        return {"letterbox": [str(path) for path in files], "stamps": cache.stamps(files)}

    images, digests = cache.decode_all(config.cache, shape, decode, describe, warnings.append)
    return Part(images, _labels(name, listing, size, warnings), digests)


def _infrared_path(path: Path, pattern: str | None) -> Path | None:
    if pattern is None:
        return None
    prefix = path.stem.rpartition("_")[0] or path.stem
    parts = {"folder": path.parent, "prefix": prefix, "stem": path.stem, "suffix": path.suffix}
    try:
        return Path(os.path.normpath(pattern.format(**parts)))
    except (KeyError, IndexError, ValueError) as error:
        near = nearest(str(error.args[0]), list(parts))
        raise DataError(f"data.infrared: {pattern!r}: unknown {error}{near}; allowed: {', '.join(parts)}") from error


def _beside(folder: Path, names: set[str], pattern: str | None) -> list[Path]:
    """The infrared images of these images that lie in the same folder."""
    found = [_infrared_path(folder / name, pattern) for name in names]
    return [path for path in found if path is not None and path.parent == folder]


def _infrared(path: Path, pattern: str | None) -> Path | None:
    found = _infrared_path(path, pattern)
    if found is not None and not found.is_file():
        raise DataError(f"the infrared image of {path} is missing: {found}", hint="correct data.infrared")
    return found


def _labels(name: str, listing: Listing, size: int, warnings: list[str]) -> Labels:
    """Boxes on the letterboxed squares, clipped, padded to the largest number: float32 [N, M, 6]."""
    clipped = dropped = 0
    found = []
    for (width, height), rows in zip(listing.sizes, listing.boxes, strict=True):
        place = letterbox.fit(width, height, size)
        edges = np.array([width, height, width, height], dtype=np.float64)
        inside = np.clip(rows[:, 1:5], 0, edges)
        clipped += int((np.abs(inside - rows[:, 1:5]).max(1, initial=0) > 1).sum())  # annotators round to whole pixels
        placed = place.boxes(inside)
        kept = ((placed[:, 2:] - placed[:, :2]) >= SMALLEST_PX).all(1)
        dropped += int((~kept).sum())
        found.append(np.concatenate([rows[kept, :1], placed[kept], rows[kept, 5:]], axis=1))
    if clipped:
        warnings.append(f"{clipped} boxes of {name} reach beyond their images and were cut")
    if dropped:
        warnings.append(f"{dropped} boxes of {name} have a side under {SMALLEST_PX:g} pixels at {size} px and were left out")
    return padded(found)


def padded(boxes: Sequence[npt.NDArray[Any]]) -> Labels:
    """Rows of each image as one array, float32 [N, M, 6] with M at least 1; what is missing has class -1."""
    most = max([1, *(len(rows) for rows in boxes)])
    labels = np.zeros((len(boxes), most, COLUMNS), dtype=np.float32)
    labels[:, :, 0] = -1
    for index, rows in enumerate(boxes):
        labels[index, : len(rows)] = rows
    return labels
