"""A user's own data, by import path.

The function gets ``arguments`` as keywords and returns a mapping with ``train`` and ``test``, and optionally ``val``, ``calib``
and ``classes`` (names). Each split is a pair: images uint8 [N, H, W, C], labels int [N]. Where val or calib is missing, it is
carved out of a copy of train.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, Literal

import numpy as np
from pydantic import Field, JsonValue

from edgekd._config import Config
from edgekd.data.augment import AugmentConfig
from edgekd.data.base import MAX_CHANNELS, Dataset, Part, assemble, carve, image_digests, stratified_order
from edgekd.errors import DataError, nearest

REQUIRED = ("train", "test")
OPTIONAL = ("val", "calib", "classes")


class CallableConfig(Config):
    """Images from a function of yours."""

    kind: Literal["callable"] = "callable"
    call: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
    """What to call, as package.module:function."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the call."""
    calibration_images: int = Field(default=512, ge=1)
    """Images carved out of train for calib where the function gives none; at most a tenth of train."""
    val_images: int = Field(default=1000, ge=1)
    """Images carved out of train for val where the function gives none; at most a tenth of train."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""


def preflight(config: CallableConfig) -> None:
    """Import the function without calling it.

    Raises:
        DataError: It cannot be imported, or is not callable.
    """
    _function(config.call)


def load(config: CallableConfig) -> Dataset:
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
        name: _part(f"{config.call}: {name}", given[name])
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
        classes = [str(index) for index in range(1 + max(int(part.labels.max(initial=-1)) for part in parts.values()))]
    wanted = {"calib": config.calibration_images, "val": config.val_images}
    missing = {name: count for name, count in wanted.items() if name not in parts}
    warnings: list[str] = []
    if missing:
        # the user's order of train may be sorted by class: carving needs a stratified one
        train = parts["train"]
        order = stratified_order(train.labels, [str(index) for index in range(len(train.labels))])
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


def _part(where: str, pair: Any) -> Part:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{where} is a {type(pair).__name__}; expected a pair (images, labels)")
    images, labels = np.asarray(pair[0]), np.asarray(pair[1])
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
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: labels are {labels.dtype}; expected integers")
    if labels.shape != (len(images),):
        raise DataError(f"{where}: labels have shape {list(labels.shape)}; expected [{len(images)}], one per image")
    return Part(images, labels.astype(np.int64), image_digests(images))
