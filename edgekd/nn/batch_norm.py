"""Batch normalisation over the batches of all processes, as one process with the whole batch would have.

torch has this layer for GPUs only (``nn.SyncBatchNorm``); the one here is for CPUs. Without it several CPU processes would train
another model than one process does with the same batches.

Shape letters: B images of this process, C channels, ... further axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize(module: nn.Module, device: torch.device) -> None:
    """Replace every batch norm inside ``module`` by one that shares its statistics with the other processes.

    Parameters, buffers and their names stay the same, so a state dict fits before and after.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, CpuSyncBatchNorm):
                setattr(parent, name, _shared(child))


def _shared(norm: _BatchNorm) -> CpuSyncBatchNorm:
    new = CpuSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var, new.num_batches_tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return new.train(norm.training)


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms that train normalise by their batch as ever, and keep their running statistics as they are.

    For further forwards of a step, through images or maps that the model will not see once it is trained.
    """
    tracking = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over all processes, whose batches must be equally large (the loop's are)."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] to [B, C, ...]."""
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(input)
        axes, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        # at least float32: statistics in 16 bits would be worth little
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        # Two exchanges, because the mean of squares minus the squared mean cancels where the mean is large.
        mean_C = _Mean.apply(values.mean(axes))
        centred = values - mean_C.view(shape)
        variance_C = _Mean.apply(centred.square().mean(axes))
        self._track(mean_C.detach(), variance_C.detach(), input.numel() // input.shape[1])
        out = centred * (variance_C + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes will do."""

    def _track(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        if not self.track_running_stats:
            return
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        count *= torch.distributed.get_world_size()
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(variance_C * (count / max(1, count - 1)), share)


class _Mean(torch.autograd.Function):
    """The mean over all processes. Every process's result depends on every process's input, so the gradient is a mean too."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:  # noqa: ARG004  the signature of autograd
        return _mean(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
