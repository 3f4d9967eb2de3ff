"""mAP while training, over all processes; a file of its own, because torchmetrics takes a second to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from edgekd.tasks.average_precision import average_precisions

if TYPE_CHECKING:
    from edgekd.tasks.detection import Detection


class MeanAveragePrecision(Metric):
    """mAP50, 0..1. Predictions become boxes batch by batch, because they are many."""

    full_state_update = False
    found: list[Tensor]
    labels: list[Tensor]

    def __init__(self, task: Detection) -> None:
        super().__init__()
        self.task = task
        self.add_state("found", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch: raw predictions [B, P, 5 + K], labels [B, M, 6]; values that are not finite find nothing."""
        from edgekd.tasks.detection import padded

        clean = torch.nan_to_num(predictions.detach().float(), nan=-1e3, posinf=1e3, neginf=-1e3)
        boxes = padded(self.task.detect(clean.cpu().numpy(), self.task.LEAST))
        self.found.append(boxes.to(predictions.device))
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """mAP50 of all batches."""
        found: Any = dim_zero_cat(self.found).cpu().numpy()
        labels: Any = dim_zero_cat(self.labels).cpu().numpy()
        half, _ = average_precisions([rows[rows[:, 5] >= 0] for rows in found], labels, self.task.classes)
        return torch.tensor(half, dtype=torch.float64)
