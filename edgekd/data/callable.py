"""A user's own data, by import path.

The function gets ``arguments`` as keywords and returns a mapping with ``train`` and ``test``, and optionally ``val``, ``calib``
and ``classes`` (names). Each split is a pair: images uint8 [N, H, W, C], and labels, which the kind says:

- ``callable``: int [N], the class of each image;
- ``callable_boxes``: N arrays [M, 5] or [M, 6], a row per box: class, x1, y1, x2, y2 in pixels (x to the right, y down), and
  optionally 1 where it is neither trained on nor counted; images are square;
- ``callable_masks``: int [N, H, W], the class of each pixel, or 255 where it is neither trained on nor counted.

Where val or calib is missing, it is carved out of a copy of train.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, JsonValue

from edgekd._config import Config
from edgekd.data.augment import AugmentConfig
from edgekd.data.augment_boxes import BoxAugmentConfig
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import (
    IGNORE,
    MAX_CHANNELS,
    Dataset,
    Images,
    Labels,
    Part,
    assemble,
    carve,
    classes_of,
    image_digests,
    order_by_hash,
    stratified_order,
)
from edgekd.data.boxes import COLUMNS, STEP_PX, padded
from edgekd.errors import DataError, nearest

REQUIRED = ("train", "test")
OPTIONAL = ("val", "calib", "classes")


class _FunctionConfig(Config):
    """What the kinds have in common."""

    call: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
    """What to call, as package.module:function."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the call."""
    calibration_images: int = Field(default=512, ge=1)
    """Images carved out of train for calib where the function gives none; at most a tenth of train."""
    val_images: int = Field(default=1000, ge=1)
    """Images carved out of train for val where the function gives none; at most a tenth of train."""


class CallableConfig(_FunctionConfig):
    """Images with classes from a function of yours."""

    kind: Literal["callable"] = "callable"
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""


class CallableBoxesConfig(_FunctionConfig):
    """Images with boxes from a function of yours."""

    kind: Literal["callable_boxes"]
    augment: BoxAugmentConfig = BoxAugmentConfig()
    """Random changes of training images."""


class CallableMasksConfig(_FunctionConfig):
    """Images with masks from a function of yours."""

    kind: Literal["callable_masks"]
    augment: MaskAugmentConfig = MaskAugmentConfig()
    """Random changes of training images and their masks."""


AnyFunction = CallableConfig | CallableBoxesConfig | CallableMasksConfig


def preflight(config: AnyFunction) -> None:
    """Import the function without calling it.

    Raises:
        DataError: It cannot be imported, or is not callable.
    """
    _function(config.call)


def load(config: AnyFunction) -> Dataset:
    """Call the function and check what it gives.

    Raises:
        DataError: The import or the call failed, or the result is not as the module's docstring says.
    """
    try:
        result = _function(config.call)(**config.arguments)
    except DataError:
        raise
    except Exception as error:  # a stranger's code: anything can be raised
        raise DataError(
            f"{config.call} raised {type(error).__name__}: {error}", hint="correct data.arguments, or the function itself"
        ) from error
    given = _check_keys(config.call, result)
    parts = {
        name: _part(f"{config.call}: {name}", given[name], config.kind)
        for name in ("train", "val", "test", "calib")
        if given.get(name) is not None
    }
    for one, other in combinations(parts, 2):
        if np.shares_memory(parts[one].images, parts[other].images):
            raise DataError(
                f"{config.call}: {one} and {other} are the same images in memory",
                hint="return four disjoint splits, or leave val and calib out: they are then carved out of train",
            )
    classes = given.get("classes")
    if classes is None:
        found = [classes_of(part.labels) for part in parts.values()]
        classes = [str(index) for index in range(max(int(labels.max(initial=0)) for labels in found) + 1)]
    wanted = {"calib": config.calibration_images, "val": config.val_images}
    missing = {name: count for name, count in wanted.items() if name not in parts}
    warnings: list[str] = []
    if missing:
        # the user's order of train may be sorted by class: carving needs a fair one
        train = parts["train"]
        keys = [str(index) for index in range(len(train.labels))]
        if config.kind == "callable":
            order = stratified_order(train.labels, keys)
        else:
            order = np.array(order_by_hash(range(len(keys)), str, None))
        carved, warnings = carve(Part(train.images[order], train.labels[order], train.digests[order]), missing)
        parts.update(carved)
    return assemble(parts, [str(name) for name in classes], warnings)


def _function(call: str) -> Callable[..., Any]:
    module_name, _, name = call.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a stranger's module: anything can be raised while it runs
        raise DataError(
            f"data.call: the module {module_name!r} cannot be imported: {type(error).__name__}: {error}",
            hint="install it, or start edgekd in the folder that holds it, or put it beside the recipe",
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise DataError(f"data.call: the module {module_name!r} has no {name!r}{nearest(name, dir(module))}")
    if not callable(function):
        raise DataError(f"data.call: {call} is a {type(function).__name__}, not a function")
    found: Callable[..., Any] = function
    return found


def _check_keys(call: str, result: Any) -> Mapping[str, Any]:
    if not isinstance(result, Mapping):
        raise DataError(
            f"{call} returned a {type(result).__name__}; expected a mapping with train and test, optionally val, calib, classes"
        )
    allowed = [*REQUIRED, *OPTIONAL]
    for key in result:
        if key not in allowed:
            raise DataError(f"{call} returned an unknown key {key!r}{nearest(str(key), allowed)}; allowed: {', '.join(allowed)}")
    for key in REQUIRED:
        if result.get(key) is None:
            raise DataError(f"{call} returned no {key!r}; it returned {', '.join(map(str, result)) or 'nothing'}")
    return result


def _part(where: str, pair: Any, kind: str) -> Part:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{where} is a {type(pair).__name__}; expected a pair (images, labels)")
    images = np.asarray(pair[0])
    if images.dtype != np.uint8:
        raise DataError(
            f"{where}: images are {images.dtype}; expected uint8", hint="for floats in 0..1: (x * 255).round().astype('uint8')"
        )
    if images.ndim != 4 or not 1 <= images.shape[3] <= MAX_CHANNELS or 0 in images.shape[1:]:
        hint = "add the channel axis: images[..., None]" if images.ndim == 3 else ""
        if images.ndim == 4 and images.shape[1] <= MAX_CHANNELS:
            hint = "move the channels last: images.transpose(0, 2, 3, 1)"
        raise DataError(
            f"{where}: images have shape {list(images.shape)}; expected [N, H, W, C] with 1 to {MAX_CHANNELS} channels", hint
        )
    height, width = images.shape[1:3]
    if kind != "callable" and (height % STEP_PX or width % STEP_PX):
        raise DataError(f"{where}: images are {height} x {width}; both sides must be multiples of {STEP_PX}", hint="pad them")
    labels = {"callable": _image_classes, "callable_boxes": _boxes, "callable_masks": _masks}[kind](where, pair[1], images)
    return Part(images, labels, image_digests(images))


def _image_classes(where: str, given: Any, images: Images) -> Labels:
    labels = _integers(where, given)
    if labels.shape != (len(images),):
        raise DataError(f"{where}: labels have shape {list(labels.shape)}; expected [{len(images)}], one per image")
    return labels.astype(np.int64)


def _masks(where: str, given: Any, images: Images) -> Labels:
    labels = _integers(where, given)
    if labels.shape != images.shape[:3]:
        raise DataError(
            f"{where}: masks have shape {list(labels.shape)}; expected {list(images.shape[:3])}, a class for every pixel",
            hint="drop the channel axis: masks[..., 0]" if labels.ndim == 4 else "",
        )
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= IGNORE:
        raise DataError(
            f"{where}: masks range from {labels.min()} to {labels.max()}; classes begin at 0, and {IGNORE} is a pixel that does"
            " not count"
        )
    return labels.astype(np.uint8)


def _integers(where: str, given: Any) -> Labels:
    labels = np.asarray(given)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels are {labels.dtype}; expected integers")
    return labels


def _boxes(where: str, given: Any, images: Images) -> Labels:
    """[N, M, 6] of the boxes of every image."""
    height, width = images.shape[1:3]
    if height != width:
        raise DataError(f"{where}: images are {height} x {width}; a detector takes square ones", hint="pad the shorter side")
    if not hasattr(given, "__len__") or len(given) != len(images):
        count = len(given) if hasattr(given, "__len__") else f"a {type(given).__name__}"
        raise DataError(f"{where}: boxes of {count} for {len(images)} images; expected an array [M, 5] per image")
    found = [_boxes_of(f"{where}: boxes of image {index}", rows, width) for index, rows in enumerate(given)]
    return padded(found)


def _boxes_of(where: str, given: Any, side: int) -> npt.NDArray[np.float64]:
    """One image's boxes, [M, 6]."""
    try:
        rows = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} are no numbers: {error}") from error
    if rows.size == 0:
        return np.zeros((0, COLUMNS))
    if rows.ndim != 2 or rows.shape[1] not in (COLUMNS - 1, COLUMNS):
        raise DataError(f"{where} have shape {list(rows.shape)}; expected [M, 5]: class, x1, y1, x2, y2 in pixels")
    if rows.shape[1] < COLUMNS:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    corners = rows[:, 1:5]
    wrong = (
        ~np.isfinite(rows).all(1)
        | (rows[:, 0] < 0)
        | (rows[:, 0] % 1 != 0)
        | ~np.isin(rows[:, 5], (0, 1))
        | (corners < 0).any(1)
        | (corners > side).any(1)
        | (corners[:, 2:] <= corners[:, :2]).any(1)
    )
    if wrong.any():
        row = rows[wrong.argmax()]
        raise DataError(
            f"{where}: {[round(value, 3) for value in row.tolist()]} is no box: expected a class from 0, then"
            f" 0 <= x1 < x2 <= {side} and 0 <= y1 < y2 <= {side} in pixels",
            hint="multiply YOLO's shares of an image by its side; make centres, and COCO's x, y, width, height, corners",
        )
    return rows
