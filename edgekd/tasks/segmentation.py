"""A class for every pixel.

Shape letters: N images, B images of a batch, K classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.data.base import IGNORE
from edgekd.data.windows import Windows, WindowsConfig
from edgekd.tasks import boundaries
from edgekd.tasks.base import checked_output

if TYPE_CHECKING:
    from torchmetrics import Metric

IMAGES = 16
"""Of an engine's outputs that are looked at together."""


class SegmentationConfig(Config):
    """A class for every pixel."""

    kind: Literal["segmentation"]
    class_weights: Literal["balanced"] | list[float] | None = None
    """Weight of each class in the cross-entropy: one number a class, or balanced: by the inverse of its share of the training
    pixels, at most 10 times the mean; null weighs all alike."""
    hard_pixels: float = Field(1.0, gt=0, le=1)
    """Share of the pixels of a batch that count, those with the largest cross-entropy (online hard example mining)."""
    dice_weight: float = Field(0.0, ge=0)
    """Weight of the soft Dice loss beside the cross-entropy."""
    boundary_px: int | None = Field(None, ge=1, le=256)
    """Tolerance of the boundaries' F-measure, pixels; null: 0.75 % of the image's diagonal, at least 1."""
    windows: WindowsConfig | None = None
    """Evaluate the model, and deploy engines, on windows of this size, moved over the images; null: on whole images."""


@dataclass(frozen=True)
class Segmentation:
    """Cross-entropy with Dice, and mean intersection over union in 0..1."""

    classes: int
    class_weights: tuple[float, ...] | None = None
    hard_pixels: float = 1.0
    dice_weight: float = 0.0
    boundary_px: int | None = None
    windows: Windows | None = None

    kind: ClassVar[str] = "segmentation"
    metric_name: ClassVar[str] = "mIoU"
    higher_is_better: ClassVar[bool] = True
    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def loss(self, logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:  # noqa: ARG002
        """Weighted cross-entropy over the pixels that count, and the soft Dice loss.

        Args:
            logits: [B, K, H, W], before softmax.
            labels: uint8 [B, H, W]; 255 does not count.
            progress: Not looked at.
        """
        logits, labels = logits.float(), labels.long()
        weight = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        counted = labels != IGNORE
        if not counted.any():
            return logits.sum() * 0.0
        each = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORE, reduction="none")[counted]
        weights = torch.ones_like(each) if weight is None else weight[labels[counted]]
        if self.hard_pixels < 1:
            each, places = each.topk(max(1, round(self.hard_pixels * len(each))))
            weights = weights[places]
        loss = each.sum() / weights.sum().clamp_min(torch.finfo(each.dtype).tiny)  # classes may weigh nothing
        return loss + self.dice_weight * dice_loss(logits, labels) if self.dice_weight else loss

    def new_metric(self) -> Metric:
        """The mean intersection over union."""
        from edgekd.tasks.segmentation_metric import MeanIoU

        return MeanIoU(self.classes)

    def evaluate(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float:
        """The mean intersection over union of an engine's outputs: the mean over the classes that labels or predictions have.

        Args:
            outputs: ``logits``, [N, K, H, W].
            labels: uint8 [N, H, W]; 255 does not count.

        Raises:
            DataError: There is no such output, it has another shape, or it is not finite.
        """
        return self.details(outputs, labels)[self.metric_name]

    def details(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> dict[str, float]:
        """mIoU; Dice, averaged over the same classes; the share of right pixels; the F-measure of outlines."""
        logits = checked_output(outputs, self.output_names[0], (len(labels), self.classes, *labels.shape[1:]))
        counts = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        scores, radius_px = [], self.boundary_px or boundaries.tolerance_px(*labels.shape[1:])
        for start in range(0, len(labels), IMAGES):
            here = slice(start, start + IMAGES)
            given, true = torch.from_numpy(logits[here].argmax(axis=1)), torch.from_numpy(np.array(labels[here]))
            counts += confusion(given, true, self.classes)
            scores.append(boundaries.boundary_scores(given, true, self.classes, radius_px))
        return {**figures(counts), "boundary F": boundaries.boundary_f(torch.cat(scores))}

    def changed(self, expected: npt.NDArray[Any], received: npt.NDArray[Any]) -> float:
        """The share of pixels, [N, K, H, W] each, whose class differs."""
        return float(np.mean(np.argmax(expected, axis=1) != np.argmax(received, axis=1)))

    def postprocessing(self, classes: Sequence[str]) -> dict[str, Any]:
        """Logits, the classes' names in their order, and the windows that they are of, if they are."""
        found: dict[str, Any] = {"kind": self.kind, "output": self.output_names[0], "classes": list(classes)}
        return found if self.windows is None else {**found, "windows": self.windows.described()}


def confusion(given: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often each class was taken for each: int64 [K, K], true classes in rows, the model's in columns.

    Args:
        given: int64 [B, H, W], the model's classes.
        labels: [B, H, W]; 255 does not count.
        classes: K.
    """
    counted = labels != IGNORE
    pairs = labels[counted].long() * classes + given[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def figures(counts: Tensor) -> dict[str, float]:
    """Mean IoU and Dice coefficient, averaged over the classes that labels or predictions have, and the share of right pixels."""
    counts = counts.double()
    right, true, given = counts.diag(), counts.sum(1), counts.sum(0)
    there = true + given > 0
    if not there.any():
        return {"mIoU": 0.0, "Dice": 0.0, "pixel accuracy": 0.0}
    shared, dice = (right / (true + given - right))[there], (2 * right / (true + given))[there]
    return {"mIoU": float(shared.mean()), "Dice": float(dice.mean()), "pixel accuracy": float(right.sum() / counts.sum())}


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - the soft Dice coefficient, averaged over the classes that the batch's labels have.

    Milletari, Navab, Ahmadi: V-Net. 3DV 2016, arXiv 1606.04797; with squares in the denominator, over all pixels of the batch.

    Args:
        logits: float32 [B, K, H, W].
        labels: int64 [B, H, W]; 255 does not count.
    """
    counted = labels != IGNORE
    shares = logits.softmax(1) * counted[:, None]
    true = F.one_hot(labels.where(counted, 0), logits.shape[1]).movedim(-1, 1) * counted[:, None]
    both = (shares * true).sum((0, 2, 3))
    sizes = shares.square().sum((0, 2, 3)) + true.sum((0, 2, 3))
    there = true.sum((0, 2, 3)) > 0
    return 1 - (2 * both / sizes.clamp_min(1e-6))[there].mean() if there.any() else logits.sum() * 0.0


def balanced_weights(labels: npt.NDArray[Any], classes: int) -> tuple[float, ...]:
    """Weights by the inverse of each class's share of the pixels that count, with mean 1 before they are cut at 10.

    Args:
        labels: uint8 [N, H, W].
        classes: K; classes without a pixel weigh 1.
    """
    counts = np.bincount(labels[labels != IGNORE].ravel(), minlength=classes)[:classes].astype(np.float64)
    inverse = np.where(counts > 0, counts.sum() / np.maximum(counts, 1), 0)
    mean = inverse[counts > 0].mean() if (counts > 0).any() else 1.0
    return tuple(float(value) for value in np.where(counts > 0, np.minimum(inverse / mean, 10.0), 1.0))
