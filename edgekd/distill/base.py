"""What a distillation method is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edgekd.train.step import StepInputs, TrainState, train_step


class Distiller(nn.Module):
    """A method at work: it says which taps it wants and gives weighted, named terms.

    Adapters, critics and memory banks are submodules, so they are trained and saved with it. The methods below are all there is
    to override; a method class derives from this one directly.
    """

    student_taps: tuple[str, ...] = ()
    """Roles of the student's tensors that ``losses`` reads."""
    teacher_taps: tuple[str, ...] = ()
    """Roles of the teacher's tensors that ``losses`` reads."""

    def prepare(self, student: nn.Module, teacher: nn.Module, setting: Any) -> None:
        """Run once before the first epoch: warm-ups, selections, prototypes. Does nothing by default."""

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """Named scalars, already weighted. The loop adds the task loss as the term ``task``."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One optimizer step; adversarial, data-free and online methods replace it whole."""
        return train_step(state, images, labels)
