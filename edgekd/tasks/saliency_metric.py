"""The largest F-measure while training, over all processes; a file of its own, because torchmetrics takes a second to import."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from edgekd.tasks.saliency_measures import THRESHOLDS, f_curves


class MaxF(Metric):
    """The largest value, 0..1, of the mean over all images of the F-measure at one threshold."""

    full_state_update = False
    curve: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("curve", default=torch.zeros(THRESHOLDS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, S, H, W], of which the first map is the prediction, labels [B, H, W]."""
        found = f_curves(logits[:, 0].detach().float().cpu().numpy(), labels.cpu().numpy())
        self.curve += torch.from_numpy(found.sum(0)).to(self.curve)
        self.images += len(found)

    def compute(self) -> Tensor:
        """The largest F-measure of all batches."""
        return (self.curve / self.images.clamp_min(1)).max()
