"""From an engine's outputs to what a user acts on, as io.json describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.engines import detections
from edgekd.engines.base import Array
from edgekd.errors import DataError

KINDS = ("classification", "detection", "segmentation", "saliency")


@dataclass(frozen=True, eq=False)
class Classified:
    """One class per image."""

    indices: NDArray[np.int64]
    """int64 [N]."""
    names: tuple[str, ...]
    """The class of each image, N names."""
    scores: NDArray[np.float32]
    """float32 [N, K], each row adds up to 1: the softmax of the logits."""

    def changed(self, other: Classified) -> int:
        """How many images have another class."""
        return int(np.sum(self.indices != other.indices))

    def margins(self) -> NDArray[np.float64]:
        """How clear each image's decision is, [N]: the distance of the two best scores."""
        return _lead(self.scores)


@dataclass(frozen=True, eq=False)
class Segmented:
    """A class for every pixel."""

    indices: NDArray[np.int64]
    """int64 [N, H, W]."""
    classes: tuple[str, ...]
    """Their names."""
    logits: NDArray[np.float32]
    """float32 [N, K, H, W]."""

    def changed(self, other: Segmented) -> int:
        """How many images have other classes in more than one of a hundred pixels."""
        return int(np.sum((self.indices != other.indices).mean(axis=(1, 2)) > 0.01))

    def margins(self) -> NDArray[np.float64]:
        """How clear each image's decision is, [N]: the mean distance of the two best logits."""
        margins: NDArray[np.float64] = _lead(self.logits).mean(axis=(1, 2))
        return margins


@dataclass(frozen=True, eq=False)
class Salient:
    """What stands out in every image."""

    maps: NDArray[np.float32]
    """float32 [N, H, W], 0..1: the sigmoid of the logits."""

    def changed(self, other: Salient) -> int:
        """How many images have more than one of a hundred pixels on the other side of one half."""
        return int(np.sum(((self.maps > 0.5) != (other.maps > 0.5)).mean(axis=(1, 2)) > 0.01))

    def margins(self) -> NDArray[np.float64]:
        """How clear each image's decision is, [N]: the mean distance from one half."""
        margins: NDArray[np.float64] = np.abs(self.maps.astype(np.float64) - 0.5).mean(axis=(1, 2))
        return margins


@dataclass(frozen=True, eq=False)
class Detected:
    """Boxes in every image."""

    boxes: tuple[NDArray[np.float32], ...]
    """For each image float32 [n, 6]: x1, y1, x2, y2 in pixels of the engine's input, score 0..1, class index."""
    classes: tuple[str, ...]
    """Their names."""
    confidence: float
    """The smallest score."""

    def changed(self, other: Detected) -> int:
        """How many images have a box without a partner."""
        pairs = zip(self.boxes, other.boxes, strict=True)
        return sum(detections.unmatched(one, two) > 0 for one, two in pairs)

    def margins(self) -> NDArray[np.float64]:
        """How clear each image's decision is, [N]: the distance of its worst box from the threshold; 0 without a box."""
        return np.array([float(boxes[:, 4].min() - self.confidence) if len(boxes) else 0.0 for boxes in self.boxes])


def postprocess(
    outputs: Mapping[str, Array], postprocessing: Mapping[str, Any] | None
) -> Classified | Detected | Segmented | Salient:
    """What an engine's outputs mean.

    Args:
        outputs: Output name to array, one row per image.
        postprocessing: ``kind`` and its parameters. ``classification``: ``output`` (whose rows are logits) and ``classes`` (their
            names in the order of the logits). ``segmentation``: the same, with logits for every pixel. ``saliency``: ``output``,
            one map of logits. ``detection``: ``output`` (raw predictions), ``classes``, ``size_px``, ``strides``, ``anchors``,
            ``confidence``, ``iou`` and ``most`` (edgekd.engines.detections); ``nms`` is ``graph`` where the engine gives
            ``detections`` too, which are read then.

    Raises:
        DataError: io.json does not say what the outputs mean, the kind is not known here, or the output is not what it says.
    """
    if postprocessing is None:
        raise DataError("io.json does not say what the outputs mean", hint="export the model again with this edgekd")
    kind = postprocessing.get("kind")
    if kind not in KINDS:
        raise DataError(f"postprocessing kind {kind!r}; this edgekd knows {', '.join(KINDS)}")
    in_graph = postprocessing.get("nms") == "graph"
    name, classes = detections.OUTPUT if in_graph else postprocessing["output"], tuple(postprocessing["classes"])
    if name not in outputs:
        raise DataError(f"expected an output {name!r}; the engine gave {', '.join(outputs) or 'none'}")
    values = np.asarray(outputs[name], np.float32)
    if kind == "segmentation":
        if values.ndim != 4 or values.shape[1] != len(classes):
            raise DataError(f"the output {name!r} has shape {list(values.shape)}; expected [N, {len(classes)} classes, H, W]")
        return Segmented(values.argmax(axis=1), classes, values)
    if kind == "saliency":
        if values.ndim != 4 or values.shape[1] != 1:
            raise DataError(f"the output {name!r} has shape {list(values.shape)}; expected [N, 1, H, W]")
        return Salient(np.asarray(0.5 + 0.5 * np.tanh(values[:, 0] / 2), np.float32))
    if kind == "classification":
        return _classified(name, values, classes)
    options = {key: postprocessing[key] for key in ("confidence", "iou", "most")}
    boxes = (
        detections.unpadded(values) if in_graph else detections.detect(values, detections.heads_from(postprocessing), **options)
    )
    return Detected(tuple(boxes), classes, float(options["confidence"]))


def _lead(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The distance of the two largest values along axis 1: [N, K, ...] to [N, ...]."""
    ordered = np.sort(values, axis=1).astype(np.float64)
    lead: NDArray[np.float64] = ordered[:, -1] - ordered[:, -2]
    return lead


def _classified(name: str, logits: NDArray[np.float32], classes: tuple[str, ...]) -> Classified:
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise DataError(f"the output {name!r} has shape {list(logits.shape)}; expected [N, {len(classes)} classes]")
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    indices = logits.argmax(axis=1)
    return Classified(indices, tuple(classes[index] for index in indices), exponents / exponents.sum(axis=1, keepdims=True))
