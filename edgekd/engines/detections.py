"""From a detector's raw predictions to boxes: YOLOv5's decoding, and non-maximum suppression, in NumPy alone.

A prediction is (x, y, width, height, objectness, classes) before the sigmoid; predictions come by head (the finest stride first),
in a head by anchor, row and column. With the cell (column, row), the head's stride and the anchor:

    centre = (2 sigmoid(x, y) - 0.5 + cell) * stride        size = (2 sigmoid(width, height))^2 * anchor
    score of a class = sigmoid(objectness) * sigmoid(class), or sigmoid(objectness) where there is one class

Shape letters: N images, P predictions of an image, K classes, n boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.engines.base import Array
from edgekd.errors import DataError

BOX = 5
"""Values of a prediction before its classes."""
OUTPUT = "detections"
"""What a graph that suppresses by itself calls its boxes (``nms: graph``)."""
ADDED = "nms/"
"""How the names of the nodes begin that suppress in a graph."""
CANDIDATES = 3000
"""Of an image; with more, those with the best scores are looked at."""


@dataclass(frozen=True)
class Heads:
    """Where predictions stand."""

    size_px: int
    """Side of the images."""
    strides: tuple[int, ...]
    """Pixels per cell of each head."""
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    """Per head the widths and heights of its anchors, in pixels."""

    @property
    def predictions(self) -> int:
        """P."""
        return sum(
            len(anchors) * (self.size_px // stride) ** 2 for stride, anchors in zip(self.strides, self.anchors, strict=True)
        )

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """For every prediction column, row, stride, anchor's width and height: float32 [P, 5]."""
        parts = []
        for stride, anchors in zip(self.strides, self.anchors, strict=True):
            cells = self.size_px // stride
            rows, columns = np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij")
            for width, height in anchors:
                each = [columns.ravel(), rows.ravel(), *(np.full(cells * cells, value) for value in (stride, width, height))]
                parts.append(np.stack(each, axis=1))
        return np.concatenate(parts).astype(np.float32)


def detect(predictions: Array, heads: Heads, *, confidence: float, iou: float, most: int) -> list[NDArray[np.float32]]:
    """The boxes of every image, the best score first.

    Args:
        predictions: [N, P, 5 + K], raw.
        heads: Where they stand.
        confidence: Smallest score, 0..1.
        iou: Of two boxes of one class that overlap more, the worse is dropped.
        most: Boxes of an image at most.

    Returns:
        For each image float32 [n, 6]: x1, y1, x2, y2 in pixels, score, class. A prediction may give several classes.

    Raises:
        DataError: The predictions have another shape.
    """
    expected = heads.predictions
    if predictions.ndim != 3 or predictions.shape[1] != expected or predictions.shape[2] <= BOX:
        raise DataError(
            f"predictions have shape {list(predictions.shape)}; expected [N, {expected}, {BOX} + classes]",
            hint=f"for images of {heads.size_px} px with strides {list(heads.strides)}",
        )
    return [_one(each.astype(np.float32), heads, confidence, iou, most) for each in predictions]


def unpadded(rows: Array) -> list[NDArray[np.float32]]:
    """The boxes of every image, as :func:`detect` gives them, from a graph's output: [N, M, 6], where class -1 is no box.

    Raises:
        DataError: The output has another shape.
    """
    if rows.ndim != 3 or rows.shape[2] != 6:
        raise DataError(f"the output {OUTPUT!r} has shape {list(rows.shape)}; expected [N, boxes, 6]")
    return [each[each[:, 5] >= 0].astype(np.float32) for each in rows]


def _one(predictions: NDArray[np.float32], heads: Heads, confidence: float, iou: float, most: int) -> NDArray[np.float32]:
    objectness = _sigmoid(predictions[:, 4])
    likely = np.flatnonzero(objectness > confidence)  # no class makes a score larger
    rows = predictions[likely]
    classes = rows.shape[1] - BOX
    scores = objectness[likely, None] * (_sigmoid(rows[:, BOX:]) if classes > 1 else 1.0)
    index, label = np.nonzero(scores > confidence)
    values = scores[index, label]
    order = np.argsort(-values, kind="stable")[:CANDIDATES]
    index, label, values = index[order], label[order], values[order]
    boxes = _boxes(rows[index], heads.table[likely[index]])
    kept = suppress(boxes, values, label, iou=iou, most=most)
    return np.concatenate([boxes[kept], values[kept, None], label[kept, None]], axis=1, dtype=np.float32)


def _sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * values))  # exp would overflow
    return found


def _boxes(rows: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.float32]:
    centre = (2 * _sigmoid(rows[:, :2]) - 0.5 + table[:, :2]) * table[:, 2:3]
    half = (2 * _sigmoid(rows[:, 2:4])) ** 2 * table[:, 3:5] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def suppress(boxes: Array, scores: Array, classes: Array, *, iou: float, most: int) -> list[int]:
    """Non-maximum suppression among the boxes of each class.

    Args:
        boxes: [n, 4]: x1, y1, x2, y2; the best score first.
        scores: [n], falling.
        classes: [n].
        iou: Of two boxes that overlap more, the worse is dropped.
        most: How many to keep at most.

    Returns:
        Indices of the boxes to keep, the best first.
    """
    del scores  # their order is all that counts
    if not len(boxes):
        return []
    left, top, right, bottom = np.ascontiguousarray(boxes.astype(np.float64).T)
    apart = classes * (right.max() - left.min() + 1)  # side by side, boxes of two classes never overlap
    left, right = left + apart, right + apart
    areas = np.clip(right - left, 0, None) * np.clip(bottom - top, 0, None)
    alive = np.ones(len(boxes), dtype=bool)
    kept: list[int] = []
    best = 0
    while len(kept) < most:
        best += int(alive[best:].argmax())
        if not alive[best]:
            break
        kept.append(best)
        alive[best] = False
        rest = slice(best + 1, None)
        wide = np.minimum(right[rest], right[best]) - np.maximum(left[rest], left[best])
        high = np.minimum(bottom[rest], bottom[best]) - np.maximum(top[rest], top[best])
        shared = np.maximum(wide, 0) * np.maximum(high, 0)
        # shared / union > iou, without the division
        alive[rest] &= shared * (1 + iou) <= iou * (areas[rest] + areas[best])
    return kept


def overlaps(one: Array, other: Array) -> NDArray[np.float64]:
    """Intersection over union of every box with every other: [n, 4] and [m, 4] to [n, m]."""
    a, b = one[:, None].astype(np.float64), other[None].astype(np.float64)
    sides = np.clip(np.minimum(a[..., 2:4], b[..., 2:4]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides[..., 0] * sides[..., 1]
    areas = [np.prod(np.clip(each[..., 2:4] - each[..., :2], 0, None), axis=-1) for each in (a, b)]
    found: NDArray[np.float64] = shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)
    return found


def unmatched(one: Array, other: Array, *, iou: float = 0.5) -> int:
    """How many boxes of two lists have no partner of their class in the other, each partner serving once; of the longer list.

    Args:
        one: [n, 6], as :func:`detect` gives them.
        other: [m, 6].
        iou: Partners overlap at least so much.
    """
    pairs, free = 0, np.ones(len(other), dtype=bool)
    found = overlaps(one[:, :4], other[:, :4])
    for index, row in enumerate(one):
        fit = np.where(free & (other[:, 5] == row[5]), found[index], 0.0)
        if len(fit) and fit.max() >= iou:
            free[int(fit.argmax())] = False
            pairs += 1
    return max(len(one), len(other)) - pairs


def heads_from(description: Mapping[str, Any]) -> Heads:
    """Heads, from io.json."""
    anchors: Sequence[Any] = description["anchors"]
    return Heads(
        int(description["size_px"]),
        tuple(int(stride) for stride in description["strides"]),
        tuple(tuple((float(width), float(height)) for width, height in head) for head in anchors),
    )
