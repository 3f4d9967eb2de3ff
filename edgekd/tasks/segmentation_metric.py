"""mIoU while training, over all processes; a file of its own, because torchmetrics takes a second to import."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from edgekd.tasks.segmentation import confusion, figures


class MeanIoU(Metric):
    """mIoU, 0..1, from the pixels of all batches together."""

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("counts", default=torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, K, H, W], labels [B, H, W]."""
        self.counts += confusion(logits.argmax(1), labels, self.classes)

    def compute(self) -> Tensor:
        """MIoU of all batches."""
        return torch.tensor(figures(self.counts)["mIoU"], dtype=torch.float64)
