"""Optimizers, the learning-rate schedule, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.nn.adversary import stage_parameters


class TrainConfig(Config):
    """How long and how to train."""

    epochs: int = Field(ge=1, le=10_000)
    """Passes over the training split."""
    batch_size: int = Field(128, ge=1, le=65_536)
    """Images per optimizer step, over all processes."""
    accumulate: int = Field(1, ge=1, le=1024)
    """In how many parts a batch is computed, to save memory."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: float = Field(0.1, gt=0, le=10)
    """Learning rate after the warm-up."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD; AdamW has its usual (0.9, 0.999)."""
    weight_decay: float = Field(5e-4, ge=0, le=1)
    """On weights with at least two dimensions: not on biases, normalisation gains and quantizer scales."""
    warmup_epochs: float = Field(0.0, ge=0)
    """The learning rate rises linearly for so long, then falls as a cosine to zero."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; null does not clip."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay per step of the moving average of the weights, which then is the result; null keeps the raw weights."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        return self


def make_optimizer(modules: Iterable[nn.Module], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters of the modules but those of adversaries, each parameter once."""
    seen: set[int] = set()
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for module in modules:
        for parameter in stage_parameters(module):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine that ends at zero after the last step (Loshchilov and Hutter 2017, without restarts).

    Args:
        step: Steps done so far, 0 for the first.
        total_steps: Steps of the whole training.
        warmup_steps: Steps of the linear rise; the first step after them has the peak rate.
        peak: The largest rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of a module's parameters and float buffers.

    The decay warms up as (1 + n) / (10 + n), so that a short training is not dominated by its first weights. Averages of positive
    quantizer scales are positive, so an averaged quantized model is a valid one. Integer buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present values."""
        self.updates += 1
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                mine.append(self.values[name])
                theirs.append(value)
            else:
                self.values[name].copy_(value)
        torch._foreach_lerp_(mine, theirs, weight)

    def state_dict(self) -> dict[str, object]:
        """For the training checkpoint."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """From the training checkpoint."""
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        self.values = dict(state["values"])  # type: ignore[call-overload]
