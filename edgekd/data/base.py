"""What every data set becomes: four disjoint splits of decoded uint8 images.

train is trained on, val is watched during training, test is the evaluation split that reports quote, and calib sets the ranges of
quantized activations. Splits are in *stratified order* where edgekd made the order: every stretch of consecutive images holds the
classes in about their overall shares, so the first k images are a fair sample and cutting a split off the front needs no copy.

Shape letters: N images of a split, H rows, W columns, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError

Item = TypeVar("Item")
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]
"""int64 [N], one class per image; float32 [N, M, 6], boxes (edgekd.data.boxes); or uint8 [N, H, W], masks (edgekd.data.masks)."""
IGNORE = 255
"""In masks: a pixel that is neither trained on nor counted."""

CARVED_SHARE = 10
"""A split that is carved out of train takes at most one image in so many."""
MAX_CHANNELS = 16


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set."""

    name: str
    """train, val, test or calib."""
    images: Images
    """uint8 [N, H, W, C], read-only, possibly memory-mapped."""
    labels: Labels
    """int64 [N], indices into the data set's classes; or boxes, float32 [N, M, 6]; or masks, uint8 [N, H, W]."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images, split four ways."""

    train: Split
    val: Split
    test: Split
    calib: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel over train, in 0..1 units."""
    std: tuple[float, ...]
    """Per channel over train, in 0..1 units, larger than 0."""
    fingerprint: str
    """sha256 over image contents, labels, classes and which split each image is in."""
    warnings: tuple[str, ...] = ()
    """What a user should know about this data, one sentence each."""

    @property
    def splits(self) -> tuple[Split, Split, Split, Split]:
        """train, val, test, calib."""
        return self.train, self.val, self.test, self.calib

    @property
    def num_classes(self) -> int:
        """How many classes the labels distinguish."""
        return len(self.classes)

    @property
    def height(self) -> int:
        """Rows of every image."""
        return int(self.train.images.shape[1])

    @property
    def width(self) -> int:
        """Columns of every image."""
        return int(self.train.images.shape[2])

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return int(self.train.images.shape[3])


@dataclass(frozen=True, eq=False)
class Part:
    """Images, their labels and the sha256 of each image, before they are a split."""

    images: Images
    labels: Labels
    digests: Images
    """uint8 [N, 32]."""
    given: bool = True
    """The user made this a split of its own; otherwise it was carved out of train."""

    def cut(self, start: int, stop: int, *, given: bool) -> Part:
        """A stretch of it, without copying."""
        return Part(self.images[start:stop], self.labels[start:stop], self.digests[start:stop], given)


def stratified_order(labels: Labels, keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """An order in which every stretch holds the classes in about their overall shares.

    It depends on labels and keys alone: no seed of a recipe and no version of a random generator changes it.

    Args:
        labels: int64 [N].
        keys: A unique name per image, whose hash decides the order within a class.

    Returns:
        int64 [N], indices into ``labels``.
    """
    hashes = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    ranked: list[tuple[float, bytes, int]] = []
    for indices in members.values():
        indices.sort(key=hashes.__getitem__)
        ranked.extend(((place + 0.5) / len(indices), hashes[index], index) for place, index in enumerate(indices))
    return np.array([index for _, _, index in sorted(ranked)], dtype=np.int64)


def order_by_hash(items: Sequence[Item], key: Callable[[Item], str], limit: int | None) -> list[Item]:
    """Items in an order that their names alone decide, by the hash of each, and cut: every stretch is a fair sample."""
    hashes = [(hashlib.sha256(key(item).encode("utf-8", "surrogateescape")).digest(), index) for index, item in enumerate(items)]
    return [items[index] for _, index in sorted(hashes)][:limit]


def check_images_differ(paths: Mapping[str, Sequence[Path]]) -> None:
    """Refuse an image that is in two splits, under whatever name.

    Args:
        paths: Split -> its images.

    Raises:
        DataError: There is one.
    """
    seen: dict[Path, str] = {}
    for split, images in paths.items():
        for path in images:
            other = seen.setdefault(path.resolve(), split)
            if other != split:
                raise DataError(f"{split} and {other} share the image {path}", hint="give each split images of its own")


def image_digests(images: Images) -> Images:
    """The sha256 of every image's bytes, uint8 [N, 32]."""
    joined = b"".join(hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(images), 32)


def carve(train: Part, wanted: Mapping[str, int]) -> tuple[dict[str, Part], list[str]]:
    """Cut splits off the front of ``train``, which is in stratified order.

    Args:
        train: What there is.
        wanted: Split name -> how many images at most; a tenth of ``train`` is never exceeded.

    Returns:
        The carved splits and what is left as ``train``, and a warning for every split that got fewer than wanted.
    """
    total, start = len(train.labels), 0
    parts: dict[str, Part] = {}
    warnings = []
    for name, count in wanted.items():
        size = min(count, max(1, total // CARVED_SHARE))
        if size < count:
            warnings.append(f"{name} has {size} images instead of {count}: at most a tenth of the {total} training images")
        parts[name] = train.cut(start, start + size, given=False)
        start += size
    parts["train"] = train.cut(start, total, given=train.given)
    return parts, warnings


def assemble(parts: Mapping[str, Part], classes: Sequence[str], warnings: Sequence[str] = ()) -> Dataset:
    """Check four parts against each other and make them a data set.

    Args:
        parts: train, val, test, calib.
        classes: Names in the order of their indices.
        warnings: What was noticed before.

    Raises:
        DataError: A split is empty, images differ in size, a label is out of range, there are fewer than 2 classes (1 where
            images have boxes), a class has no training image (where images have boxes: all classes), or a split that the user
            gave holds nothing but images of test.
    """
    boxes = kind_of(parts["train"].labels) == "boxes"
    if len(classes) < 2 and not boxes:
        raise DataError(f"there are {len(classes)} classes ({', '.join(classes)}); at least 2 are needed")
    shape = parts["train"].images.shape[1:]
    for name, part in parts.items():
        _check_part(name, part, shape, classes)
    notes = _absent(parts["train"].labels, classes)
    if boxes and len(classes_of(parts["val"].labels)) == 0:
        notes.append("no image of val has a box that counts, so its metric stays 0 while training")
    mean, std = _statistics(parts["train"].images)
    for part in parts.values():
        part.labels.flags.writeable = False
    return Dataset(
        **{name: Split(name, _read_only(parts[name].images), parts[name].labels) for name in ("train", "val", "test", "calib")},
        classes=tuple(classes),
        mean=mean,
        std=std,
        fingerprint=_fingerprint(parts, classes),
        warnings=(*warnings, *notes, *_repeated(parts)),
    )


def _absent(train: Labels, classes: Sequence[str]) -> list[str]:
    """A warning about classes without a training box: lists of categories often name more than a data set holds.

    Raises:
        DataError: There is no box at all, or a class of images without boxes has no image.
    """
    kind = kind_of(train)
    counts = np.bincount(classes_of(train), minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if not absent:
        return []
    some = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
    what = {"classes": "image", "boxes": "box", "masks": "pixel"}[kind]
    message = f"no training {what} of {len(absent)} of {len(classes)} classes: {some}"
    if kind == "classes" or len(absent) == len(classes):
        raise DataError(message, hint="add images, carve less out of train, or drop these classes")
    return [f"{message}; they are not learnt"]


def _check_part(name: str, part: Part, shape: tuple[int, ...], classes: Sequence[str]) -> None:
    if len(part.labels) == 0:
        raise DataError(f"the split {name} has no images")
    if part.images.shape[1:] != shape:
        raise DataError(f"images of {name} are {_size(part.images.shape[1:])}, those of train {_size(shape)}")
    found = classes_of(part.labels)
    if len(found) == 0 and name == "test":
        raise DataError("no image of test has a box that counts", hint="a metric needs some")
    low, high = (int(found.min()), int(found.max())) if len(found) else (0, 0)
    if low < 0 or high >= len(classes):
        raise DataError(
            f"labels of {name} range from {low} to {high}; with {len(classes)} classes 0 to {len(classes) - 1} are allowed"
        )


def kind_of(labels: Labels) -> Literal["classes", "boxes", "masks"]:
    """What labels are."""
    if labels.ndim == 1:
        return "classes"
    return "masks" if labels.dtype == np.uint8 else "boxes"


def classes_of(labels: Labels) -> npt.NDArray[np.int64]:
    """The class of every image, or of every box or pixel that is not ignored, [n]."""
    kind = kind_of(labels)
    if kind == "classes":
        return labels
    if kind == "masks":
        return labels[labels != IGNORE]
    rows = labels.reshape(-1, labels.shape[-1])
    return rows[(rows[:, 0] >= 0) & (rows[:, -1] == 0), 0].astype(np.int64)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]} with {shape[2]} channels"


def _read_only(images: Images) -> Images:
    view = images[:]
    view.flags.writeable = False
    return view


def _statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1 units, from exact integer sums."""
    sums, squares = (np.zeros(images.shape[1:], dtype=np.uint64) for _ in range(2))
    # blocks of about 16 MiB: a memory-mapped split need not fit into memory
    block = max(1, (16 << 20) // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, len(images), block):
        values = images[start : start + block].astype(np.uint16)
        sums += values.sum(axis=0, dtype=np.uint64)
        squares += np.square(values, out=values).sum(axis=0, dtype=np.uint64)  # 255 squared fits in uint16
    count = images.shape[0] * images.shape[1] * images.shape[2]
    mean, std = [], []
    for channel in range(images.shape[3]):
        total, square = int(sums[..., channel].sum()), int(squares[..., channel].sum())
        variance = (square * count - total * total) / (count * count)  # Python integers: no cancellation
        mean.append(total / count / 255)
        std.append(variance**0.5 / 255 or 1.0)  # a constant channel carries nothing, but may not divide by zero
    return tuple(mean), tuple(std)


def _fingerprint(parts: Mapping[str, Part], classes: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([list(classes), list(parts["train"].images.shape[1:])]).encode())
    for name in ("train", "val", "test", "calib"):
        digest.update(f"{name} {len(parts[name].labels)}".encode())
        digest.update(np.ascontiguousarray(parts[name].digests).data)
        labels = parts[name].labels
        digest.update(labels.astype({"classes": "<i8", "boxes": "<f4", "masks": "u1"}[kind_of(labels)]).tobytes())
    return digest.hexdigest()


def _repeated(parts: Mapping[str, Part]) -> list[str]:
    """Warnings about images of test that occur in other splits too: users' data has duplicates, so single ones are no error.

    Raises:
        DataError: A split that the user gave holds nothing but images of test: a copy of the evaluation split, or of a part.
    """
    contents = {name: [row.tobytes() for row in part.digests] for name, part in parts.items()}
    test, warnings = set(contents["test"]), []
    for name in ("train", "val", "calib"):
        others = set(contents[name])
        if parts[name].given and others <= test:
            raise DataError(
                f"every image of {name} is also in test: {name} may not be the evaluation split, nor a part of it",
                hint=f"give {name} images of its own"
                + ("" if name == "train" else ", or leave it out: it is then carved out of train"),
            )
        count = sum(content in others for content in contents["test"])
        if count:
            warnings.append(f"{count} of {len(contents['test'])} images of test are in {name} too, byte for byte")
    return warnings
