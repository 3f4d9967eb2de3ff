"""The stage ``prune``: cut channels, then train what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from edgekd._config import Config
from edgekd.distill import MethodConfig
from edgekd.distill.stage import fit
from edgekd.nn.channels import channel_plan
from edgekd.nn.layers import layer_table, output_channels
from edgekd.prune.importance import prune, prune_to_macs
from edgekd.train.checkpoint import Loaded
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import Context, Trained


class PruneConfig(Config):
    """Cut whole channels by the group norm of their weights, then recover."""

    kind: Literal["prune"]
    ratio: float | None = Field(None, gt=0, lt=0.95)
    """Share of the channels to cut; exactly one of ratio and macs is given."""
    macs: float | None = Field(None, gt=0, lt=1)
    """Multiply-accumulates to keep, as a share of those before."""
    round_to: int = Field(8, ge=1, le=256)
    """Layers that are cut keep the nearest multiple of so many channels, so that engines can use whole vector registers."""
    scope: Literal["model", "layer"] = "model"
    """Rank the channels of the whole model together, or cut the same share everywhere."""
    train: TrainConfig
    """Recovery training."""
    method: MethodConfig | None = None
    """Recover under the teacher with this method; null trains on the labels alone."""
    task_weight: float = Field(0.1, ge=0, le=1000)
    """Weight of the task loss where there is a method."""

    @model_validator(mode="after")
    def _one_target(self) -> PruneConfig:
        if (self.ratio is None) == (self.macs is None):
            raise ValueError("give exactly one of ratio and macs")
        return self


def cut(config: PruneConfig, source: Loaded) -> nn.Module:
    """The pruned module, before recovery. Deterministic, so an interrupted stage cuts the same channels again."""
    example = source.architecture.example()
    if config.macs is not None:
        return prune_to_macs(source.module, example, share=config.macs, round_to=config.round_to, scope=config.scope)[0]
    assert config.ratio is not None
    return prune(source.module, example, ratio=config.ratio, round_to=config.round_to, scope=config.scope)


def run(config: PruneConfig, source: Loaded, context: Context, *, title: str, work: Path) -> Trained:
    """Prune the source model and train what is left; arguments as for the other stages."""
    before = output_channels(source.module)
    pruned = cut(config, source)
    loaded = Loaded(pruned, source.taps, source.architecture.with_plans(channel_plan=channel_plan(pruned)))
    history = fit(
        loaded,
        config.train,
        context,
        title=title,
        work=work,
        method=config.method,
        teacher=context.teacher() if config.method is not None and context.teacher is not None else None,
        task_weight=config.task_weight,
    )
    return Trained(loaded, history, layer_table(pruned, before))
