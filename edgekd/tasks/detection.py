"""Boxes with classes.

Shape letters: N images, B images of a batch, P predictions of an image, K classes, M labelled boxes of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from edgekd._config import Config
from edgekd.engines import detections
from edgekd.errors import DataError
from edgekd.tasks.average_precision import MOST, average_precisions
from edgekd.tasks.base import checked_output
from edgekd.tasks.yolo_loss import Gains, detection_loss

if TYPE_CHECKING:
    from torchmetrics import Metric

SAME = 0.95
"""Two computations of one box overlap at least so much."""
ROUNDED = 0.005
"""Share of boxes that rounding may put on the other side of a threshold; one box always may."""
ANCHORS = 3
"""Of a head, where they are fitted."""


class DetectionConfig(Config):
    """Boxes with classes."""

    kind: Literal["detection"]
    anchors: list[list[tuple[float, float]]] | None = None
    """Per head, width and height of its anchors in pixels; null fits three per head to the training boxes."""
    strides: list[int] = Field(default=[4, 8, 16], min_length=1, max_length=3)
    """Pixels per cell of each head of the model, the finest first: [4] for superyolo_small."""
    iou: float = Field(0.6, gt=0, lt=1)
    """Non-maximum suppression: of two boxes of a class that overlap more, the worse is dropped."""
    confidence: float = Field(0.25, gt=0, lt=1)
    """Smallest score of a box that a user acts on; the metric looks at all from 0.001."""
    nms: Literal["outside", "graph"] = "outside"
    """Who suppresses: edgekd.engines.postprocess with NumPy, or the engine, which then gives ``detections`` [B, 300, 6] beside
    the raw predictions; every engine is held to the same boxes."""
    box_gain: float = Field(0.05, ge=0)
    """Weight of the boxes' places in the loss."""
    objectness_gain: float = Field(1.0, ge=0)
    """Weight of whether there is an object."""
    class_gain: float = Field(0.5, ge=0)
    """Weight of the classes."""

    @model_validator(mode="after")
    def _heads(self) -> DetectionConfig:
        if self.anchors is not None and len(self.anchors) != len(self.strides):
            raise ValueError(f"anchors has {len(self.anchors)} heads, and strides {len(self.strides)}")
        for head in self.anchors or ():
            if len(head) != ANCHORS or any(not 0 < side < 10_000 for pair in head for side in pair):
                raise ValueError(f"anchors: each head has {ANCHORS} pairs of width and height above 0; received {head}")
        return self


@dataclass(frozen=True)
class Detection:
    """YOLOv5's loss, and mAP at an overlap of 0.5 in 0..1."""

    heads: detections.Heads
    classes: int
    iou: float = 0.6
    confidence: float = 0.25
    gains: Gains = field(default_factory=Gains)
    nms: Literal["outside", "graph"] = "outside"

    kind: ClassVar[str] = "detection"
    metric_name: ClassVar[str] = "mAP50"
    higher_is_better: ClassVar[bool] = True
    output_names: ClassVar[tuple[str, ...]] = ("predictions",)
    windows: ClassVar[None] = None
    LEAST: ClassVar[float] = 0.001
    """Smallest score that the metric looks at."""

    def loss(self, logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:  # noqa: ARG002
        """edgekd.tasks.yolo_loss, averaged over the batch.

        Args:
            logits: Raw predictions, [B, P, 5 + K].
            labels: float32 [B, M, 6], as in edgekd.data.boxes.
            progress: Not looked at.
        """
        return detection_loss(logits, labels, self.heads, self.gains)

    def new_metric(self) -> Metric:
        """mAP50."""
        from edgekd.tasks.detection_metric import MeanAveragePrecision

        return MeanAveragePrecision(self)

    def detect(self, predictions: npt.NDArray[Any], confidence: float) -> list[npt.NDArray[np.float32]]:
        """Boxes of each image: [n, 6]."""
        return detections.detect(predictions, self.heads, confidence=confidence, iou=self.iou, most=MOST)

    def evaluate(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float:
        """mAP50 of an engine's outputs.

        Args:
            outputs: ``predictions``, [N, P, 5 + K].
            labels: float32 [N, M, 6].

        Raises:
            DataError: There is no such output, it has another shape, or it is not finite.
        """
        return self.details(outputs, labels)[self.metric_name]

    def details(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> dict[str, float]:
        """mAP50, and mAP50_95: averaged over overlaps of 0.5, 0.55, .. 0.95; arguments and errors as for :meth:`evaluate`."""
        wanted = (len(labels), self.heads.predictions, detections.BOX + self.classes)
        predictions = checked_output(outputs, self.output_names[0], wanted)
        if detections.OUTPUT in outputs:
            self._same_boxes(predictions, outputs[detections.OUTPUT])
        half, whole = average_precisions(self.detect(predictions, self.LEAST), labels, self.classes)
        return {"mAP50": half, "mAP50_95": whole}

    def _same_boxes(self, predictions: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
        """Hold a graph's boxes against those that its raw predictions give."""
        alone, most = _alone(self.detect(predictions, self.confidence), detections.unpadded(rows), iou=SAME)
        if alone > max(1, ROUNDED * most):
            raise DataError(
                f"{alone} of {most} boxes of the output {detections.OUTPUT!r} are not those of the raw predictions",
                hint="use task.nms: outside with this backend and precision",
            )

    def changed(self, expected: npt.NDArray[Any], received: npt.NDArray[Any]) -> float:
        """The share of boxes that a user would act on which have no partner on the other side."""
        if not np.isfinite(received).all():
            return 1.0
        alone, most = _alone(*(self.detect(each, self.confidence) for each in (expected, received)))
        return alone / max(most, 1)

    def postprocessing(self, classes: Sequence[str]) -> dict[str, Any]:
        """All that edgekd.engines.postprocess needs to give boxes."""
        return {
            "kind": self.kind,
            "output": self.output_names[0],
            "classes": list(classes),
            "size_px": self.heads.size_px,
            "strides": list(self.heads.strides),
            "anchors": [[list(pair) for pair in head] for head in self.heads.anchors],
            "confidence": self.confidence,
            "iou": self.iou,
            "most": MOST,
            "nms": self.nms,
        }


def _alone(one: Sequence[npt.NDArray[Any]], other: Sequence[npt.NDArray[Any]], *, iou: float = 0.5) -> tuple[int, int]:
    """How many boxes of two lists per image have no partner, and how many there are in the longer list of each image."""
    pairs = list(zip(one, other, strict=True))
    return sum(detections.unmatched(a, b, iou=iou) for a, b in pairs), sum(max(len(a), len(b)) for a, b in pairs)


def padded(found: Sequence[npt.NDArray[np.float32]]) -> Tensor:
    """Boxes of each image as one tensor, [N, 300, 6]; rows without a box have class -1."""
    rows = torch.zeros(len(found), MOST, 6)
    rows[:, :, 5] = -1
    for index, each in enumerate(found):
        rows[index, : len(each)] = torch.from_numpy(each)
    return rows
