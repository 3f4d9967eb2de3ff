"""The largest F-measure while training, over all processes; a file of its own, because torchmetrics takes a second to import."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from edgekd.tasks.saliency_measures import THRESHOLDS, largest_f, precision_and_recall


class MaxF(Metric):
    """The largest F-measure, 0..1, of precision and recall averaged over all images."""

    full_state_update = False
    sums: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", default=torch.zeros(2, THRESHOLDS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, S, H, W], of which the first map is the prediction, labels [B, H, W]."""
        found = precision_and_recall(logits[:, 0].detach().float().cpu().numpy(), labels.cpu().numpy())
        self.sums += torch.from_numpy(found.sum(0)).to(self.sums)
        self.images += len(found)

    def compute(self) -> Tensor:
        """The largest F-measure of all batches."""
        precision, recall = (self.sums / self.images.clamp_min(1)).cpu().numpy()
        return torch.tensor(largest_f(precision, recall), dtype=torch.float64)
