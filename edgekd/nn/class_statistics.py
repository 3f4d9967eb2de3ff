"""What the pixels of each class have in common: sums per class, and the mean and variance of all that were seen.

The running statistics are those of Wang, Pan, Song, Zhang, Huang, Wu: Implicit Semantic Data Augmentation for Deep Networks,
NeurIPS 2019, arXiv 1909.12220, with a diagonal covariance.

Shape letters: B images, D channels, H rows, W columns, N pixels, K classes.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn

from edgekd.nn.precision import exact


def nearest_labels(labels_BHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels of another size, whose row i is the row floor(i * height / new height); columns likewise. No class is made up."""
    height, width = labels_BHW.shape[1:]
    if (height, width) == tuple(size):
        return labels_BHW
    rows, columns = (
        torch.arange(new, device=labels_BHW.device) * old // new for new, old in zip(size, (height, width), strict=True)
    )
    return labels_BHW[:, rows[:, None], columns]


def pixels(maps_BDHW: Tensor) -> Tensor:
    """[B, D, H, W] to [B * H * W, D], in the order of labels."""
    return maps_BDHW.movedim(1, -1).reshape(-1, maps_BDHW.shape[1])


def bins(labels: Tensor, classes: int) -> Tensor:
    """Labels as indices 0 .. K, where K stands for all that are no class: pixels that do not count."""
    places = labels.long()
    return places.where((places >= 0) & (places < classes), classes)


def class_sums(values_ND: Tensor, classes_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """How many pixels each class has, [K], and the sum of their values, [K, D], through which gradients flow.

    Args:
        values_ND: [N, D].
        classes_N: Whole numbers [N]; pixels of classes outside of 0 .. K - 1 do not count.
        classes: K.
    """
    places = bins(classes_N, classes)
    counts_K = torch.bincount(places, minlength=classes + 1)[:classes].to(values_ND.dtype)
    sums = values_ND.new_zeros(classes + 1, values_ND.shape[1]).index_add(0, places, values_ND)
    return counts_K, sums[:classes]


class ClassStatistics(nn.Module):
    """The mean and the population variance of each class's pixels, over all that were ever given, in float64.

    However they are cut into batches, the statistics are the same. Several processes share them. They are buffers: saved with the
    training, not trained.

    Args:
        classes: K.
        channels: D.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("count", torch.zeros(classes, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(classes, channels, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(classes, channels, dtype=torch.float64))

    @torch.no_grad()
    def update(self, maps_BDHW: Tensor, labels_BHW: Tensor) -> None:
        """Take a batch in.

        Args:
            maps_BDHW: [B, D, H, W].
            labels_BHW: [B, H, W], the maps' size; pixels of other labels than 0 .. K - 1 do not count.
        """
        values, labels = pixels(exact(maps_BDHW)), labels_BHW.flatten()
        count, sums = (_over_processes(part.double()) for part in class_sums(values, labels, len(self.count)))
        mean = sums / count.clamp_min(1)[:, None]
        # Centred first: the mean of squares minus the squared mean cancels where the mean is large.
        centres = torch.cat([mean, mean.new_zeros(1, mean.shape[1])]).to(values.dtype)
        centred = values - centres.index_select(0, bins(labels, len(mean)))
        squares = _over_processes(class_sums(centred.square(), labels, len(self.count))[1].double())
        total = self.count + count
        share = (count / total.clamp_min(1))[:, None]
        between = share * (1 - share) * (self.mean - mean).square()
        self.variance = (1 - share) * self.variance + share * squares / count.clamp_min(1)[:, None] + between
        self.mean = (1 - share) * self.mean + share * mean
        self.count = total


def _over_processes(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
