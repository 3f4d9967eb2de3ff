"""The stage ``distill``: train a student towards the labels and a teacher."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from edgekd._config import Config
from edgekd.distill import MethodConfig
from edgekd.distill.base import needs_teacher
from edgekd.nn.layers import layer_table
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import train
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import Context, Trained
from edgekd.train.step import TaskOnly


class DistillConfig(Config):
    """Train on the labels and on the teacher, or on what the method has in its place."""

    kind: Literal["distill"]
    method: MethodConfig
    """The distillation method."""
    train: TrainConfig
    """Budget and optimizer."""
    task_weight: float = Field(0.1, ge=0, le=1000)
    """Weight of the task loss beside the method's terms."""


def fit(
    student: Loaded,
    config: TrainConfig,
    context: Context,
    *,
    title: str,
    work: Path,
    method: MethodConfig | None,
    teacher: Loaded | None,
    task_weight: float,
) -> list[dict[str, Any]]:
    """Train ``student`` in place, with a method and its teacher, or on the labels alone where there is no method.

    A method that needs no teacher is given none.
    """
    setting = context.setting(title, work, config.epochs)
    if method is None:
        return train(student=student.module, objective=TaskOnly(), config=config, setting=setting)
    torch.manual_seed(context.seed + 1)  # the method's own layers: not the stream that made the student
    used: Any = teacher if needs_teacher(method) else None
    master: Any = None if used is None else used.module
    distiller = method.build(student, used)
    history = train(
        student=student.module,
        objective=distiller,
        config=config,
        setting=setting,
        teacher=master,
        student_taps=student.taps,
        teacher_taps={} if used is None else used.taps,
        task_weight=task_weight,
        prepare=partial(distiller.prepare, student.module, master, setting),
        half_labelled=distiller.half_labelled,
    )
    if history and (found := distiller.statistics(student.module, master, setting)):
        history[-1]["statistics"] = found
    return history


def run(config: DistillConfig, source: Loaded, context: Context, *, title: str, work: Path) -> Trained:
    """Distil the teacher into the source model; arguments as for the other stages."""
    assert context.teacher is not None or not needs_teacher(config.method)  # checked with the recipe
    history = fit(
        source,
        config.train,
        context,
        title=title,
        work=work,
        method=config.method,
        teacher=context.teacher() if context.teacher is not None and needs_teacher(config.method) else None,
        task_weight=config.task_weight,
    )
    return Trained(source, history, layer_table(source.module))
