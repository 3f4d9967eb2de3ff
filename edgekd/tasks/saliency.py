"""What stands out in an image: one map, the probability of every pixel to belong to it.

A model gives logits [B, S, H, W]: the first map is the prediction, and the only one that engines give. In training a model may
give more, side outputs from coarser and coarser places, each of which is trained with half the weight of the one before.

Shape letters: N images, B images of a batch, S maps, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.data.base import IGNORE
from edgekd.data.windows import Windows, WindowsConfig
from edgekd.nn.overlap import boundary_dice_each, soft_dice_each
from edgekd.tasks import saliency_measures as measures
from edgekd.tasks.base import checked_output

if TYPE_CHECKING:
    from torchmetrics import Metric

EPOCHS, WIDEST_PX, STEP_PX, STEP_EPOCHS = 69, 13, 2, 10
"""The published training, its widest boundary, and by how much it narrows after how many epochs."""


class SaliencyConfig(Config):
    """What stands out: masks of two classes, 0 background and 1 salient."""

    kind: Literal["saliency"]
    boundary_weight: float = Field(1.0, ge=0)
    """Weight of the Dice loss of the boundaries beside that of the maps; boundaries are 13 pixels wide in the beginning and 1 in
    the end."""
    windows: WindowsConfig | None = None
    """Evaluate the model, and deploy engines, on windows of this size, moved over the images; null: on whole images."""


@dataclass(frozen=True)
class Saliency:
    """Soft Dice of maps and boundaries, and the largest F-measure in 0..1."""

    boundary_weight: float = 1.0
    windows: Windows | None = None

    kind: ClassVar[str] = "saliency"
    metric_name: ClassVar[str] = "max F"
    higher_is_better: ClassVar[bool] = True
    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def loss(self, logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:
        """The sum over maps k of 2^-k (soft Dice + the boundaries' Dice), averaged over the images that have labels.

        Zhang, Liang, Shi: KD-SCFNet, arXiv 2208.02178, the fully supervised stage of its code.

        Args:
            logits: [B, S, H, W], before sigmoid.
            labels: uint8 [B, H, W]: 1 salient, 0 not; 255 does not count.
            progress: Share of the training that is done, 0..1: boundaries become narrower.
        """
        counted = labels != IGNORE
        known = counted.flatten(1).any(1)
        if not known.any():
            return (0 * logits).sum()  # not 0 times the sum: of a map in 16 bits that is infinite
        shares, counted = logits[known].float().sigmoid(), counted[known][:, None]
        truth = (labels[known] == 1)[:, None].float()
        each = soft_dice_each(shares * counted, truth * counted)
        if self.boundary_weight:
            width = boundary_px(progress)
            each = each + self.boundary_weight * boundary_dice_each(shares, truth, width, counted)
        weights = each.new_tensor([0.5**index for index in range(each.shape[1])])
        return (each * weights).sum(1).mean()

    def new_metric(self) -> Metric:
        """The largest F-measure."""
        from edgekd.tasks.saliency_metric import MaxF

        return MaxF()

    def evaluate(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float:
        """The largest F-measure of an engine's outputs, over the 256 thresholds of a map.

        Args:
            outputs: ``logits``, [N, 1, H, W].
            labels: uint8 [N, H, W]; 255 does not count.

        Raises:
            DataError: There is no such output, it has another shape, or it is not finite.
        """
        logits = checked_output(outputs, self.output_names[0], (len(labels), 1, *labels.shape[1:]))
        found = measures.precision_and_recall(logits[:, 0], labels)
        return measures.largest_f(*found.mean(0)) if len(found) else 0.0

    def details(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> dict[str, float]:
        """The largest F-measure, the weighted F-measure, S-measure, E-measure, and the mean absolute error."""
        logits = checked_output(outputs, self.output_names[0], (len(labels), 1, *labels.shape[1:]))
        return {self.metric_name: self.evaluate(outputs, labels), **measures.others(logits[:, 0], labels)}

    def changed(self, expected: npt.NDArray[Any], received: npt.NDArray[Any]) -> float:
        """The share of pixels, [N, 1, H, W] each, that are on the other side of one half."""
        return float(np.mean((expected > 0) != (received > 0)))

    def postprocessing(self, classes: Sequence[str]) -> dict[str, Any]:
        """A map of logits, what its two sides are called, and the windows that it is of, if it is."""
        found: dict[str, Any] = {"kind": self.kind, "output": self.output_names[0], "classes": list(classes)}
        return found if self.windows is None else {**found, "windows": self.windows.described()}


def boundary_px(progress: float) -> int:
    """How wide boundaries are: 13, 11, 9 ... 1 pixels, the published schedule of 69 epochs stretched over this training.

    Args:
        progress: Share of the training that is done, 0..1.
    """
    epoch = min(int(progress * EPOCHS), EPOCHS - 1)
    return max(1, WIDEST_PX - STEP_PX * ((epoch + 1) // STEP_EPOCHS))
