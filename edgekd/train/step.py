"""What one training step sees and does.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edgekd.errors import TrainingError
from edgekd.nn.adversary import Adversary, stage_parameters
from edgekd.nn.taps import capture

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from edgekd.tasks.base import Task

CRITIC_POWER = 0.9
"""A critic's learning rate falls as (1 - progress)^0.9."""


@dataclass(frozen=True)
class Outputs:
    """What a model gave for one batch."""

    logits: Tensor
    """[B, classes] for classification, before softmax; what the task says for others."""
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    """Role -> tensor, for the roles that the objective asked for."""


@dataclass(frozen=True)
class StepInputs:
    """All that a loss term may look at."""

    images: Tensor
    """float32 [B, C, H, W], normalised."""
    labels: Tensor
    """The ground truth: int64 [B]; boxes, float32 [B, M, 6]; or masks, uint8 [B, H, W]."""
    student: Outputs
    teacher: Outputs | None
    step: int
    """Optimizer steps done so far in this stage."""
    epoch: int
    progress: float = 0.0
    """Share of this stage's steps that are done, 0..1: for schedules of a method's own."""
    student_net: nn.Module | None = None
    """The student itself, in training mode, for methods that call it again (see :func:`edgekd.nn.batch_norm.untracked`)."""
    teacher_net: nn.Module | None = None
    """The teacher, frozen; call it without gradients, or with them where they must pass through it."""
    total_steps: int = 1
    """Optimizer steps of this stage: ``step + 1`` of them are done after this one, for ramps that end at their full height."""


class Objective(Protocol):
    """What a stage trains towards beside the task: a Distiller, or nothing. An nn.Module, whose parameters are trained too."""

    student_taps: tuple[str, ...]
    teacher_taps: tuple[str, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained beside the student."""

    def state_dict(self) -> dict[str, Any]:
        """For the training state."""

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """Named scalars, already weighted; the loop adds them up."""

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One optimizer step on one batch; the default is :func:`train_step`."""


class TaskOnly(nn.Module):
    """The objective of plain training: the task loss and nothing else."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def losses(self, step: StepInputs) -> dict[str, Tensor]:  # noqa: ARG002
        """No terms."""
        return {}

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The default step."""
        return train_step(state, images, labels)


@dataclass
class TrainState:
    """The moving parts of a training, handed to ``train_step``."""

    fabric: Fabric
    task: Task
    student: nn.Module
    """As Fabric wrapped it: call it to get logits."""
    inner: nn.Module
    """The student itself: its parameters, its taps."""
    teacher: nn.Module | None
    objective: Objective
    student_taps: Mapping[str, str]
    """Role -> module path in the unwrapped student."""
    teacher_taps: Mapping[str, str]
    optimizer: torch.optim.Optimizer
    task_weight: float = 1.0
    clip_norm: float | None = None
    accumulate: int = 1
    step: int = 0
    epoch: int = 0
    total_steps: int = 1

    @property
    def progress(self) -> float:
        """Share of the steps that are done, 0..1."""
        return self.step / self.total_steps


def forward(state: TrainState, images: Tensor, labels: Tensor) -> StepInputs:
    """Run the student, and the teacher without gradients, and collect the taps that the objective asked for."""
    teacher = None
    if state.teacher is not None:
        with torch.no_grad(), state.fabric.autocast(), capture(state.teacher, state.teacher_taps) as taps:
            teacher = Outputs(state.teacher(images), taps)
    with capture(state.inner, state.student_taps) as taps:
        student = Outputs(state.student(images), taps)
    return StepInputs(
        images,
        labels,
        student,
        teacher,
        state.step,
        state.epoch,
        state.progress,
        state.inner,
        state.teacher,
        state.total_steps,
    )


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
    """One optimizer step: forward, named terms, backward, clip, step.

    The batch is cut into ``state.accumulate`` parts whose gradients add up to the gradient of the whole batch.

    Returns:
        The value of every term, averaged over the parts.

    Raises:
        TrainingError: A term is not finite; the message names it.
    """
    state.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    parts = list(zip(images.chunk(state.accumulate), labels.chunk(state.accumulate), strict=True))
    for number, (part_images, part_labels) in enumerate(parts, 1):
        with no_sync(state, number < len(parts)):
            inputs = forward(state, part_images, part_labels)
            with state.fabric.autocast():
                terms = {"task": task_loss(state, inputs)}
                terms.update(state.objective.losses(inputs))
            share = len(part_images) / len(images)
            for name, value in finite(terms, state).items():
                sums[name] = sums.get(name, 0.0) + share * value
            state.fabric.backward(share * torch.stack([term.float() for term in terms.values()]).sum())
    average_gradients(state, state.objective)
    if state.clip_norm is not None:
        state.fabric.clip_gradients(state.student, state.optimizer, max_norm=state.clip_norm, error_if_nonfinite=False)
    state.optimizer.step()
    return sums


def critic_step(state: TrainState, adversary: Adversary) -> dict[str, float]:
    """One step of a critic, on the maps that were judged in the student's step before it: those from before the student moved.

    Args:
        state: Of the stage.
        adversary: The critic.

    Returns:
        Its weighted loss, as ``critic``.

    Raises:
        TrainingError: That is not finite.
    """
    loss = adversary.loss()
    value = finite({"critic": loss}, state)
    adversary.update(loss, state.fabric, rate=(1 - state.progress) ** CRITIC_POWER)
    return value


def task_loss(state: TrainState, inputs: StepInputs) -> Tensor:
    """The task's term; with weight 0 it is not computed: losses of whole maps cost as much as a small student."""
    if not state.task_weight:
        return (0 * inputs.student.logits).sum()
    return state.task_weight * state.task.loss(inputs.student.logits, inputs.labels, state.progress)


def finite(terms: Mapping[str, Tensor], state: TrainState) -> dict[str, float]:
    """The terms as numbers.

    Raises:
        TrainingError: One of them is not finite.
    """
    # One transfer for all terms: on a GPU every .item() would wait for the device.
    values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist(), strict=True))
    for name, value in values.items():
        if not -float("inf") < value < float("inf"):
            others = ", ".join(f"{other} {values[other]:.4g}" for other in values if other != name)
            raise TrainingError(
                f"term {name!r} is {value} in epoch {state.epoch + 1}, step {state.step} (the others: {others or 'none'})",
                hint="lower train.lr, set train.clip_norm, or train in precision 32-true",
            )
    return values


def average_gradients(state: TrainState, module: Any) -> None:
    """Do for the parameters of an nn.Module what DistributedDataParallel does for the student's."""
    if state.fabric.world_size > 1:
        for parameter in stage_parameters(module):
            if parameter.grad is not None:
                state.fabric.all_reduce(parameter.grad, reduce_op="mean")  # in place


@contextlib.contextmanager
def no_sync(state: TrainState, skip: bool = True) -> Iterator[None]:
    """Inside, gradients of the student stay with their process, where ``skip`` says so."""
    if skip and state.fabric.world_size > 1:
        with state.fabric.no_backward_sync(state.student):  # type: ignore[arg-type]  # Fabric wrapped it, see loop.py
            yield
    else:
        yield
